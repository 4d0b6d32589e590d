"""One host: a set of kernel namespaces with its own processes, network, name and disk.

It sees this machine's file system read-only, like an image that all hosts were made from, and
writes to its own `/tmp` and `/dev/shm`. Its first process ends with the process that made it, and
everything in the host ends with its first process. Neighbour: `hosts` makes the network.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped, unused-ignore]

if TYPE_CHECKING:
    from tests.multihost.hosts import Hosts

#: The same paths on every host, each on the host's own disk: `RAY_ENVS_ROOT`, `HOME`, and where
#: drivers are started.
ROOT, HOME, DRIVER = Path("/tmp/ray_envs"), Path("/tmp/home"), Path("/tmp/driver")
_TOKEN, _FILLER = HOME / "token", ROOT / ".filler"
_CHECKOUT = Path(__file__).resolve().parents[2]

#: Read when a node starts; the class gates tasks on their environments.
PLUGIN = {"RAY_RUNTIME_ENV_PLUGINS": '[{"class": "ray_envs.plugin.EnvironmentPlugin"}]'}
#: Ray's own knobs, for the head: a node that says nothing is dead after about 10 s, not
#: after a minute; a cable may then not be cut for longer either.
FAST_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
#: Time limits, generous: two cores start four nodes and do other things too.
START_S, DRIVER_S, COMMAND_S, _KILL_S = 240.0, 180.0, 60.0, 60.0

#: Runs in fresh namespaces. With SIGCHLD ignored, the kernel reaps what others leave to process 1;
#: `cat` ends with the other end of its stdin.
_BOOT = """
set -e
hostname "$NAME"
for each in $KEPT; do
    mkdir -p "$DISK/${each#/tmp/}"
    mount --bind "$each" "$DISK/${each#/tmp/}"
    mount -o remount,bind,ro "$DISK/${each#/tmp/}"
done
mount --bind "$NAMES" /etc/hosts
mount --rbind "$DISK" /tmp
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p "$ROOT"
[ -z "$ROOT_BYTES" ] || mount -t tmpfs -o size="$ROOT_BYTES" tmpfs "$ROOT"
mount -o remount,bind,ro /
ip link set lo up
echo up
exec env --ignore-signal=CHLD cat >/dev/null
"""

NODES = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps(ray.nodes()))
"""
WAIT_UNTIL_DEAD = """
import sys, time, ray
ray.init(log_to_driver=False)
began = time.monotonic()
while any(node["Alive"] and node["NodeID"] == sys.argv[1] for node in ray.nodes()):
    time.sleep(0.1)
print(time.monotonic() - began)
"""


_TOO_SLOW = "The current node timed out during startup"


