"""What the runner costs against a bare Ray loop: `uv run python -m tests.bench.batch_items`.

Not a test: it takes minutes and a quiet machine. Both sides run the same trivial items in the same
environments of one Ray with 4 CPUs, at most 100 items at a time, and alternate.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

VARIANTS = {
    "six16": "six==1.16.0", "six17": "six==1.17.0", "toml": "toml==0.10.2",
    "zipp": "zipp==3.7.0", "tabulate": "tabulate==0.9.0",
}  # fmt: skip
_PENDING = 100


def short(number: int, seconds: float) -> int:
    import time

    if seconds:
        time.sleep(seconds)
    return number * 2


def by_hand(envs: Any, calls: list[tuple[str, int]], seconds: float) -> int:
    """Run the calls as one Ray task each."""
    import ray

    task = ray.remote(short)
    tasks = {name: task.options(**envs.options(name)) for name in VARIANTS}
    running: list[Any] = []
    done = 0
    for name, number in calls:
        if len(running) >= _PENDING:
            ready, running = ray.wait(running, num_returns=1)
            done += len(ray.get(ready))
        running.append(tasks[name].remote(number, seconds))
    return done + len(ray.get(running))


def by_runner(envs: Any, numbers: range, seconds: float, isolation: str = "worker") -> int:
    from ray_envs import RayBatchRunner

    cases = ([number, seconds] for number in numbers)
    runner = RayBatchRunner(envs, max_pending=_PENDING)
    results = runner.run(short, variants=list(VARIANTS), cases=cases, isolation=isolation)
    return sum(r.ok for r in results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.0, help="the length of an item")
    parser.add_argument("--isolations", default="worker,process")
    parser.add_argument("--memory", action="store_true", help="of the runner alone: 1 % and all")
    parser.add_argument("--root", type=Path)
    given = parser.parse_args()
    root = given.root or Path(tempfile.mkdtemp(prefix="ray_envs-bench-"))
    os.environ["RAY_ENVS_ROOT"], os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = str(root), "0"
    import ray

    from ray_envs import EnvSpec, RayEnvironmentProvider

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    numbers = range(given.items // len(VARIANTS))
    calls = [(name, number) for number, name in product(numbers, VARIANTS)]
    took: dict[str, list[float]] = {s: [] for s in (*given.isolations.split(","), "by hand")}
    with RayEnvironmentProvider.connect() as envs:
        for name, package in VARIANTS.items():
            envs.create(name, EnvSpec(packages=[package]))
        envs.prepare(*VARIANTS)
        if given.memory:
            for count in (given.items // 100, given.items):
                began = time.perf_counter()
                by_runner(envs, range(count // len(VARIANTS)), given.seconds)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                print(f"{count} items: {memory} MiB, {time.perf_counter() - began:.1f} s")
            return
        for side in [*took] * given.rounds:
            began = time.perf_counter()
            if side == "by hand":
                count = by_hand(envs, calls, given.seconds)
            else:
                count = by_runner(envs, numbers, given.seconds, side)
            took[side].append(time.perf_counter() - began)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{side}: {count} items, {took[side][-1]:.1f} s, {memory} MiB", flush=True)
            if count != len(calls):
                sys.exit(f"{count} of {len(calls)} items succeeded")
    medians = {side: statistics.median(values) for side, values in took.items()}
    print({side: round(value, 2) for side, value in medians.items()})
    for side, median in medians.items():
        print(f"{side} / by hand: {median / medians['by hand']:.2f} x")
    ray.shutdown()


if __name__ == "__main__":
    main()
