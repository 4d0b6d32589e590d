"""Build once, fan out, on four hosts: one download for the cluster, the rest from node to node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.multihost.batches import (
    ASK_S,
    PINS,
    READY_S,
    Console,
    Running,
    check,
    measured,
    phases,
    records,
    wait_until_ready,
)
from tests.multihost.host import DRIVER, HOME, ROOT, Host
from tests.multihost.hosts import Hosts

pytestmark = pytest.mark.timeout(900)

#: The variants of the batch, as everybody else calls them.
IDS = [f"batch/{variant}" for variant in PINS]
#: A driver that runs the batch's function itself; its cases are for hosts that are all ready.
RUNNER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from ray_envs import RayBatchRunner, RayEnvironmentProvider
from item import where
variants, n_cases = json.loads(sys.argv[2]), int(sys.argv[3])
with RayEnvironmentProvider.connect() as envs:
    ended = RayBatchRunner(envs).run(
        where, variants=variants, prefix="batch/", timeout_s=200, retries=5,
        cases=[{"case": number, "seconds": 1.0} for number in range(n_cases)],
    )
    print(json.dumps([result.model_dump(mode="json") for result in ended]))
"""
#: A project that is its own build back end: no host but the head reaches an index.
BACK_END = """
import base64, hashlib, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    files = {
        "own.py": "value = 42\\n",
        "own-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: own\\nVersion: 1.0\\n",
        "own-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: own\\n"
        "Root-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    rows = ["own-1.0.dist-info/RECORD,,"]
    with zipfile.ZipFile(f"{folder}/own-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            rows.append(f"{name},sha256={digest.decode().rstrip('=')},{len(text)}")
            archive.writestr(name, text)
        archive.writestr("own-1.0.dist-info/RECORD", "\\n".join(rows) + "\\n")
    return "own-1.0-py3-none-any.whl"
"""
OWN = """[project]
name = "own"
version = "1.0"
[build-system]
requires = []
build-backend = "back_end"
backend-path = ["."]
"""
IMPORTS = "import ray, requests, yaml, google.protobuf, {name}; print({name}.__file__)"


@pytest.fixture(scope="module")
def console(four: Hosts) -> Iterator[Console]:
    console = Console(four)
    yield console
    for name in ("only", "two", "two-more", "none"):  # the batch's variants stay, for the storms
        console.ask(f"envs.delete({name!r}, force=True)")
    console.close()


@pytest.fixture(scope="module")
def batch(four: Hosts) -> list[dict[str, Any]]:
    """The results of a batch that began with empty disks."""
    with measured("a batch over three variants, from nothing"):
        return Running(four.head, four.ray_address, cases=4, seconds=0.5).all_ok()


def hosts_of(results: list[dict[str, Any]]) -> set[str]:
    return {result["value"]["host"] for result in results}


def names(hosts: Hosts) -> set[str]:
    return {host.name for host in hosts}


def bytecode(host: Host, key: str) -> dict[str, tuple[int, int]]:
    """Every compiled file of an environment, with what changes where Python writes it again."""
    folder = host.seen(ROOT / "store" / key / ".venv")
    stats = ((path, path.stat()) for path in folder.rglob("*.pyc"))
    return {str(path.relative_to(folder)): (stat.st_mtime_ns, stat.st_ino) for path, stat in stats}


def wheel_counts(hosts: Hosts) -> dict[str, int]:
    """How often each wheel went out of the index, apart from reads of its metadata."""
    assert hosts.index is not None
    return {name: sent.count for name, sent in hosts.index.downloads.items() if sent.count}


