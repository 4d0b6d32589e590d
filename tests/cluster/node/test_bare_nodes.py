"""Nodes that have Ray but not what we need: named at `connect()`, and on request equipped.

One cluster of four nodes on this machine. Each has an interpreter of its own, whose packages are
links to those of the tests: all of Ray, and of ours only what its name says.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest
from packaging.requirements import Requirement

from ray_envs.cluster import bootstrap
from tests.cluster.cli_tools import BIN, Shell, ended, free_port, wait_until

VERSION = bootstrap.own_version()
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

#: What every driver begins with: the ids of the nodes, by the names that they were started with.
BEGIN = """
import json, os, sys, time, warnings
import ray
from ray_envs import EnvSpec, RayEnvironmentProvider

def wait_until(holds, within_s=120):
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, holds
        time.sleep(0.05)

def ids():
    return {name: node["NodeID"] for node in ray.nodes() if node["Alive"]
            for name in ("head", "bare", "old", "without_uv") if name in node["Resources"]}

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR",
         namespace="ray_envs")
wait_until(lambda: len(ids()) == 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    envs = RayEnvironmentProvider.connect()
    RayEnvironmentProvider.connect()
told = {"ids": ids(), "warnings": [[w.category.__name__, str(w.message)] for w in caught]}

@ray.remote(num_cpus=1)
def look():
    import os, sys, time
    import six
    time.sleep(0.2)  # the first node is full meanwhile
    return {"node": ray.get_runtime_context().get_node_id(), "prefix": sys.prefix,
            "six": six.__version__, "bootstrap": [p for p in sys.path if "bootstrap" in p],
            "variables": [n for n, v in os.environ.items() if "/bootstrap/" in v]}

envs.create("plain", EnvSpec(packages=["six==1.16.0"]))
told["status"] = envs.prepare("plain", strict=False)
"""

END = """
told["venv"] = envs.environment("plain")["venv_path"]
told["nodes"] = envs.describe()["nodes"]
print(json.dumps(told))
"""

#: As many tasks as all nodes together have room for.
SPREAD = """
told["seen"] = ray.get([look.options(**envs.options("plain")).remote() for _ in range(4)],
                       timeout=120)
"""

#: One task on each node, once before and once after the agent there was killed.
ON_EACH = """
def on_each():
    wait_until(lambda: all(n["is_eligible"] for n in envs.describe()["nodes"].values()))
    envs.prepare("plain")
    return {name: ray.get(look.options(**envs.options("plain", resources={name: 0.01})).remote(),
                          timeout=120) for name in ids()}

def agent(name):
    return ray.get_actor("NodeAgent:" + ids()[name])

def pid(name):
    try:
        return ray.get(agent(name).__ray_call__.remote(lambda self: os.getpid()), timeout=120)
    except (ray.exceptions.RayActorError, ValueError):  # it is between two lives
        return first["bare"]

told["seen"] = on_each()
first = {name: pid(name) for name in ids()}
os.kill(first["bare"], 9)
wait_until(lambda: pid("bare") != first["bare"])
told["again"] = on_each()
told["uv"] = ray.get(agent("without_uv").__ray_call__.remote(
    lambda self: __import__("uv").find_uv_bin()), timeout=120)
"""


class Interpreter:
    """A virtual environment with links to those packages of the tests that it is given."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        home = Path(os.path.realpath(sys.executable))
        self.python.symlink_to(home)
        (folder / "pyvenv.cfg").write_text(
            f"home = {home.parent}\ninclude-system-site-packages = false\n"
        )
        self._site = folder / f"lib/python3.{sys.version_info.minor}/site-packages"
        self._site.mkdir(parents=True)
        self.link("ray")

    def link(self, name: str) -> None:
        """Link a distribution and all that it requires."""
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            with suppress(FileExistsError):
                (self._site / top).symlink_to(str(distribution.locate_file(top)))
        for text in distribution.requires or ():
            requirement = Requirement(text)
            is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if is_wanted and not self._has(requirement.name):
                self.link(requirement.name)

    def _has(self, name: str) -> bool:
        wanted = name.replace("-", "_").lower()
        return any(p.name.lower().startswith(f"{wanted}-") for p in self._site.iterdir())

    def pretend(self, version: str) -> None:
        """Have ray_envs of `version`: this checkout's files under another number."""
        (self._site / "ray_envs").symlink_to(Path(bootstrap.__file__).parents[1])
        info = self._site / f"ray_envs-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: ray-envs\nVersion: {version}\n"
        )


