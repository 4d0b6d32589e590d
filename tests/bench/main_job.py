"""The figures of the README: `uv run python -m tests.bench.main_job [--rounds 5] [NAME …]`.

Not a test: it takes minutes and a quiet machine. Both sides of each comparison alternate in one
run; what is printed are medians and their ratio. Whole processes are timed from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uv

from ray_envs import EnvSpec, RayEnvironmentProvider, Settings
from ray_envs.node.interpreter import base_python

BATCH = Path(__file__).parents[2] / "envs" / "sklearn-upgrade"

#: The same nine calls as someone would write them without ray_envs.
BY_HAND = """
import os, sys
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
import ray
ray.init(address="local", include_dashboard=False, logging_level="ERROR")
def evaluate(dataset):
    import sys
    sys.path.append(CODE)
    import accuracy
    return accuracy.evaluate(dataset)
CODE, order, *pythons = sys.argv[1:]
calls = [(p, d) for p in pythons for d in ("digits", "wine", "breast_cancer")]
if order == "by-case":
    calls.sort(key=lambda call: ("digits", "wine", "breast_cancer").index(call[1]))
if calls:
    task = ray.remote(evaluate)
    print(len(ray.get([
        task.options(runtime_env={"py_executable": python}).remote(dataset)
        for python, dataset in calls
    ])))
