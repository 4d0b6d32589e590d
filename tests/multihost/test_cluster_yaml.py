"""`ray up cluster.yaml` over ssh, on hosts that share nothing: nodes, manager, jobs, `ray down`.

The shipped file with three changes: the addresses and the key; and instead of installing ray_envs
and Ray each node links to the environment of these tests, which its disk has already. Where no
rsync is installed, or with RAY_ENVS_TESTS_RSYNC=stand-in, `rsync.py` stands in for it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from tests.cluster.cli_tools import BIN, Ended, Shell, ended, lines_of, wait_until, write_batch
from tests.multihost.host import HOME, Host
from tests.multihost.hosts import Hosts

asyncssh = pytest.importorskip("asyncssh", reason="asyncssh is not installed: no ssh server")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed: no `ray up`"),
]

NEEDS_STAND_IN = (
    shutil.which("rsync") is None or os.environ.get("RAY_ENVS_TESTS_RSYNC") == "stand-in"
)
STAND_IN = Path(__file__).with_name("rsync.py")
CHECKOUT = Path(__file__).resolve().parents[2]
OLD = {"id": "old", "packages": ["six==1.16.0"]}
UP_S, JOB_S = 240.0, 180.0
#: Ray's own knobs: how often the autoscaler looks, and how long a node outlives its head.
QUICK = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}

#: An ssh server for the holder of one key: each command in a shell, without a terminal.
SSH_SERVER = """
import asyncio, asyncssh, os, sys

async def pump(source, sink):
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()

async def feed(source, sink):
    try:
        await pump(source, sink)
    except (asyncssh.Error, OSError):
        pass
    finally:
        sink.close()

async def serve(process):
    words = ["bash", "-c", process.command] if process.command else ["bash", "--login"]
    child = await asyncio.create_subprocess_exec(
        *words, stdin=-1, stdout=-1, stderr=-1, start_new_session=True)
    feeding = asyncio.create_task(feed(process.stdin, child.stdin))
    pumps = [asyncio.create_task(pump(child.stdout, process.stdout)),
             asyncio.create_task(pump(child.stderr, process.stderr))]
    code = await child.wait()
    await asyncio.wait(pumps, timeout=2)  # what it started may keep them open
    process.exit(code if code >= 0 else 255)
    for task in (feeding, *pumps):
        task.cancel()

