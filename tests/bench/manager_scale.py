"""What one manager bears: `uv run python -m tests.bench.manager_scale [--variants N] [--calls N]`.

Not a test: it takes minutes. N variants over 100 distinct locks, on a real Ray. The handle's calls
alternate with those of an empty async actor method in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import psutil  # type: ignore[import-untyped]
import ray

from ray_envs import EnvSpec, RayEnvironmentProvider, Settings
from ray_envs.cluster.actors import find_manager
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId, VariantRecord
from ray_envs.node.store import Store
from tests import definitions

LOCKS = 100
#: How many calls of a pipelined round are on their way at once.
AT_ONCE = 100


class Empty:
    async def method(self, *, variant_id: str) -> None:
        return None


def populate(settings: Settings, count: int) -> None:
    """Write `count` definitions, over `LOCKS` locks, as the registry would have."""
    registry = Registry(settings)
    (model,) = registry.all()
    pyproject, uv_lock = registry.lock_text(model.env_id, 1)
    for number in range(LOCKS):  # one variant of each lock by the registry itself
        generation = model.current.model_copy(
            update={"key": f"{number:032x}", "fingerprint": f"fingerprint {number}"}
        )
        env_id = EnvId(workflow_id="many", node_id=f"v{number}")
        definitions.commit(registry, env_id, generation, pyproject=pyproject, uv_lock=uv_lock)
    made: dict[int, VariantRecord] = {
        number: registry.get(EnvId(workflow_id="many", node_id=f"v{number}"))  # type: ignore[misc]
        for number in range(LOCKS)
    }
    for number in range(LOCKS, count - 1):
        source = made[number % LOCKS]
        env_id = EnvId(workflow_id="many", node_id=f"v{number}")
        record = source.model_copy(update={"env_id": env_id})
        folder, known = registry.folder(env_id), registry.folder(source.env_id)
        (folder / "generations" / "1").mkdir(parents=True)
        for name in ("uv.lock", "pyproject.toml", "generation.json"):
            os.link(known / "generations" / "1" / name, folder / "generations" / "1" / name)
        shutil.copyfile(known / "uv.lock", folder / "uv.lock")
        shutil.copyfile(known / "pyproject.toml", folder / "pyproject.toml")
        (folder / "metadata.json").write_text(record.model_dump_json(indent=1) + "\n")


def answered(ask: Callable[[], Any]) -> Any:
    """What an actor answers that is just being restarted."""
    while True:
        try:
            return ray.get(ask())
        except ray.exceptions.RayActorError:
            time.sleep(0.01)


def calls(sides: dict[str, Callable[[], Any]], rounds: int, count: int) -> None:
    """Latency one after the other, and calls a second with `AT_ONCE` on their way."""
    latency: dict[str, list[float]] = {name: [] for name in sides}
    rate: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        ray.get([call() for _ in range(AT_ONCE)])
    for _ in range(rounds):
        for name, call in sides.items():
            for _ in range(count // 10):
                began = time.perf_counter()
                ray.get(call())
                latency[name].append(time.perf_counter() - began)
        for name, call in sides.items():
            began = time.perf_counter()
            waiting = [call() for _ in range(AT_ONCE)]
            for _ in range(count - AT_ONCE):
                ray.get(waiting.pop(0))
                waiting.append(call())
            ray.get(waiting)
            rate[name].append(count / (time.perf_counter() - began))
    empty_s, empty_rate = (statistics.median(side["empty"]) for side in (latency, rate))
    for name in sides:
        p50, per_s = statistics.median(latency[name]), statistics.median(rate[name])
        print(
            f"{name:16} p50 {p50 * 1e6:6.0f} µs ({empty_s / p50:.2f} of empty)   "
            f"{per_s:6.0f} calls/s ({per_s / empty_rate:.2f} of empty)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    root = options.root or Path(tempfile.mkdtemp(prefix="ray_envs-scale-"))
    settings = Settings(root=root)
    with RayEnvironmentProvider.without_cluster(settings) as provider:
        provider.create("real", EnvSpec(), wait_s=600)
    began = time.perf_counter()
    if len(Registry(settings).stamps()) < options.variants:
        populate(settings, options.variants)
    print(f"{options.variants} definitions written in {time.perf_counter() - began:.1f} s")
    files = {path.stat().st_ino: path.stat().st_blocks for path in root.rglob("*")}
    envs = {path.stat().st_ino: path.stat().st_blocks for path in (root / "envs").rglob("*")}
    print(
        f"disk: {sum(files.values()) / 2048:.0f} MiB, of which definitions "
        f"{sum(envs.values()) / 2048:.0f} MiB; environments: {len(Store(settings).records())}"
    )
    os.environ["RAY_ENVS_ROOT"] = str(root)
    with RayEnvironmentProvider.connect("local", settings=settings) as provider:
        provider.prepare("real")
        manager = find_manager()
        assert manager is not None
        recoveries, answers, lists = [], [], []
        for _ in range(options.rounds):
            ray.kill(manager, no_restart=False)
            began = time.perf_counter()
            answered(lambda: manager.get_env_status.remote(variant_id="many/v50"))
            answers.append(time.perf_counter() - began)
            rows = answered(manager.list_envs.remote)
            recoveries.append(time.perf_counter() - began)
            assert len(rows) == options.variants
            began = time.perf_counter()
            rows = ray.get(manager.list_envs.remote())
            lists.append(time.perf_counter() - began)
        print(f"kill to first status: {statistics.median(answers):.2f} s {sorted(answers)}")
        print(f"kill to whole list:   {statistics.median(recoveries):.2f} s")
        size = len(json.dumps(rows))
        print(f"list_envs:            {statistics.median(lists):.3f} s, {size} bytes")
        (process,) = [
            p for p in psutil.process_iter(["cmdline"])
            if any("EnvManager" in word for word in p.info["cmdline"] or ())
        ]  # fmt: skip
        print(f"manager RSS:          {process.memory_info().rss / 2**20:.0f} MiB")
        provider.prepare("real")
        empty = ray.remote(Empty).options(num_cpus=0, max_concurrency=1000).remote()
        ray.get(manager.get_environment.remote(variant_id="real"))
        calls(
            {
                "empty": lambda: empty.method.remote(variant_id="real"),
                "get_env_status": lambda: manager.get_env_status.remote(variant_id="real"),
                "get_environment": lambda: manager.get_environment.remote(variant_id="real"),
            },
            options.rounds,
            options.calls,
        )
    if not options.root:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
