"""Ray's other doors take our options: Serve, Data, pools, placement strategies, Ray Client.

Each test uses the real thing. What a door cannot do is refused with a word, and never hangs.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import ray
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ray_envs import EnvSpec, RayEnvironmentProvider, Settings
from ray_envs.node.store import Store
from tests.cluster.cli_tools import BIN, Shell, ended, free_port
from tests.cluster.conftest import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    # Serve and Data warn of what they themselves use, when they are imported and used
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

OLD = "kept/old-six"

#: How long anything may take to start on a machine that does other things too.
STARTED_S = 90

#: What the variant of a replica, and that of a worker of Ray Data, must hold. Its Ray is pinned by
#: the lock as that of every other variant.
SERVED = EnvSpec(packages=("six==1.16.0", "ray[serve,data]"))


@pytest.fixture(scope="module")
def served(cluster: RayEnvironmentProvider) -> Iterator[str]:
    """A variant that Serve and Data can use."""
    cluster.create("doors/served", SERVED)
    cluster.prepare("doors/served")
    yield "doors/served"
    cluster.delete("doors/served", force=True)


@pytest.fixture
def venv(cluster: RayEnvironmentProvider, root: Path) -> Callable[[str], str]:
    """The folder of a variant's environment, as its `sys.prefix` says it."""
    store = Store(Settings(root=root))
    return lambda variant_id: str(store.venv(cluster.status(variant_id)["key"]))


# -- Serve -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serve(cluster: RayEnvironmentProvider) -> Iterator[Any]:
    """`ray.serve` on the session's Ray."""
    from ray import serve

    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    yield serve
    serve.shutdown()


def replica() -> type:
    class Replica:
        def __init__(self) -> None:
            import six  # type: ignore[import-untyped, unused-ignore]

            self._version = six.__version__

        def __call__(self, word: str) -> tuple[str, str, str]:
            import sys

            return word, sys.prefix, self._version

    return Replica


@pytest.mark.thorough  # a hundred more packages
def test_a_deployment_of_serve_runs_in_its_variant(
    cluster: RayEnvironmentProvider, serve: Any, served: str, venv: Callable[[str], str]
) -> None:
    options = cluster.options(served, num_cpus=0.1)
    deployment = serve.deployment(ray_actor_options=options)(replica())
    handle = serve.run(deployment.bind(), name="served", route_prefix=None)
    told = handle.remote("word").result(timeout_s=STARTED_S)
    assert told == ("word", venv(served), "1.16.0")


def test_a_variant_without_serve_fails_its_deployment_and_names_the_missing_module(
    cluster: RayEnvironmentProvider, serve: Any
) -> None:
    options = cluster.options(OLD, num_cpus=0.1)
    deployment = serve.deployment(ray_actor_options=options)(replica())
    with pytest.raises(RuntimeError, match="Deploying application bare failed"):
        serve.run(deployment.bind(), name="bare", route_prefix=None)
    (state,) = serve.status().applications["bare"].deployments.values()
    assert state.status == "DEPLOY_FAILED"
    assert "ModuleNotFoundError: No module named 'starlette'" in state.message


def test_serve_names_the_options_that_a_deployment_cannot_have(
    cluster: RayEnvironmentProvider,
) -> None:
    from ray import serve

    with pytest.raises(ValueError, match="'max_restarts' in ray_actor_options is not allowed"):
        serve.deployment(ray_actor_options=cluster.options(OLD, max_restarts=1))(replica())


# -- Data ------------------------------------------------------------------------------------------


def mark(batch: dict[str, Any]) -> dict[str, Any]:
    import sys

    import six

    size = len(batch["id"])
    return {**batch, "prefix": [sys.prefix] * size, "six": [six.__version__] * size}


class Marker:
    def __init__(self) -> None:
        import six

        self._version = six.__version__

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import sys

        size = len(batch["id"])
        return {**batch, "prefix": [sys.prefix] * size, "six": [self._version] * size}