async def main():
    await asyncssh.listen(
        sys.argv[1], 22, server_host_keys=["host_key"], authorized_client_keys="key.pub",
        process_factory=serve, encoding=None, line_editor=False)
    print("listening", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Launcher:
    """Whoever calls `ray up`: this machine, with a home, a key and a token of its own."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self.folder, self.hosts = folder, hosts
        home = folder / "home"
        (home / ".ray").mkdir(parents=True)
        self.token = secrets.token_hex(32)
        (home / ".ray" / "auth_token").write_text(self.token)
        self._key = folder / "key"
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(self._key))
        self._key.chmod(0o600)
        self._public = key.export_public_key()
        self._host_key = asyncssh.generate_private_key("ssh-ed25519").export_private_key()
        self.jobs = f"http://{hosts.head.address}:8265"
        if NEEDS_STAND_IN:
            put_stand_in(home / "bin")
        self.shell = Shell(
            folder / "no-root", folder / "ray", CHECKOUT,
            variables={
                "HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
                "TMPDIR": str(folder), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_API_SERVER_ADDRESS": self.jobs,
            },
        )  # fmt: skip
        self.file = folder / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(self._filled_in()))

    def _filled_in(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text())
        config["cluster_name"] = self.hosts.tag
        config["provider"]["head_ip"] = self.hosts.head.address
        config["provider"]["worker_ips"] = [host.address for host in self.hosts.workers]
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self._key)}
        install, sync, *rest = config["setup_commands"]
        assert "pip install" in install
        assert "uv sync" in sync
        config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/ray_envs/venv", *rest]
        return config

    def serve_ssh(self, host: Host) -> None:
        """Start a host's ssh server. For ssh and shells, its user is at home on its own disk."""
        home = host.seen(HOME)
        (home / "key.pub").write_bytes(self._public)
        (home / "host_key").write_bytes(self._host_key)
        (home / "host_key").chmod(0o600)
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        for user in users:
            user[5] = str(HOME) if user[0] == "root" else user[5]
        (home / "passwd").write_text("\n".join(map(":".join, users)) + "\n")
        host.run(["mount", "--bind", HOME / "passwd", "/etc/passwd"])
        if NEEDS_STAND_IN:
            put_stand_in(home / "bin")
            (home / ".bashrc").write_text('PATH="$HOME/bin:$PATH"\n')
        log = home / "ssh.log"
        # The harness's own settings would hide what the file sets or forgets.
        ours = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENVS_ROOT")
        unset = [word for name in ours for word in ("-u", name)]
        start = f'exec "$0" -c "$1" {host.address} > ssh.log 2>&1'
        host.start(["env", *unset, "sh", "-c", start, sys.executable, SSH_SERVER], env=QUICK)
        wait_until(lambda: log.exists() and "listening" in log.read_text(), "ssh", within_s=60)

    def ray(self, *words: str | Path, within_s: float = JOB_S) -> Ended:
        return ended(self.shell.command([BIN / "ray", *words]), within_s=within_s)

    def on_head(self, command: str, within_s: float = JOB_S) -> str:
        """What a shell command on the head prints, started with `ray exec`."""
        told = self.ray("exec", "--no-config-cache", self.file, command, within_s=within_s)
        assert told.code == 0, told.out + told.err
        return told.out


def put_stand_in(folder: Path) -> None:
    """Make the command `rsync` of a folder for PATH."""
    folder.mkdir()
    command = folder / "rsync"
    command.write_text(f"#!{sys.executable} -IS\n{STAND_IN.read_text()}")
    command.chmod(0o755)


def ray_processes(host: Host) -> list[str]:
    """The names of what runs of Ray on a host: nodes, actors, workers."""
    found = []
    for process in host.processes():
        with suppress(psutil.Error, IndexError):
            name = Path(process.cmdline()[0].split()[0]).name
            # A dead node's agents of Ray itself try for a minute to tell the dead head.
            if name in ("raylet", "gcs_server") or (
                name.startswith("ray::")
                and name not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
            ):
                found.append(name)
    return found


@pytest.fixture(scope="module")
def cluster(new_hosts: Callable[..., Hosts]) -> Iterator[Launcher]:
    """A cluster of two hosts that `ray up` has made, with its manager."""
    hosts = new_hosts(2)
    for host in hosts.workers:
        host.route_to_index()
    folder = Path(tempfile.mkdtemp(prefix="ru", dir="/tmp"))
    launcher = Launcher(folder, hosts)
    try:
        for host in hosts:
            launcher.serve_ssh(host)
        up = launcher.ray("up", "--yes", "--no-config-cache", launcher.file, within_s=UP_S)
        assert up.code == 0, up.out + up.err
        assert launcher.token not in up.out + up.err, "the token was printed"
        yield launcher
    finally:
        try:
            launcher.shell.check_idle(within_s=60)  # connections of ssh stay for ten seconds
        finally:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def nodes(cluster: Launcher) -> Sequence[Sequence[str]]:
    """The rows of `ray-envs up` once all hosts are there."""
    count = len(list(cluster.hosts))
    text = cluster.on_head(f"ray-envs up --wait {count} --timeout 200", within_s=UP_S)
    rows = [line.split() for line in text.splitlines()]
    return [row for row in rows if len(row) > 2 and row[1].startswith("10.")]


def test_ray_up_brings_every_node_and_the_manager(
    cluster: Launcher, nodes: Sequence[Sequence[str]]
) -> None:
    assert [row[1] for row in nodes] == [host.address for host in cluster.hosts], nodes
    assert all(row[-1] == "ok" for row in nodes), nodes
    for host in cluster.hosts:
        token = host.seen(HOME / ".ray" / "auth_token")
        assert token.read_text() == cluster.token


@pytest.mark.usefixtures("nodes")
def test_a_batch_is_submitted_from_outside_and_its_environment_is_on_every_node(
    cluster: Launcher,
) -> None:
    job = cluster.folder / "job"
    write_batch(job, [OLD], ["one", "two"])
    results = HOME / "results.jsonl"
    told = cluster.ray(
        "job", "submit", "--working-dir", job,
        "--", "ray-envs", "run", "batch.toml", "--results", results,
    )  # fmt: skip
    assert told.code == 0, told.out + told.err
    items = lines_of(cluster.hosts.head.seen(results))
    assert [item["value"]["saw"] for item in items] == ["1.16.0", "1.16.0"]
    [key] = {item["key"] for item in items}
    for host in cluster.hosts:  # the batch began where it was ready first
        record = host.seen(HOME / f".ray_envs/store/{key}/record.json")
        wait_until(record.is_file, f"the environment on {host}", within_s=120)


def test_jobs_without_the_token_are_refused(cluster: Launcher) -> None:
    def answer(token: str) -> int:
        asked = urllib.request.Request(f"{cluster.jobs}/api/jobs/")
        asked.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(asked, timeout=60) as told:
                return int(told.status)
        except urllib.error.HTTPError as exc:
            exc.close()
            return int(exc.code)

    assert (answer(secrets.token_hex(32)), answer(cluster.token)) == (403, 200)


@pytest.mark.usefixtures("nodes")
def test_the_driver_of_a_job_runs_in_a_variant(cluster: Launcher) -> None:
    look = "import sys, six; print('told', [sys.prefix, six.__version__])"
    text = cluster.on_head(
        "ray-envs create whole six==1.16.0 && ray job submit"
        f' --runtime-env-json "$(ray-envs runtime-env whole)" -- python -c "{look}"'
    )
    [told] = [line for line in text.splitlines() if line.startswith("told [")]
    prefix, version = json.loads(told[5:].replace("'", '"'))
    assert version == "1.16.0"
    assert prefix.startswith(os.path.join(HOME, ".ray_envs", "store"))


def test_ray_down_ends_the_cluster(cluster: Launcher) -> None:
    """The last one of this file. Workers leave by themselves some time after the head: `QUICK`."""
    assert all(ray_processes(host) for host in cluster.hosts)
    down = cluster.ray("down", "--yes", cluster.file)
    assert down.code == 0, down.out + down.err
    for host in cluster.hosts:
        wait_until(lambda host=host: not ray_processes(host), f"{host}'s end", within_s=120)  # type: ignore[misc]


# -- the stand-in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "-avz folder/ user@host:there/",
    "--rsh ssh -av folder/ user@host:there/",
    "--rsh ssh -avz --delete folder/ user@host:there/",
    "--rsh ssh -avz --filter dir-merge,-.gitignore folder/ user@host:there/",
    "--rsh ssh -avz --exclude a/b folder/ user@host:there/",
    "--rsh ssh -avz user@host:there/ folder/",
    "--rsh ssh -avz folder user@host:there/",
])  # fmt: skip
def test_the_stand_in_for_rsync_refuses_what_it_does_not_know(words: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = subprocess.run(
        [sys.executable, STAND_IN, *words.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
