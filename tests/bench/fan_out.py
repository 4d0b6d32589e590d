"""Figures of several hosts: `uv run python -m tests.bench.fan_out [--rounds 5] [--hosts 1 2 4]`.

Not a test: it takes minutes, root, and a quiet machine. Hosts are those of the tests: own network
and disk each, all on this machine's processors, so that only ratios of one run mean anything. The
package index is a copy on the same machine: a real one is slower, which helps whoever asks less.

* cold: from `create` to ready on all of N hosts with empty roots, where only the head reaches the
  index; in turn with it, on the same hosts, which then all reach it, the first tasks with Ray's own
  `{"uv": […]}`, whose environments Ray makes without a cache (its default) and without Ray in them.
* first task: of a new worker on a ready node, with our options and with a `py_executable` by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

from tests.multihost.hosts import Hosts

PACKAGES = ("scikit-learn==1.6.*", "pandas==2.2.*")

OURS = """
import json, sys, time, ray
ray.init(log_to_driver=False)
from ray_envs import EnvSpec, RayEnvironmentProvider
packages = json.loads(sys.argv[1])
with RayEnvironmentProvider.connect() as envs:
    began = time.monotonic()
    envs.create("bench", EnvSpec(packages=packages))
    locked = time.monotonic()
    first = None
    def look(statuses):
        global first
        phases = [node["phase"] for node in statuses["bench"]["nodes"].values()]
        if first is None and "ready" in phases:
            first = time.monotonic()
    status = envs.prepare("bench", on_status=look)["bench"]
    print(json.dumps({"all_s": time.monotonic() - began, "first_s": first - began,
                      "lock_s": locked - began, "nodes": len(status["nodes"]),
                      "how": sorted(node["how"] for node in status["nodes"].values())}))
"""

RAYS = """
import json, sys, time, ray
ray.init(log_to_driver=False)
packages, number, names = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
# another number is another environment for Ray
uv = {"packages": packages, "uv_pip_install_options": ["--no-cache", *["--quiet"] * (number + 1)]}

@ray.remote
def first():
    import sklearn, pandas
    return pandas.__version__

began = time.monotonic()
tasks = [first.options(runtime_env={"uv": uv}, label_selector={"host": name}).remote()
         for name in names]
ray.get(tasks, timeout=900)
print(json.dumps({"all_s": time.monotonic() - began}))
"""

FIRST_TASKS = """
import json, sys, time, ray
ray.init(log_to_driver=False)
from ray_envs import EnvSpec, RayEnvironmentProvider

@ray.remote
def nothing():
    return None

def timed(options, number):
    # another value is another worker
    runtime_env = dict(options["runtime_env"])
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), "NTH": str(number)}
    began = time.monotonic()
    ray.get(nothing.options(**{**options, "runtime_env": runtime_env}).remote(), timeout=300)
    return time.monotonic() - began

with RayEnvironmentProvider.connect() as envs:
    envs.create("bench", EnvSpec(packages=json.loads(sys.argv[1])))
    envs.prepare("bench")
    ours = envs.options("bench")
    by_hand = {"runtime_env": {"py_executable": ours["runtime_env"]["py_executable"]}}
    timed(ours, -1), timed(by_hand, -2)
    found = {"ours": [], "by_hand": []}
    for number in range(int(sys.argv[2])):
        found["ours"].append(timed(ours, 2 * number))
        found["by_hand"].append(timed(by_hand, 2 * number + 1))
    print(json.dumps(found))
"""


def cold(n_hosts: int, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cold starts on `n_hosts`, in turn: "fan-out" and "ray-uv", each with what it took."""
    with Hosts(n_hosts) as hosts:
        assert hosts.index is not None
        address = hosts.index.base.partition("//")[2].rpartition(":")[0]
        env = {"PIP_INDEX_URL": hosts.index.url, "PIP_TRUSTED_HOST": address}
        hosts.start_ray(plugin=True, env=env)
        hosts.driver("import ray; ray.init()")  # workers of Ray itself have started once
        for number in range(rounds):
            for kind in ("fan-out", "ray-uv"):
                yield kind, one_cold(hosts, kind, number)


def one_cold(hosts: Hosts, kind: str, number: int) -> dict[str, Any]:
    assert hosts.index is not None
    for host in hosts.workers:
        host.route_to_index(open=kind == "ray-uv")
    hosts.index.forget()
    packages = json.dumps(PACKAGES)
    if kind == "ray-uv":
        names = [host.name for host in hosts]
        told = hosts.driver(RAYS, packages, number, *names, deadline_s=1000).data
    else:
        told = hosts.driver(OURS, packages, deadline_s=1000).data
        hosts.head.run(["ray-envs", "down"], env={"RAY_ADDRESS": hosts.ray_address})
        for host in hosts:
            host.wipe_root()
    sent = hosts.index.downloads
    return {
        **told,
        "index_mib": sum(each.n_bytes for each in sent.values()) / 2**20,
        "wheels": sum(each.count for name, each in sent.items() if name.endswith(".whl")),
    }


def first_tasks(count: int) -> dict[str, Any]:
    with Hosts(1) as hosts:
        hosts.start_ray(plugin=True)
        found = hosts.driver(FIRST_TASKS, json.dumps(PACKAGES), count, deadline_s=1200).data
    return {name: statistics.median(values) for name, values in found.items()} | {"n": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--first-tasks", type=int, default=15)
    given = parser.parse_args()
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for n_hosts in given.hosts:
        for kind, told in cold(n_hosts, given.rounds):
            rows.setdefault((n_hosts, kind), []).append(told)
            print(n_hosts, kind, json.dumps(told), flush=True)
    alone = rows.get((1, "fan-out"), [])
    alone_s = statistics.median(row["all_s"] for row in alone) if alone else float("nan")
    for (n_hosts, kind), told_rows in rows.items():
        each = [row["all_s"] for row in told_rows]
        seconds = statistics.median(each)
        mib = statistics.median(row["index_mib"] for row in told_rows)
        print(
            f"{n_hosts} hosts, {kind}, n={len(each)}: {seconds:.1f} s ({min(each):.1f} to "
            f"{max(each):.1f}) = {seconds / alone_s:.2f} x one host of ours; "
            f"{mib:.0f} MiB from the index"
        )
    if given.first_tasks:
        told = first_tasks(given.first_tasks)
        print(
            f"first task on a ready node, n={told['n']}: {told['ours']:.3f} s, by hand "
            f"{told['by_hand']:.3f} s, {told['ours'] / told['by_hand']:.3f} x"
        )


if __name__ == "__main__":
    main()