@pytest.fixture
def data() -> Iterator[Any]:
    """`ray.data`; what this module defines travels by value: no variant can import it."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    this = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this)
    yield ray.data
    ray.cloudpickle.unregister_pickle_by_value(this)


@pytest.mark.parametrize("mapped", [{"fn": mark}, {"fn": Marker, "concurrency": 1}])
@pytest.mark.thorough  # a hundred more packages
def test_ray_data_maps_batches_in_a_variant(
    cluster: RayEnvironmentProvider,
    data: Any,
    served: str,
    venv: Callable[[str], str],
    mapped: dict[str, Any],
) -> None:
    options = cluster.options(served, num_cpus=0.1)
    rows = data.range(20, override_num_blocks=2).map_batches(**mapped, **options).take_all()
    assert sorted(row["id"] for row in rows) == list(range(20))
    assert {(row["prefix"], row["six"]) for row in rows} == {(venv(served), "1.16.0")}


@pytest.mark.thorough  # a hundred more packages
def test_ray_data_reads_in_a_variant(
    cluster: RayEnvironmentProvider, data: Any, served: str, venv: Callable[[str], str]
) -> None:
    class Where(data.Datasource):  # type: ignore[misc]
        def get_read_tasks(self, *args: Any, **options: Any) -> list[Any]:
            def read() -> Any:
                import sys

                import pandas as pd  # type: ignore[import-untyped, unused-ignore]

                yield pd.DataFrame({"prefix": [sys.prefix]})

            from ray.data.block import BlockMetadata
            from ray.data.datasource import ReadTask

            told = BlockMetadata(num_rows=1, size_bytes=100, input_files=None, exec_stats=None)
            return [ReadTask(read, told)]

        def estimate_inmemory_data_size(self) -> int:
            return 100

    read = data.read_datasource(Where(), ray_remote_args=cluster.options(served, num_cpus=0.1))
    assert read.take_all() == [{"prefix": venv(served)}]


def test_a_variant_without_ray_datas_modules_fails_with_their_names(
    cluster: RayEnvironmentProvider, data: Any
) -> None:
    mapped = data.range(2, override_num_blocks=1).map_batches(
        mark, **cluster.options(OLD, num_cpus=0.1)
    )
    with pytest.raises(ray.exceptions.RayTaskError, match="No module named 'pandas'"):
        mapped.take_all()


# -- pools and strategies --------------------------------------------------------------------------


def where() -> str:
    import sys

    return sys.prefix


def asked(options: dict[str, Any]) -> str:
    """Where a task with `options` runs."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task: Any = ray.remote(where)
        found: str = ray.get(task.options(**options).remote(), timeout=STARTED_S)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    return found


def test_a_pool_of_ray_works_in_a_variant(
    cluster: RayEnvironmentProvider, venv: Callable[[str], str]
) -> None:
    from ray.util.multiprocessing import Pool

    pool = Pool(1, ray_remote_args=cluster.options(OLD, num_cpus=0))
    try:
        assert pool.apply(eval, ("__import__('sys').prefix",)) == venv(OLD)
    finally:
        pool.terminate()


def test_spread_and_a_node_that_is_ready_go_with_a_variant(
    cluster: RayEnvironmentProvider, venv: Callable[[str], str]
) -> None:
    (node,) = (node["NodeID"] for node in ray.nodes() if node["Alive"])
    for strategy in ("SPREAD", "DEFAULT", NodeAffinitySchedulingStrategy(node, soft=False)):
        options = cluster.options(OLD, num_cpus=0, scheduling_strategy=strategy)
        assert asked(options) == venv(OLD)


def test_a_placement_group_on_ready_nodes_goes_with_a_variant(
    cluster: RayEnvironmentProvider, venv: Callable[[str], str]
) -> None:
    selector = cluster.options(OLD).get("label_selector", {})
    group = ray.util.placement_group([{"CPU": 1}], bundle_label_selector=[selector])
    try:
        ray.get(group.ready(), timeout=STARTED_S)
        strategy = PlacementGroupSchedulingStrategy(group)
        assert asked(cluster.options(OLD, num_cpus=1, scheduling_strategy=strategy)) == venv(OLD)
    finally:
        ray.util.remove_placement_group(group)


# -- two nodes, and Ray Client ---------------------------------------------------------------------

#: The cluster's own token, as in test_cli; that these tests may run under `uv run` is no matter.
#: Ray Client's proxy forks each client's server. With gRPC's fork handlers on, that child often
#: dies before its first line ("Epoll1Poller: Bad file descriptor"): 4 of 8 runs; without: 0 of 8.
AUTH = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
RAY_PORT, CLIENT_PORT = free_port(), free_port()
ADDRESS = f"127.0.0.1:{RAY_PORT}"