class CommandFailed(AssertionError):
    """A command ended with another code than 0, or not in time."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended. `code` is negative, or above 128, where a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """What its last line says, as JSON."""
        return json.loads(self.out.rstrip().rpartition("\n")[2])


class Command:
    """A command that runs in a host. Its output goes to files: it never waits for a reader."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self._argv = argv
        self._files: list[IO[bytes]] = [
            tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` closes it
            for _ in range(2)
        ]
        self._process = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def so_far(self) -> tuple[str, str]:
        """What it has written to stdout and to stderr."""
        said = []
        for file in self._files:
            size = os.fstat(file.fileno()).st_size
            said.append(os.pread(file.fileno(), size, 0).decode(errors="replace"))
        return said[0], said[1]

    def wait(self, deadline_s: float, *, check: bool = True) -> Ran:
        """How it ended. It is killed if it has not ended by then.

        Raises:
            CommandFailed: not in time, or, with `check`, with another code than 0.
        """
        try:
            code = self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise CommandFailed(self._told(f"did not end within {deadline_s:g} s")) from None
        if check and code != 0:
            raise CommandFailed(self._told(f"ended with {code}"))
        return Ran(code, *self.so_far())

    def kill(self) -> None:
        """End it and what it started, apart from what made itself a session of its own."""
        with suppress(ProcessLookupError):
            if self.is_running:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_KILL_S)

    def close(self) -> None:
        self.kill()
        for file in self._files:
            file.close()

    def _told(self, what: str) -> str:
        out, err = self.so_far()
        command = shlex.join(self._argv[self._argv.index("--") + 1 :])
        return f"{command} {what}\n--- stdout\n{out[-4000:]}\n--- stderr\n{err[-4000:]}"


class Host:
    """A machine as far as Ray can tell. Made by `Hosts`, which also gives it its address.

    Args:
        hosts: the network that it is in.
        name: its host name, and the value of the label `host` of its Ray node.
        address: its IPv4 address.
        link: the name of its link on the bridge's side; None to use this machine's own network.
        has_route: whether it reaches the package index.
        root_bytes: the size of a file system for its root; None for this machine's disk. Such a
            root is lost when the host is killed.
    """

    def __init__(
        self,
        hosts: Hosts,
        name: str,
        address: str,
        *,
        link: str | None,
        has_route: bool,
        root_bytes: int | None,
    ) -> None:
        self._hosts, self.name, self.address, self._link = hosts, name, address, link
        self._has_route, self._root_bytes = has_route, root_bytes
        self._folder = hosts.folder / name
        self._disk = self._folder / "tmp"
        self._unshare: subprocess.Popen[str] | None = None
        self._init: psutil.Process | None = None
        self._processes = ""
        self._commands: list[Command] = []

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"

    # -- the machine

    def boot(self) -> None:
        """Start the machine with the disk that it has, and connect it; Ray is not started."""
        for path in (HOME, DRIVER):
            self._on_disk(path).mkdir(parents=True, exist_ok=True)
        self._on_disk(_TOKEN).write_text(self._hosts.token)
        needed = {_CHECKOUT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
        variables = {
            "PATH": os.environ["PATH"],
            "NAME": self.name,
            "DISK": str(self._disk),
            "NAMES": str(self._hosts.names_file),
            "ROOT": str(ROOT),
            "ROOT_BYTES": str(self._root_bytes or ""),
            "KEPT": " ".join(str(path) for path in needed if path.is_relative_to("/tmp")),
        }
        network = ["--net"] if self._link else []
        self._unshare = subprocess.Popen(
            ["unshare", "--mount", "--uts", "--ipc", "--pid", *network, "--fork", "--kill-child",
             "--mount-proc", "sh", "-c", _BOOT, str(self._folder)],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "up\n":
            _, said = self._unshare.communicate()
            raise CommandFailed(f"{self.name} did not boot: {said.strip()}")
        [self._init] = psutil.Process(self._unshare.pid).children()
        self._processes = os.readlink(f"/proc/{self._init.pid}/ns/pid")
        if self._link:
            self._connect(self._link)

    def _connect(self, link: str) -> None:
        self._hosts.ip(f"link add {link} type veth peer name eth0 netns {self._pid}")
        self._hosts.ip(f"link set {link} master {self._hosts.bridge} up")
        self.run(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"])
        self.run(["ip", "link", "set", "eth0", "up"])
        if self._has_route:
            self._route("add")

    @property
    def is_up(self) -> bool:
        return self._unshare is not None

    def kill(self, *, power_loss: bool = False) -> None:
        """End all processes of the machine at once; none is left when this returns.

        Args:
            power_loss: whether it goes without a word. Otherwise the kernel still closes the
                connections of the killed processes, and Ray notices in half the time.
        """
        unshare, self._unshare = self._unshare, None
        if unshare is None:
            return
        if power_loss:
            self._disconnect()
        assert self._init is not None
        with suppress(psutil.NoSuchProcess):
            self._init.kill()
        unshare.communicate(timeout=_KILL_S)  # returns after the last process of the namespace
        self._disconnect()
        for command in self._commands:
            command.kill()

    def close(self) -> None:
        """Kill it, and forget the output of its commands."""
        self.kill()
        for command in self._commands:
            command.close()

    def _disconnect(self) -> None:
        # The kernel takes its time with a dead network namespace; a new link wants the name.
        if self._link:
            self._hosts.ip(f"link delete {self._link}", check=False)

    def processes(self) -> list[psutil.Process]:
        """The processes of the machine, also after it was killed."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == self._processes:
                    found.append(process)
        return found

    # -- commands

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a host, whatever those of the tests are."""
        found = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(HOME),
            "LANG": "C.UTF-8",
            "RAY_ENVS_ROOT": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(_TOKEN),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        if self._hosts.index is not None:
            found["UV_DEFAULT_INDEX"] = self._hosts.index.url
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            if name in os.environ:
                found[name] = os.environ[name]
        return found

    def start(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path = HOME
    ) -> Command:
        """Start a command in the host, with `env` on top of the host's variables."""
        command = Command(
            [*self._enter(), "env", "-C", str(cwd), *map(str, argv)],
            self.environ | dict(env or {}),
            self._hosts.folder,
        )
        self._commands.append(command)
        return command

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = HOME,
        deadline_s: float = COMMAND_S,
        check: bool = True,
    ) -> Ran:
        """Run a command in the host to its end; see `Command.wait`."""
        return self._ended(self.start(argv, env=env, cwd=cwd), deadline_s, check)

    def _enter(self) -> list[str]:
        network = ["--net"] if self._link else []
        return ["nsenter", f"--target={self._pid}", "--mount", "--uts", "--ipc", "--pid", *network,
                "--"]  # fmt: skip

    def _ended(self, command: Command, deadline_s: float, check: bool) -> Ran:
        try:
            return command.wait(deadline_s, check=check)
        finally:
            self._commands.remove(command)
            command.close()

    def shell(self) -> str:
        """The line that starts a shell in the host, where `python FILE` is a driver."""
        variables = self.environ | {"RAY_ADDRESS": self._hosts.ray_address}
        lines = (f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        self.seen(HOME / "variables").write_text("".join(lines))
        return shlex.join([*self._enter(), "env", "-i", "-C", str(HOME), "TERM=xterm",
                           "bash", "--rcfile", str(HOME / "variables")])  # fmt: skip

    def seen(self, path: Path | str) -> Path:
        """Where this process reads and writes `path` of the host, while the host is up."""
        return Path(f"/proc/{self._pid}/root{path}")

    def start_driver(
        self, code: str | Path, *args: object, env: Mapping[str, str] | None = None
    ) -> Command:
        """Start a Python program here, the text or the file `code`, as a driver of the cluster."""
        text = code.read_text() if isinstance(code, Path) else code
        folder = self.seen(DRIVER)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".py", delete=False) as file:
            file.write(text)
        script = DRIVER / Path(file.name).name
        address = {"RAY_ADDRESS": self._hosts.ray_address}
        argv: list[str | Path] = [sys.executable, script, *map(str, args)]
        return self.start(argv, env=address | dict(env or {}), cwd=DRIVER)

    def driver(
        self,
        code: str | Path,
        *args: object,
        env: Mapping[str, str] | None = None,
        deadline_s: float = DRIVER_S,
        check: bool = True,
    ) -> Ran:
        """Run such a driver to its end."""
        return self._ended(self.start_driver(code, *args, env=env), deadline_s, check)

    # -- Ray

    def start_ray(
        self,
        *,
        num_cpus: int = 1,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        plugin: bool = False,
        dashboard: bool = False,
        fast_death: bool = False,
        object_store_bytes: int = 200_000_000,
        python: str | Path = sys.executable,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        deadline_s: float = START_S,
    ) -> None:
        """Start a node of the cluster here; the first host of `Hosts` is the head.

        Where Ray finds itself too slow, all of the host is ended and started again.

        Args:
            labels: of the node, besides `host`.
            plugin: whether the node loads our plugin.
            fast_death: of the head: whether silent nodes are soon dead, see `FAST_DEATH`.
            python: the interpreter whose Ray it is; paths of this machine that are not in `/tmp`.
            env: on top of the host's variables.
            args: more of them for `ray start`.
        """
        is_head = self is self._hosts.head
        where = ["--head", f"--port={self._hosts.ray_port}", f"--include-dashboard={dashboard}"]
        if not self._link:  # beside another Ray of this machine
            where.append(f"--ray-client-server-port={self._hosts.free_port()}")
        marks = {"host": self.name, **(labels or {})}
        joined = ",".join(f"{name}={value}" for name, value in marks.items())
        argv: list[str | Path] = [
            python, "-m", "ray.scripts.scripts", "start",
            *(where if is_head else [f"--address={self._hosts.ray_address}"]),
            f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}",
            f"--resources={json.dumps(dict(resources or {}))}", f"--labels={joined}",
            f"--object-store-memory={object_store_bytes}", *args,
        ]  # fmt: skip
        variables = {
            **(PLUGIN if plugin else {}),
            **(FAST_DEATH if fast_death else {}),
            **(env or {}),
        }
        deadline = time.monotonic() + deadline_s
        while True:
            left_s = deadline - time.monotonic()
            command = self.start(argv, env=variables)
            ran = self._ended(command, left_s, check=False)
            if ran.code == 0:
                return
            # Ray gives its own processes 30 s, which a busy machine may need longer than.
            if _TOO_SLOW not in ran.err or time.monotonic() > deadline - 30:
                raise CommandFailed(f"Ray did not start on {self.name}: {ran.out}{ran.err}")
            self.kill_ray()

    def kill_ray(self) -> None:
        """Kill every process of the machine, apart from its first: it is up, and without Ray."""
        self.run(["sh", "-c", "kill -KILL -1"])
        deadline = time.monotonic() + _KILL_S
        while len(self.processes()) > 1:
            assert time.monotonic() < deadline, f"{self.name} still runs {self.processes()}"
            time.sleep(0.02)

    def node_id(self) -> str:
        """The id of the host's living Ray node."""
        [found] = [node["NodeID"] for node in self._hosts.nodes()
                   if node["Alive"] and node["NodeManagerAddress"] == self.address]  # fmt: skip
        return str(found)

    # -- faults

    def cut(self) -> None:
        """Pull the cable."""
        assert self._link is not None, f"{self.name} is in this machine's own network"
        self._hosts.ip(f"link set {self._link} down")

    def mend(self) -> None:
        """Plug the cable in again."""
        self._hosts.ip(f"link set {self._link} up")

    @contextmanager
    def disconnected(self) -> Iterator[None]:
        self.cut()
        try:
            yield
        finally:
            self.mend()

    def route_to_index(self, *, open: bool = True) -> None:
        """Let the host reach the package index, or no longer; at first only the head does."""
        if open != self._has_route:
            self._has_route = open
            self._route("add" if open else "delete")

    def _route(self, verb: str) -> None:
        assert self._hosts.index is not None
        self.run(["ip", "route", verb, f"{self._hosts.index_address}/32",
                  "via", self._hosts.bridge_address])  # fmt: skip

    def wipe_root(self) -> None:
        """Empty the root folder."""
        self.run(["find", ROOT, "-mindepth", "1", "-delete"])

    def wipe_disk(self) -> None:
        """Give a host that is down a fresh disk."""
        assert not self.is_up
        shutil.rmtree(self._disk)

    def fill_disk(self) -> None:
        """Fill the root's file system, which has `root_bytes`."""
        assert self._root_bytes is not None, "only a root with a size of its own is filled"
        # written until there is no room: others may write meanwhile
        self.run(["dd", "if=/dev/zero", f"of={_FILLER}", "bs=64K"], check=False)

    def free_disk(self) -> None:
        """Take away what `fill_disk` put there."""
        self.seen(_FILLER).unlink(missing_ok=True)

    @property
    def _pid(self) -> int:
        assert self._init is not None
        assert self.is_up, f"{self.name} is down"
        return int(self._init.pid)

    def _on_disk(self, path: Path) -> Path:
        return self._disk / path.relative_to("/tmp")