class Cluster:
    """`ray start` with four nodes, in a folder and on a port of its own."""

    def __init__(self, shell: Shell, pythons: dict[str, Path]) -> None:
        self.shell = shell
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._started: list[subprocess.Popen[str]] = []
        self._head = [
            "--head", "--port", port, "--include-dashboard", "false", "--temp-dir", shell.ray_tmp,
        ]  # fmt: skip
        try:
            for name, python in pythons.items():
                wait_until(partial(self._starts, name, python), f"{name} runs", within_s=180)
        except BaseException:
            self.stop()
            raise

    def _starts(self, name: str, python: Path) -> bool:
        """Start a node; false where it did not come up, which Ray allows 30 s for."""
        log = self.shell.ray_tmp / f"{name}.log"
        command = [
            python, "-u", "-m", "ray.scripts.scripts", "start", "--block",
            *(self._head if name == "head" else ["--address", self.address]),
            "--num-cpus", "1", "--resources", json.dumps({name: 1}), "--disable-usage-stats",
            "--object-store-memory", "100000000",
            "--min-worker-port", "0", "--max-worker-port", "0",
        ]  # fmt: skip
        with log.open("w") as out:
            options: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT}
            process = self.shell.command(command, cwd=self.shell.ray_tmp, **options)
        self._started.append(process)

        def is_up() -> bool:
            return "Ray runtime started" in log.read_text()

        wait_until(lambda: is_up() or process.poll() is not None, log.read_text, within_s=120)
        return is_up()

    def driver(self, *parts: str, **variables: str) -> dict[str, Any]:
        """What a program prints as its last line, started where ray_envs is installed."""
        command = [BIN / "python", "-c", "".join((BEGIN, *parts, END))]
        process = self.shell.command(command, variables={"RAY_ADDRESS": self.address, **variables})
        done = ended(process, within_s=200)
        assert done.code == 0, done.err
        told: dict[str, Any] = json.loads(done.out.splitlines()[-1])
        return {**told, "stderr": done.err}

    def stop(self) -> None:
        for process in self.shell.processes():
            with suppress(psutil.NoSuchProcess):  # they end one another
                process.kill()
        for started in self._started:
            started.wait(30)
        self.shell.check_idle()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("bare")
    found = {name: Interpreter(folder / name) for name in ("bare", "old", "without_uv")}
    found["old"].pretend("0.0.1")
    found["without_uv"].pretend(VERSION)
    for name in ("pydantic", "filelock", "packaging", "tomlkit", "click", "rich"):
        found["without_uv"].link(name)
    (folder / "work").mkdir()
    ray_tmp = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))  # short: sockets have 107 bytes
    variables = {**AUTH, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    shell = Shell(folder / "root", ray_tmp, folder / "work", variables=variables)
    pythons = {"head": BIN / "python", **{name: it.python for name, it in found.items()}}
    started = Cluster(shell, pythons)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(ray_tmp)


def named(told: dict[str, Any]) -> dict[str, str]:
    """What was warned of each node, by the name that it was started with."""
    names = {node_id[:12]: name for name, node_id in told["ids"].items()}
    assert {category for category, _ in told["warnings"]} <= {"RayEnvsWarning"}
    return {names[text.split()[1]]: text for _, text in told["warnings"]}


@pytest.fixture(scope="module")
def met(cluster: Cluster) -> dict[str, Any]:
    """What the first driver was told, and saw."""
    return cluster.driver(SPREAD)


@pytest.mark.timeout(600)
def test_connect_names_each_bare_node_once_with_the_line_to_add(met: dict[str, Any]) -> None:
    texts = named(met)
    assert len(met["warnings"]) == 3, "once a process, although it connected twice"
    assert set(texts) == {"bare", "old", "without_uv"}
    assert "has Ray but not ray_envs\n" in texts["bare"]
    assert f"has ray_envs 0.0.1, but the manager is {VERSION}\n" in texts["old"]
    assert "has ray_envs but not uv\n" in texts["without_uv"]
    for name, text in texts.items():
        assert f"{name}/bin/python -m pip install ray-envs=={VERSION}\n" in text


@pytest.mark.timeout(600)
def test_no_task_lands_on_a_bare_node(met: dict[str, Any]) -> None:
    assert {seen["node"] for seen in met["seen"]} == {met["ids"]["head"]}
    assert {seen["prefix"] for seen in met["seen"]} == {met["venv"]}
    eligible = [node_id for node_id, node in met["nodes"].items() if node["is_eligible"]]
    assert eligible == [met["ids"]["head"]]


@pytest.mark.timeout(600)
def test_a_driver_is_told_once_that_the_cluster_lacks_the_plugin(met: dict[str, Any]) -> None:
    line = """export RAY_RUNTIME_ENV_PLUGINS='[{"class": "ray_envs.plugin.EnvironmentPlugin"}]'"""
    assert met["stderr"].count(line) == 1, met["stderr"]


@pytest.mark.timeout(600)
def test_with_bootstrap_bare_nodes_get_the_agent_and_run_environments_that_never_see_it(
    cluster: Cluster, met: dict[str, Any]
) -> None:
    manager_ends = BEGIN.partition("with warnings")[0] + (
        'manager = ray.get_actor("EnvManager")\n'
        "ray.kill(manager)\n"
        "def is_gone():\n"
        "    try:\n"
        '        return not ray.get_actor("EnvManager")\n'
        "    except ValueError:\n"
        "        return True\n"
        "wait_until(is_gone)\n"
    )
    command = [BIN / "python", "-c", manager_ends]
    done = ended(
        cluster.shell.command(command, variables={"RAY_ADDRESS": cluster.address}), within_s=150
    )
    assert done.code == 0, done.err

    told = cluster.driver(ON_EACH, RAY_ENVS_BOOTSTRAP="1")

    assert told["warnings"] == []
    assert told["ids"] == met["ids"]
    for seen in (told["seen"], told["again"]):
        assert {name: look["node"] for name, look in seen.items()} == told["ids"]
        for look in seen.values():
            assert (look["prefix"], look["six"]) == (told["venv"], "1.16.0")
            assert (look["bootstrap"], look["variables"]) == ([], [])
    (brought,) = [p for p in (cluster.shell.root / "bootstrap").iterdir() if p.is_dir()]
    assert told["uv"] == str(brought / "bin" / "uv")