@pytest.fixture(scope="module")
def pair(
    cluster: RayEnvironmentProvider,  # its root has the wheels then
    other_root: Callable[[str], Settings],
) -> Iterator[Shell]:
    """A shell beside a Ray of two nodes, of the zones a (its head) and b, with a Client server."""
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))
    shell = Shell(other_root("pair").root, folder, Path("/"), variables=AUTH)
    try:
        starts: dict[str, list[object]] = {
            "a": ["--head", "--port", RAY_PORT, "--ray-client-server-port", CLIENT_PORT,
                  "--include-dashboard", "false", "--temp-dir", folder],
            "b": ["--address", ADDRESS],
        }  # fmt: skip
        for zone, joins in starts.items():
            log = folder / f"{zone}.log"
            process = shell.command(
                [
                    BIN / "python", "-u", BIN / "ray", "start", "--block", *joins,
                    "--labels", f"zone={zone}", "--num-cpus", "2", "--disable-usage-stats",
                    "--object-store-memory", "100000000",
                    "--min-worker-port", "0", "--max-worker-port", "0",
                ],
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            wait_until(
                lambda log=log, process=process: (  # type: ignore[misc]
                    "Ray runtime started" in log.read_text() or process.poll() is not None
                ),
                f"the start of zone {zone}",
                within_s=STARTED_S,
            )
            assert process.poll() is None, log.read_text()
        yield shell
    finally:
        for running in shell.processes():
            with suppress(psutil.NoSuchProcess):
                running.kill()
        shell.check_idle()
        shutil.rmtree(folder, ignore_errors=True)


def told_by(shell: Shell, program: str, address: str) -> dict[str, Any]:
    """What a user's program prints as its last line, a JSON document."""
    done = ended(shell.command([BIN / "python", "-c", program, address]), within_s=200)
    assert done.code == 0, done.err
    told: dict[str, Any] = json.loads(done.out.strip().splitlines()[-1])
    return told


#: What each program begins with: `hear` keeps what came of a call, or how it was refused.
BEGIN = """\
import json, sys
import ray
from ray.util.scheduling_strategies import *
from ray_envs import EnvSpec, RayBatchRunner, RayEnvironmentProvider

ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
told = {}

def hear(name, call):
    try:
        told[name] = call()
    except Exception as exc:
        told[name] = [type(exc).__name__, str(exc)]

@ray.remote
def look():
    import sys, ray
    return [sys.prefix, ray.get_runtime_context().get_node_id()]

@ray.remote
class Looker:
    def look(self):
        import sys, ray
        return [sys.prefix, ray.get_runtime_context().get_node_id()]

def ran(**given):
    options = envs.options("pair/six", num_cpus=0, **given)
    return ray.get(look.options(**options).remote(), timeout=60)

told["nodes"] = {n["Labels"]["zone"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
envs = RayEnvironmentProvider.connect()
envs.create("pair/six", EnvSpec(packages=["six==1.16.0"], label_selector={"zone": "a"}))
told["venv"] = envs.prepare("pair/six")["pair/six"]["venv_path"]
"""

STRATEGIES = (
    BEGIN
    + """
a, b = told["nodes"]["a"], told["nodes"]["b"]
hear("soft", lambda: ran(scheduling_strategy=NodeAffinitySchedulingStrategy(b, soft=True)))
hear("spread", lambda: [ran(scheduling_strategy="SPREAD") for _ in range(4)])
hear("node a", lambda: ran(scheduling_strategy=NodeAffinitySchedulingStrategy(a, soft=False)))
hear("node b", lambda: ran(scheduling_strategy=NodeAffinitySchedulingStrategy(b, soft=False)))
for zone in "a", "b":
    group = ray.util.placement_group([{"CPU": 1}], bundle_label_selector=[{"zone": zone}])
    ray.get(group.ready(), timeout=60)
    hear(f"group {zone}", lambda: ran(scheduling_strategy=PlacementGroupSchedulingStrategy(group)))
    ray.util.remove_placement_group(group)
print(json.dumps(told))
"""
)

CLIENT = (
    BEGIN
    + """
options = envs.options("pair/six", num_cpus=0)
hear("task", ran)
hear("actor", lambda: ray.get(Looker.options(**options).remote().look.remote(), timeout=60))
hear("unknown", lambda: envs.options("nobody"))
hear("unsatisfiable", lambda: envs.create("pair/bad", EnvSpec(packages=["six==99"])))
hear("leases", lambda: envs.explain("pair/six")["leases"])
hear("batch", lambda: [r.to_dict() for r in RayBatchRunner(envs).run(
    "platform:node", variants=["pair/six"], cases=[[]])])
told["job"] = ray.get_runtime_context().get_job_id()
envs.close()
told["is still connected"] = ray.is_initialized()
print(json.dumps(told))
"""
)


def test_no_strategy_leads_a_task_to_a_node_that_lacks_its_environment(pair: Shell) -> None:
    told = told_by(pair, STRATEGIES, ADDRESS)
    there = [told["venv"], told["nodes"]["a"]]
    assert (told["soft"], told["node a"], told["group a"]) == (there, there, there)
    assert told["spread"] == [there] * 4
    # At once, with an error: nobody waits for ever, and nobody runs elsewhere.
    assert told["node b"][0] in ("InvalidInput", "NoEligibleNode", "TaskUnschedulableError")
    assert told["group b"][0] == "TaskUnschedulableError"


def test_a_program_that_came_through_ray_client_uses_variants_as_any_other(pair: Shell) -> None:
    told_by(pair, BEGIN + "print(json.dumps(told))", ADDRESS)  # an EnvManager lives
    told = told_by(pair, CLIENT, f"ray://127.0.0.1:{CLIENT_PORT}")
    there = [told["venv"], told["nodes"]["a"]]
    assert (told["task"], told["actor"]) == (there, there)
    assert told["unknown"][0] == "NotFound"
    assert told["unsatisfiable"][0] == "ResolutionFailed"
    assert told["leases"] == [told["job"]]
    assert told["is still connected"] is True
    kind, reason = told["batch"]  # it needs streaming actors, which Ray Client does not have
    assert kind in ("InvalidInput", "RuntimeError")
    assert "Ray Client" in reason