ray.shutdown()
"""

FIRST_WORKER = """
import time; began = time.perf_counter()
import ray, sklearn.linear_model, sklearn.datasets, sklearn.model_selection
print(time.perf_counter() - began)
"""


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def command(*words: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        words,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{words[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def report(name: str, sides: dict[str, list[float]]) -> dict[str, float]:
    medians = {side: statistics.median(values) for side, values in sides.items()}
    print(f"\n{name} (medians of {len(next(iter(sides.values())))}, seconds)")
    for side, values in sides.items():
        spread = ", ".join(f"{value:.3f}" for value in sorted(values))
        print(f"  {side:34} {medians[side]:8.3f}   [{spread}]")
    return medians


def alternate(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(sides[name]())
    return times


def repeated_run(settings: Settings, rounds: int) -> None:
    """A run of the shipped batch with everything prepared, against the same calls by hand."""
    env = settings.to_environment()
    work = settings.root.parent
    run = [str(Path(sys.executable).with_name("ray-envs")), "run", str(BATCH / "batch.toml")]
    command(*run, env=env, cwd=work)
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        pythons = [
            envs.status(row["variant_id"])["python_path"]
            for row in envs.list_variants()
            if row["workflow_id"] == "sklearn-upgrade"
        ]
    hand = [sys.executable, "-c", BY_HAND, str(BATCH)]
    by_variant, by_case = [*hand, "by-variant", *pythons], [*hand, "by-case", *pythons]
    medians = report(
        "repeated run of the shipped batch, whole process",
        alternate(
            rounds,
            {
                "bare init + shutdown": lambda: timed(lambda: command(*hand, "none", cwd=work)),
                "by hand, variant by variant": lambda: timed(
                    lambda: command(*by_variant, cwd=work)
                ),
                "by hand, case by case": lambda: timed(lambda: command(*by_case, cwd=work)),
                "ray-envs run": lambda: timed(lambda: command(*run, env=env, cwd=work)),
            },
        ),
    )
    bare, *by_hand, ours = medians.values()
    for theirs in by_hand:
        print(
            f"  net of init: {ours - bare:.3f} against {theirs - bare:.3f}: "
            f"{(ours - bare) / (theirs - bare):.2f} x, {ours - theirs:+.3f} s"
        )


def preparing(settings: Settings, rounds: int) -> None:
    """Preparing from cached wheels, byte-code included, against a bare offline `uv sync`."""
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        spec = EnvSpec(packages=("scikit-learn==1.6.1", "pandas"))
        envs.create("bench/first", spec)
        envs.prepare("bench/first")
        row = envs.status("bench/first")
        project = Path(row["env_path"])
        store = Path(row["venv_path"]).parent
        scratch = Path(tempfile.mkdtemp(dir=settings.root))
        for name in ("pyproject.toml", "uv.lock"):
            shutil.copy(project / name, scratch)

        def bare() -> float:
            shutil.rmtree(scratch / ".venv", ignore_errors=True)
            os.sync()  # the removal's own writes would be part of what is timed
            sync = "sync --frozen --offline --no-default-groups --group ray-envs -q --python"
            words = (uv.find_uv_bin(), *sync.split(), base_python())
            return timed(
                lambda: command(
                    *words, env={"UV_CACHE_DIR": str(settings.root / "uv-cache")}, cwd=scratch
                )
            )

        def ours() -> float:
            return forget_and_prepare(settings, store)

        medians = report(
            f"preparing {len(row['packages'])} packages from uv's cache",
            alternate(rounds, {"bare uv sync --frozen --offline": bare, "ray_envs": ours}),
        )
        print(f"  {medians['ray_envs'] / medians['bare uv sync --frozen --offline']:.2f} x")


def forget_and_prepare(settings: Settings, store: Path) -> float:
    """The time from the wish to ready, for an environment whose directory is gone."""
    shutil.rmtree(store)
    os.sync()
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        envs.list_variants()  # the first verb starts the manager; it is not part of preparing
        return timed(lambda: envs.prepare("bench/first"))


def second_variant(settings: Settings, rounds: int) -> None:
    """A second variant with the same requirements, from `create` to ready."""
    spec = EnvSpec(packages=("scikit-learn==1.6.1", "pandas"))
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        envs.create("bench/first", spec)
        envs.prepare("bench/first")
        times = []
        for number in range(rounds):
            name = f"bench/again-{number}"

            def both(name: str = name) -> None:
                envs.create(name, spec)
                envs.prepare(name)

            times.append(timed(both))
            envs.delete(name)
    report("a second variant with the same requirements", {"create + prepare": times})


def first_worker(settings: Settings, rounds: int) -> None:
    """Imports of a first worker, against the same venv made and byte-compiled by hand."""
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        envs.create("bench/first", EnvSpec(packages=("scikit-learn==1.6.1", "pandas")))
        envs.prepare("bench/first")
        row = envs.status("bench/first")
    scratch = Path(tempfile.mkdtemp(dir=settings.root))
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(Path(row["env_path"]) / name, scratch)
    sync = "sync --frozen --no-default-groups --group ray-envs --compile-bytecode -q --python"
    command(uv.find_uv_bin(), *sync.split(), base_python(), cwd=scratch)
    by_hand = scratch / ".venv" / "bin" / "python"
    medians = report(
        "imports of ray and scikit-learn in a first worker",
        alternate(
            rounds,
            {
                "venv byte-compiled by hand": lambda: float(
                    command(str(by_hand), "-c", FIRST_WORKER)
                ),
                "ray_envs": lambda: float(command(row["python_path"], "-c", FIRST_WORKER)),
            },
        ),
    )
    print(f"  {medians['ray_envs'] / medians['venv byte-compiled by hand']:.2f} x")


def reading(settings: Settings, rounds: int) -> None:
    """`ray-envs list`, whole process."""
    words = [str(Path(sys.executable).with_name("ray-envs")), "list", "--json"]
    env = settings.to_environment()
    report(
        "ray-envs list",
        {"whole process": [timed(lambda: command(*words, env=env)) for _ in range(rounds)]},
    )


ALL = {
    f.__name__.replace("_", "-"): f
    for f in (repeated_run, preparing, second_variant, first_worker, reading)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*ALL, []], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", type=Path, help="keep the environments here")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="ray_envs-bench-"))
    root = arguments.root or scratch / "root"
    settings = Settings.from_environment(root=root)
    print(json.dumps({"python": sys.version.split()[0], "cores": os.cpu_count()}))
    try:
        for name in arguments.names or ALL:
            ALL[name](settings, arguments.rounds)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
