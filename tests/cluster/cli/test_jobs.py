"""Jobs that are submitted to a real cluster, and the commands that serve it: up, down, runtime-env.

One `ray start --head` with its dashboard, on ports and in a folder of its own. The cluster of
several hosts, with `ray up`, is `tests/multihost/test_cluster_yaml.py`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest

from tests.cluster.cli_tools import (
    BIN,
    Ended,
    Shell,
    calls_in,
    ended,
    free_port,
    lines_of,
    wait_until,
    write_batch,
)

pytestmark = pytest.mark.timeout(240)

OLD = {"id": "old", "packages": ["six==1.16.0"]}
TABLES = {"id": "tables", "packages": ["tabulate==0.9.0"]}

#: A driver that needs the variant's packages itself, and says where it and a task of its run.
SCRIPT = """
import json, sys
import ray, six

@ray.remote
def where():
    import sys, six
    return [sys.prefix, six.__version__]

ray.init(log_to_driver=False, logging_level="ERROR")
print("told", json.dumps([[sys.prefix, six.__version__], ray.get(where.remote())]))
"""


class Cluster:
    """`ray start --head` with its dashboard; `shell` is its user's, who is on the head."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        tmp = folder / "ray"
        tmp.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        self.jobs = f"http://127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(32)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        # these tests may run under `uv run`, which is none of a job's business
        auth["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        self._node = Shell(
            self.root, tmp, Path("/"), variables={**auth, "PATH": f"{BIN}:{os.environ['PATH']}"}
        )
        self.shell = Shell(
            self.root, tmp, folder, owns_ray_tmp=False,
            variables={
                **auth, "RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.jobs,
                "PATH": f"{BIN}:{os.environ['PATH']}",
            },
        )  # fmt: skip
        self._log = tmp / "start.log"
        self._words: list[object] = [
            BIN / "python", "-u", BIN / "ray", "start", "--head", "--block",
            "--num-cpus", "2", "--port", self.address.rpartition(":")[2],
            "--include-dashboard", "true", "--dashboard-port", self.jobs.rpartition(":")[2],
            "--dashboard-agent-listen-port", free_port(),
            "--ray-client-server-port", free_port(), "--temp-dir", tmp,
            "--object-store-memory", "100000000", "--disable-usage-stats",
            "--min-worker-port", "0", "--max-worker-port", "0",
        ]  # fmt: skip
        self._start()

    def _start(self) -> None:
        with self._log.open("w") as log:
            self._process = self._node.command(self._words, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_up(self) -> None:
        """Return once jobs can be submitted; where Ray finds itself too slow, it starts again."""
        asked = urllib.request.Request(f"{self.jobs}/api/version")
        asked.add_header("Authorization", f"Bearer {self.token}")

        def answers() -> bool:
            if self._process.poll() is not None:
                # Ray gives its own processes 30 s, which a busy machine may need longer than.
                assert "timed out during startup" in self._log.read_text(), self._log.read_text()
                self._end()
                self._start()
            if "Ray runtime started" not in self._log.read_text():
                return False
            with suppress(OSError), urllib.request.urlopen(asked, timeout=5):
                return True
            return False

        wait_until(answers, self._log.read_text, within_s=180)

    def stop(self) -> None:
        """End what this has started, and nothing else: `ray stop` would end all Rays."""
        try:
            self.shell.check_idle()
            assert self._process.poll() is None, self._log.read_text()
        finally:
            self._end()

    def _end(self) -> None:
        for process in self._node.processes():
            with suppress(psutil.NoSuchProcess):  # they end one another
                process.kill()
        self._process.wait(30)
        self._node.check_idle()

    def submit(self, *words: str | Path, within_s: float = 120) -> Ended:
        """`ray job submit WORDS…`, once the job has ended."""
        return self.ray("job", "submit", *words, within_s=within_s)

    def ray(self, *words: str | Path, within_s: float = 60) -> Ended:
        return ended(self.shell.command([BIN / "ray", *words]), within_s=within_s)

    def manager(self) -> int | None:
        """The process of the one EnvManager; None where there is none."""
        found = self.actors("EnvManager")
        assert len(found) <= 1, found
        return found[0] if found else None

    def actors(self, name: str) -> list[int]:
        """The processes of the actors of a class."""
        found = []
        for process in self._node.processes():
            with suppress(psutil.Error, IndexError):
                if process.cmdline()[0].split(".")[0] == f"ray::{name}":
                    found.append(int(process.pid))
        return found

    def leases(self) -> list[str]:
        """The keys that are promised to a job."""
        path = self.root / "leases.json"
        return sorted(json.loads(path.read_text())) if path.exists() else []


@pytest.fixture(scope="module")
def cluster(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # short: sockets have 107 bytes
    own_root = tmp_path_factory.mktemp("jobs")
    if (root / "uv-cache").is_dir():  # links, not the folder itself: a collection here prunes it
        subprocess.run(["cp", "-al", root / "uv-cache", own_root / "uv-cache"], check=True)
    running = Cluster(own_root, folder)
    try:
        running.wait_until_up()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)


def told_by(job: Ended) -> Any:
    """What `SCRIPT` printed, as one of the lines of the job's log."""
    lines = [line for line in job.out.splitlines() if line.startswith("told ")]
    assert len(lines) == 1, job.out + job.err
    return json.loads(lines[0][5:])


# -- up, down, runtime-env -------------------------------------------------------------------------


def test_without_a_cluster_every_command_says_how_to_start_one_and_starts_none(
    tmp_path: Path,
) -> None:
    shell = Shell(tmp_path / "root", tmp_path / "ray", tmp_path)
    for words in (["up"], ["runtime-env", "old"]):
        shell(*words).check_refusal(14, "no Ray cluster", "ray start --head", "--address")
    nothing = shell("down")
    assert (nothing.code, nothing.out) == (0, "")
    assert "nothing to stop" in nothing.err
    silent = f"127.0.0.1:{free_port()}"
    shell("down", "--address", silent).check_refusal(14, silent, "--address")
    assert not shell.started_ray()
    shell.check_idle()


def test_up_starts_the_manager_once_and_shows_every_node(cluster: Cluster) -> None:
    first = cluster.shell("up", "--wait", "1", "--json")
    assert first.code == 0, first.err
    manager = cluster.manager()
    assert manager is not None
    told = first.data()
    [node] = told.pop("nodes")
    assert told == {
        "root": str(cluster.root),
        "platform": told["platform"],
        "python": ".".join(map(str, sys.version_info[:3])),
        "ray": told["ray"],
        "is_started": True,
    }
    assert (node["is_head"], node["is_eligible"], node["problem"]) == (True, True, None)

    again = cluster.shell("up")
    assert again.code == 0, again.err
    assert "running already" in again.err
    assert node["node_id"][:12] in again.out
    assert cluster.manager() == manager

    cluster.shell("up", "--wait", "2", "--timeout", "1").check_refusal(13, "1 of 2 nodes")


def test_down_ends_the_manager_and_its_agents_and_keeps_what_is_on_the_disk(
    cluster: Cluster,
) -> None:
    made = cluster.shell("create", "stays", "six==1.16.0", "--json")
    assert made.code == 0, made.err
    assert cluster.manager() is not None
    assert len(cluster.actors("NodeAgent")) == 1

    ended_ = cluster.shell("down", "--json")
    assert ended_.code == 0, ended_.err
    assert [name.partition(":")[0] for name in ended_.data()["ended"]] == [
        "EnvManager",
        "NodeAgent",
    ]
    wait_until(
        lambda: not cluster.actors("EnvManager") + cluster.actors("NodeAgent"), "their processes"
    )
    again = cluster.shell("down", "--json")
    assert (again.code, again.data()) == (0, {"ended": []})
    # Whoever connects next starts the manager again, which finds the environment on the disk.
    there = cluster.shell("runtime-env", "stays", "--no-prepare")
    assert there.code == 0, there.err
    assert made.data()["key"] in there.data()["py_executable"]


# -- jobs ------------------------------------------------------------------------------------------


def test_a_submitted_batch_runs_in_its_environments_and_the_manager_outlives_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    before = cluster.manager()
    folder = tmp_path / "job"
    write_batch(folder, [OLD, TABLES], ["one", "two"])
    results = tmp_path / "results.jsonl"
    job = cluster.submit(
        "--working-dir", folder, "--", "ray-envs", "run", "batch.toml", "--results", results
    )
    assert job.code == 0, job.out + job.err
    assert "succeeded" in job.out
    saw = {(item["variant_id"], item["value"]["saw"]) for item in lines_of(results)}
    assert saw == {("old", "1.16.0"), ("tables", "0.9.0")}
    manager = cluster.manager()
    assert manager is not None
    assert before in (None, manager)
    wait_until(lambda: not cluster.leases(), "the end of the job's leases", within_s=60)


def test_runtime_env_is_a_reason_or_one_line_of_json_that_a_whole_job_runs_in(
    cluster: Cluster, tmp_path: Path
) -> None:
    made = cluster.shell("create", "whole", "six==1.15.0", "--json")
    assert made.code == 0, made.err
    key = made.data()["key"]
    wait_until(lambda: key not in cluster.leases(), "the end of the lease of that command")
    gone = cluster.shell("gc", "--idle-hours", "0", "--include-current", "--json")
    assert key in gone.out, gone.err
    cluster.shell("runtime-env", "unknown").check_refusal(6, "unknown")
    cluster.shell("runtime-env", "whole", "--no-prepare").check_refusal(16, "whole")

    told = cluster.shell("runtime-env", "whole")
    assert told.code == 0, told.err
    assert told.out.count("\n") == 1
    venv = f"{cluster.root}/store/{key}/.venv"
    assert told.data()["py_executable"] == f"{venv}/bin/python"
    assert told.data()["env_vars"]["VIRTUAL_ENV"] == venv

    (tmp_path / "script.py").write_text(SCRIPT)
    job = cluster.submit(
        "--working-dir", tmp_path, "--runtime-env-json", told.out, "--", "python", "script.py"
    )
    assert job.code == 0, job.out + job.err
    assert told_by(job) == [[venv, "1.15.0"]] * 2


def test_a_batch_under_uv_run_inside_a_job_still_runs_in_its_environments(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    write_batch(folder, [OLD], ["one"])
    results = tmp_path / "results.jsonl"
    job = cluster.submit(
        "--working-dir", folder, "--", "env", "-u", "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
        f"VIRTUAL_ENV={sys.prefix}", "uv", "run", "--no-project", "--offline",
        "ray-envs", "run", "batch.toml", "--results", results,
    )  # fmt: skip
    assert job.code == 0, job.out + job.err
    assert [item["value"]["saw"] for item in lines_of(results)] == ["1.16.0"]


def test_a_stopped_job_leaves_no_items_running_and_no_leases(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder, calls = tmp_path / "job", tmp_path / "calls"
    calls.mkdir()
    write_batch(folder, [OLD], ["slow", "next"], calls=calls)
    for word in ("slow", "next"):
        (calls / f"hold-{word}").touch()
    name = f"stopped-{secrets.token_hex(4)}"
    begun = cluster.submit(
        "--no-wait", "--submission-id", name, "--working-dir", folder,
        "--", "ray-envs", "run", "batch.toml",
    )  # fmt: skip
    assert begun.code == 0, begun.out + begun.err
    wait_until(
        lambda: calls_in(calls, "slow") and calls_in(calls, "next"),
        lambda: cluster.ray("job", "logs", name).out,
        within_s=90,
    )
    items = [psutil.Process(int(path.name.rpartition("-")[2])) for path in calls.glob("call-*")]
    assert all(process.is_running() for process in items)
    assert cluster.leases() != []

    stopped = cluster.ray("job", "stop", name)
    assert stopped.code == 0, stopped.out + stopped.err
    wait_until(lambda: not any(p.is_running() for p in items), "the end of its items", within_s=60)
    wait_until(lambda: not cluster.leases(), "the end of its leases", within_s=60)
    assert cluster.manager() is not None
