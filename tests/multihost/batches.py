"""Batches on hosts, watched while they go on, and questions to their cluster.

What faults hosts have is the tests' business; here is what every one of them asks afterwards: did
each item end once, in its own environment, and is every live node ready again.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.multihost.host import DRIVER, HOME, ROOT, Command, Host
from tests.multihost.hosts import Hosts

#: Generous: two cores run all hosts, and other things too.
READY_S, BATCH_S, ASK_S = 240.0, 240.0, 120.0
_LOOK_S = 0.2

#: What a variant installs besides Ray: one small wheel each, of which no environment has another.
PINS = {"six16": "six==1.16.0", "six17": "six==1.17.0", "tables": "tabulate==0.9.0"}

_ITEM = """
import os, sys, time
from importlib.metadata import PackageNotFoundError, version

def where(case, seconds, word=""):
    found = {}
    for name in ("six", "tabulate", "toolz", "tomli"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    until = time.monotonic() + seconds
    while time.monotonic() < until and not os.path.exists("/tmp/home/hurry-" + word):
        time.sleep(0.1)
    return {"host": os.uname().nodename, "prefix": sys.prefix, "versions": found}
"""

_SOCKET = HOME / "console"
#: Evaluates each line that it is sent, in a thread of its own.
_CONSOLE = """
import json, os, socketserver, sys, ray
from ray_envs import EnvSpec, RayEnvironmentProvider
ray.init(log_to_driver=False)
envs = RayEnvironmentProvider.connect()

class Asked(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            told = {"value": eval(json.loads(self.rfile.readline()))}
        except BaseException as exc:
            told = {"error": f"{type(exc).__name__}: {exc}"}
        self.wfile.write(json.dumps(told, default=str).encode())

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

Server(sys.argv[1], Asked).serve_forever()
"""


class Refused(AssertionError):
    """The console raised what the text says."""


class Console:
    """A driver that asks the cluster for the tests: `envs` is its provider.

    It lives as long as its host: looking at a cluster need not start a driver each time.
    """

    def __init__(self, hosts: Hosts, host: Host | None = None) -> None:
        self._host = host or hosts.head
        self._path = self._host.seen(_SOCKET)
        self._path.unlink(missing_ok=True)
        self._command = self._host.start_driver(_CONSOLE, _SOCKET)
        wait_until(lambda: self._path.exists() or not self._command.is_running, "a console", ASK_S)
        if not self._command.is_running:
            self._command.wait(0)

    def ask(self, expression: str, *, deadline_s: float = ASK_S) -> Any:
        """The value of a Python expression there.

        Raises:
            Refused: it raised something.
        """
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(deadline_s)
            asking.connect(str(self._path))
            asking.sendall(json.dumps(expression).encode() + b"\n")
            parts = []
            while part := asking.recv(1 << 16):
                parts.append(part)
        told = json.loads(b"".join(parts))
        if "error" in told:
            raise Refused(f"{expression}: {told['error']}")
        return told["value"]

    def close(self) -> None:
        self._command.kill()


def wait_until(holds: Callable[[], bool], what: str, within_s: float = READY_S) -> float:
    """Return once it holds: after how many seconds."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(_LOOK_S)
    return time.monotonic() - began


def phases(console: Console, variant_id: str) -> dict[str, dict[str, Any]]:
    """What each node says of a variant, by its address."""
    nodes = console.ask(f"envs.status({variant_id!r})")["nodes"]
    return {node["address"]: node for node in nodes.values()}


def wait_until_ready(
    console: Console,
    hosts: Iterable[Host],
    variant_ids: Iterable[str],
    *,
    within_s: float = READY_S,
) -> float:
    """Return once these hosts, and no others, have all variants: after how many seconds."""
    wanted = sorted(host.address for host in hosts)
    told: dict[str, Any] = {}

    def is_ready() -> bool:
        for variant_id in variant_ids:
            found = phases(console, variant_id)
            told[variant_id] = found
            if sorted(a for a, node in found.items() if node["phase"] == "ready") != wanted:
                return False
            if sorted(found) != wanted:
                return False
        return True

    try:
        return wait_until(is_ready, f"ready on {wanted}", within_s)
    except pytest.fail.Exception as exc:
        raise pytest.fail.Exception(f"{exc}: {json.dumps(told, indent=1)[-6000:]}") from None


def records(host: Host) -> dict[str, dict[str, Any]]:
    """What the disk of a host says it has ready, by key."""
    found = {}
    for file in host.seen(ROOT / "store").glob("*/record.json"):
        found[file.parent.name] = json.loads(file.read_text())
    return found


def processes(host: Host, title: str) -> list[int]:
    """The ids, in this machine, of the processes in a host whose title begins so."""
    return [
        process.pid for process in host.processes() if " ".join(process.cmdline()).startswith(title)
    ]


class Running:
    """A `ray-envs run` in a host, whose results are seen as they are written.

    Args:
        host: where the command runs.
        cases: how many cases each of `pins` has.
        seconds: how long an item takes.
        name: of the batch: its variants are `name/…`.
        results: of its results file, and what `hurry` calls it.
        is_resumed: go on with what an earlier one of this name has written.
        timeout_s: of an item.
    """

    def __init__(
        self,
        host: Host,
        ray_address: str,
        *,
        cases: int,
        seconds: float,
        pins: Mapping[str, str] = PINS,
        name: str = "batch",
        results: str = "results",
        is_resumed: bool = False,
        timeout_s: float = BATCH_S,
    ) -> None:
        self.pins, self.n_items = dict(pins), cases * len(pins)
        self._cases = [f"c{number}" for number in range(cases)]
        folder = DRIVER / name
        host.seen(folder).mkdir(exist_ok=True)
        lines = [f'name = "{name}"', 'entrypoint = "item:where"', 'code = "."']
        lines += ["[defaults]", "num_cpus = 1", f"timeout_s = {timeout_s:g}", "retries = 5"]
        for variant, pin in self.pins.items():
            lines += ["[[variants]]", f'id = "{variant}"', f"packages = {json.dumps(pin.split())}"]
        for case in self._cases:
            lines += ["[[cases]]", f'id = "{case}"']
            lines += [f'kwargs = {{ case = "{case}", seconds = {seconds}, word = "{results}" }}']
        host.seen(folder / "batch.toml").write_text("\n".join(lines) + "\n")
        host.seen(folder / "item.py").write_text(_ITEM)
        self._word, self._host, self._path = results, host, folder / f"{results}.jsonl"
        argv: list[str | Path] = ["ray-envs", "run", folder / "batch.toml", "--json"]
        argv += ["--results", self._path, *(["--resume"] if is_resumed else [])]
        self.command: Command = host.start(argv, env={"RAY_ADDRESS": ray_address}, cwd=DRIVER)

    def so_far(self) -> list[dict[str, Any]]:
        """The results that are written."""
        file = self._host.seen(self._path)
        if not file.exists():
            return []
        whole = file.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def until(self, n_items: int, within_s: float = BATCH_S) -> list[dict[str, Any]]:
        """The results once there are `n_items`, while others are still to come."""
        wait_until(
            lambda: len(self.so_far()) >= n_items or not self.command.is_running,
            f"{n_items} results of {self.n_items}",
            within_s,
        )
        found = self.so_far()
        if not self.command.is_running:
            ran = self.command.wait(0, check=False)
            pytest.fail(f"it had ended before the storm: {ran.code}\n{ran.out}\n{ran.err}")
        return found

    def hurry(self, hosts: Iterable[Host]) -> None:
        """Let the items that are left take no time there: the storm is over."""
        for host in hosts:
            host.seen(HOME / f"hurry-{self._word}").touch()

    def all_ok(self, within_s: float = BATCH_S) -> list[dict[str, Any]]:
        """The results, all of which must be there once, and be what their variants are."""
        ran = self.command.wait(within_s, check=False)
        assert ran.out.strip(), ran.err
        told = json.loads(ran.out)
        check(told["results"], self.pins, self._cases)
        assert (ran.code, told["failed"]) == (0, 0)
        return list(told["results"])


def check(
    results: Sequence[Mapping[str, Any]], pins: Mapping[str, str], cases: Iterable[str]
) -> None:
    """Make sure that every item ended in exactly one good result, in its variant's environment."""
    wanted = Counter((variant, case) for variant in pins for case in cases)
    assert Counter((result["variant_id"], result["case_id"]) for result in results) == wanted
    failed = [result for result in results if not result["ok"]]
    assert not failed, json.dumps(failed, indent=1)[:6000]
    keys: dict[str, set[str]] = {}
    for result in results:
        keys.setdefault(result["variant_id"], set()).add(result["key"])
        value = result["value"]
        assert value["prefix"] == str(ROOT / "store" / result["key"] / ".venv"), result
        pinned = dict(pin.split("==") for pin in pins[result["variant_id"]].split())
        assert value["versions"] == pinned, result
    assert all(len(found) == 1 for found in keys.values()), keys
    assert len(set.union(*keys.values())) == len(pins)


@contextmanager
def measured(what: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Prints what the block has measured; pytest shows it with `-s` or `-rP`."""
    began = time.monotonic()
    yield facts
    facts["seconds"] = round(time.monotonic() - began, 1)
    print(f"{what}: {json.dumps(facts)}")