def test_each_wheel_comes_from_the_index_once_and_only_to_the_head(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    with measured("the other hosts, after the batch") as facts:
        wait_until_ready(console, four, IDS)
        made = {
            host.name: {key[:6]: (rec["how"], round(rec["duration_s"], 1))
                        for key, rec in records(host).items()}
            for host in four
        }  # fmt: skip
        facts["made"] = made
    assert four.index is not None
    assert set(four.index.downloads_of) == {four.head.address}
    counts = wheel_counts(four)
    assert set(counts.values()) == {1}, counts
    wanted = {"ray-", "six-1.16.0", "six-1.17.0", "tabulate-0.9.0"}
    assert {w for w in wanted if any(name.startswith(w) for name in counts)} == wanted
    # and each of them reached every host
    keys = {result["key"] for result in batch}
    assert [sorted(records(host)) for host in four] == [sorted(keys)] * 4


def test_a_batch_runs_on_every_host_that_is_ready(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    wait_until_ready(console, four, IDS)
    with measured("24 items of a second on four hosts"):
        results = Running(four.head, four.ray_address, cases=8, seconds=1, results="b").all_ok()
    assert hosts_of(results) == names(four)
    addresses = {host.address: host.name for host in four}
    nodes = {n["NodeID"]: addresses[n["NodeManagerAddress"]] for n in console.ask("ray.nodes()")}
    assert [r for r in results if nodes[r["node_id"]] != r["value"]["host"]] == []
    assert {r["variant_id"]: r["key"] for r in results} == {
        r["variant_id"]: r["key"] for r in batch
    }
    assert set(wheel_counts(four).values()) == {1}


def test_a_driver_on_a_worker_runs_a_batch_on_every_host(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    wait_until_ready(console, four, IDS)
    driver = four[2]
    folder = DRIVER / "mine"
    driver.seen(folder).mkdir(exist_ok=True)
    item = four.head.seen(DRIVER / "batch" / "item.py").read_text()
    driver.seen(folder / "item.py").write_text(item)
    told = driver.driver(RUNNER, folder, json.dumps(list(PINS)), 8, deadline_s=READY_S).data
    check(told, PINS, [f"case-{number}" for number in range(8)])
    assert hosts_of(told) == names(four)


def test_workers_have_fetched_environments_with_byte_code_that_python_takes(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    wait_until_ready(console, four, IDS)
    key = {result["variant_id"]: result["key"] for result in batch}["six17"]
    for host in four:
        how = {"built", "linked"} if host is four.head else {"fetched", "linked"}
        assert {record["how"] for record in records(host).values()} <= how
        assert all(record["is_compiled"] for record in records(host).values())
        before = bytecode(host, key)
        assert len(before) > 1000
        python = ROOT / "store" / key / ".venv/bin/python"
        said = host.run([python, "-c", IMPORTS.format(name="six")], deadline_s=ASK_S).out
        assert said.startswith(str(python.parents[1]))
        assert bytecode(host, key) == before
    assert all(
        "fetched" in {record["how"] for record in records(host).values()} for host in four.workers
    )


def test_environments_of_every_host_are_healthy(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    wait_until_ready(console, four, IDS)
    with measured("doctor, three environments on four hosts"):
        told = console.ask("envs.doctor()", deadline_s=READY_S)
    rows = {(row["variant_id"], row["node_id"]): row for row in told["environments"]}
    assert len(rows) == 3 * 4
    assert [row for row in rows.values() if not row["is_ready"] or row["error"]] == []
    assert [(n, node["error"]) for n, node in told["nodes"].items() if node["error"]] == []
    ran = four.head.run(
        ["ray-envs", "exec", IDS[1], "--", "python", "-c", "import six; print(six.__version__)"],
        deadline_s=ASK_S,
    )
    assert ran.out == "1.17.0\n"


def test_a_variant_for_a_label_is_prepared_and_runs_only_there(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    only = four[2]
    console.ask('envs.create("only", EnvSpec(packages=["toolz==1.0.0"], '
                'label_selector={"host": "h2"}))')  # fmt: skip
    console.ask('envs.prepare("only", timeout_s=200)', deadline_s=READY_S)
    key = console.ask('envs.status("only")')["key"]
    assert set(phases(console, "only")) == {only.address}
    assert [host.name for host in four if key in records(host)] == ["h2"]
    seen = console.ask(
        "ray.get([ray.remote(lambda: (__import__('os').uname().nodename, "
        "__import__('toolz').__version__)).options(**envs.options('only')).remote() "
        "for _ in range(6)], timeout=100)"
    )
    assert seen == [["h2", "1.0.0"]] * 6
    assert four.index is not None
    assert [f for f in four.index.downloads_of[four.head.address] if f.startswith("toolz-")]
    assert set(four.index.downloads_of) == {four.head.address}
    assert wheel_counts(four)["toolz-1.0.0-py3-none-any.whl"] == 1


def test_a_variant_for_two_nodes_is_on_two_and_stays_there(four: Hosts, console: Console) -> None:
    console.ask('envs.create("two", EnvSpec(packages=["tomli==2.0.1"], nodes=2))')
    console.ask('envs.prepare("two", timeout_s=200)', deadline_s=READY_S)
    key = console.ask('envs.status("two")')["key"]
    first = sorted(phases(console, "two"))
    assert len(first) == 2
    having = sorted(host.address for host in four if key in records(host))
    assert having == first
    # whoever asks again, and other wishes, do not move it
    console.ask('envs.create("two-more", EnvSpec(packages=["tomli==2.0.2"], nodes=2))')
    console.ask('envs.prepare("two", "two-more", timeout_s=200)', deadline_s=READY_S)
    assert sorted(phases(console, "two")) == first
    assert sorted(host.address for host in four if key in records(host)) == having
    assert len(phases(console, "two-more")) == 2
    places = {console.ask(
        "ray.get(ray.remote(lambda: __import__('os').uname().nodename)"
        ".options(**envs.options('two')).remote(), timeout=100)") for _ in range(4)}  # fmt: skip
    assert places <= {host.name for host in four if host.address in first}


def test_options_for_a_label_that_no_node_has_name_no_node(four: Hosts, console: Console) -> None:
    console.ask('envs.create("none", EnvSpec(packages=["six==1.16.0"], '
                'label_selector={"host": "h9"}))')  # fmt: skip
    options = console.ask('envs.options("none")')
    assert options["label_selector"] == {"host": "h9"}
    assert "fallback_strategy" not in options
    status = console.ask('envs.status("none")')
    assert (status["status"], status["error"]["type"], status["nodes"]) == (
        "ERROR", "NoEligibleNode", {},
    )  # fmt: skip


ASKING = """
import json, ray
ray.init(log_to_driver=False)
from ray_envs import RayEnvironmentProvider

def ask(variant_id, host):
    import importlib.util, os, sys, six, ray
    def look():
        import os, sys, six
        return os.uname().nodename, sys.prefix, six.__version__
    manager = ray.get_actor("EnvManager", namespace="ray_envs")
    options = ray.get(manager.get_options.remote(
        variant_id=variant_id, job_id=ray.get_runtime_context().get_job_id(),
        options={"label_selector": {"host": host}, "num_cpus": 1}))
    there = ray.get(ray.remote(look).options(**options).remote(), timeout=100)
    return importlib.util.find_spec("ray_envs") is None, look(), there

with RayEnvironmentProvider.connect() as envs:
    options = envs.options("batch/six16", label_selector={"host": "h1"})
    print(json.dumps(ray.get(ray.remote(ask).options(**options).remote("batch/six17", "h3"),
                             timeout=150)))
"""


def test_a_task_on_a_worker_starts_another_one_in_another_variant_on_another_host(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    keys = {result["variant_id"]: result["key"] for result in batch}
    lacks_ours, here, there = four[2].driver(ASKING, deadline_s=READY_S).data
    assert lacks_ours
    assert here == ["h1", str(ROOT / "store" / keys["six16"] / ".venv"), "1.16.0"]
    assert there == ["h3", str(ROOT / "store" / keys["six17"] / ".venv"), "1.17.0"]


def test_a_bundle_makes_a_variant_on_a_machine_without_any_network(
    four: Hosts, console: Console, batch: list[dict[str, Any]]
) -> None:
    keys = {result["variant_id"]: result["key"] for result in batch}
    bundle = Path("six17.bundle")
    four.head.run(["ray-envs", "export", IDS[1], "--bundle", HOME / bundle], deadline_s=ASK_S)
    lonely = four.add()
    lonely.cut()
    packed = four.head.seen(HOME / bundle).read_bytes()
    lonely.seen(HOME / bundle).write_bytes(packed)
    with measured("import of a bundle", mib=len(packed) >> 20):
        ran = lonely.run(
            ["ray-envs", "import", "brought", "--bundle", HOME / bundle, "--json"],
            deadline_s=READY_S,
        )
    told = json.loads(ran.out)
    assert (told["status"], told["key"]) == ("ACTIVE", keys["six17"])
    [record] = records(lonely).values()
    assert record["how"] == "linked"
    said = lonely.run(
        ["ray-envs", "exec", "brought", "--", "python", "-c",
         "import sys, six, ray; print(sys.prefix, six.__version__)"],
        deadline_s=ASK_S,
    ).out.split()  # fmt: skip
    assert said == [str(ROOT / "store" / keys["six17"] / ".venv"), "1.17.0"]
    lonely.close()


def test_a_local_package_reaches_every_host(four: Hosts, console: Console) -> None:
    folder = four.head.seen(DRIVER / "own")
    folder.mkdir()
    (folder / "pyproject.toml").write_text(OWN)
    (folder / "back_end.py").write_text(BACK_END)
    spec = f"EnvSpec(project={str(DRIVER / 'own')!r})"
    status = console.ask(f"envs.create('own', {spec}, wait_s={READY_S})")
    hosts = [four.head, *four.workers[:3]]
    wait_until_ready(console, hosts, ["own"])
    wheels = [sorted(host.seen(ROOT / "wheels").glob("*/*.whl")) for host in hosts]
    assert [[wheel.name for wheel in each] for each in wheels] == [["own-1.0-py3-none-any.whl"]] * 4
    for host in hosts:
        ask = [status["python_path"], "-c", "import own; print(own.value)"]
        told = host.run(ask, deadline_s=ASK_S)
        assert told.out.strip() == "42"
    console.ask("envs.delete('own', force=True)")


def test_at_last_every_host_is_as_ready_as_before(four: Hosts, console: Console) -> None:
    wait_until_ready(console, [four.head, *four.workers[:3]], IDS)
    assert set(wheel_counts(four).values()) == {1}
