"""Several hosts on this machine that share nothing but a network, a package index, and Ray on them.

One bridge with a /24 of its own; no host has a route to anything else, apart from the head's to the
index. Links and folders carry the id of the process that made them, and go with `Hosts`; what a
killed process left is swept by the next one. By hand: `python -m tests.multihost.hosts --hosts 4`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from tests.multihost.host import DRIVER_S, NODES, WAIT_UNTIL_DEAD, Command, Host, Ran
from tests.multihost.index import RecordingIndex, UpstreamMissing, upstream_index

#: What `Hosts` make is called `re<their process>-<two hex digits>`, links with `b` or `v<n>` behind
#: it: 15 characters are all that a link's name may have.
_OURS = re.compile(r"(re(\d+)-[0-9a-f]{2})(b|v\d+)?")
_NUMBERS = itertools.count()
_TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname", "env", "dd")


class Unable(Exception):
    """This machine cannot make hosts; the text says what is missing."""


class Hosts:
    """Hosts `h0`, `h1`, … on a bridge; the first is the head. A context manager.

    Args:
        n_hosts: how many boot at once; `add` boots more.
        with_index: whether there is a package index, which the head alone has a route to.
        head_in_main: whether the head uses this machine's own network, with its way out.
        root_bytes: the size of each host's root; None for what this machine's disk has.

    Raises:
        Unable: this machine has no namespaces for us, or, with an index, none that uv reaches.
    """

    def __init__(
        self,
        n_hosts: int = 4,
        *,
        with_index: bool = True,
        head_in_main: bool = False,
        root_bytes: int | None = None,
    ) -> None:
        self._n_hosts, self._with_index, self._root_bytes = n_hosts, with_index, root_bytes
        self._head_in_main = head_in_main
        self.tag = _new_tag()
        self.bridge = f"{self.tag}b"
        self.token = secrets.token_hex(32)
        self.index: RecordingIndex | None = None
        self._all: list[Host] = []

    def __enter__(self) -> Hosts:
        if reason := why_not():
            raise Unable(reason)
        sweep()
        upstream = _upstream() if self._with_index else ""
        self.folder = Path(tempfile.gettempdir()) / self.tag
        self.folder.mkdir(mode=0o700)
        try:
            self._connect()
            if upstream:
                self.index = RecordingIndex(self.index_address, self.folder, upstream)
            for _ in range(self._n_hosts):
                self.add(root_bytes=self._root_bytes)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Host:
        return self._all[number]

    def _connect(self) -> None:
        high, low = _unused_net()
        self._net = f"10.{high}.{low}"
        self.bridge_address = f"{self._net}.254"
        # Not in the hosts' own /24: who has no route to it gets "network is unreachable".
        self.index_address = f"10.{high + 64}.{low}.1"
        self.names_file = self.folder / "hosts"
        self.names_file.write_text("127.0.0.1 localhost\n::1 localhost\n")
        self.ip(f"link add {self.bridge} type bridge")
        self.ip(f"address add {self.bridge_address}/24 dev {self.bridge}")
        self.ip(f"address add {self.index_address}/32 dev {self.bridge}")
        self.ip(f"link set {self.bridge} up")

    def close(self) -> None:
        """End all hosts, and remove all that was made for them."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(Host.close, self._all))
        if self.index is not None:
            self.index.close()
        self.ip(f"link delete {self.bridge}", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ip(self, command: str, *, check: bool = True) -> None:
        """Run `ip` in this machine's own network."""
        _ip(command, check=check)

    # -- hosts

    @property
    def head(self) -> Host:
        return self._all[0]

    @property
    def workers(self) -> list[Host]:
        return self._all[1:]

    def add(self, *, root_bytes: int | None = None) -> Host:
        """Boot one more host, with a fresh disk; Ray is not started on it."""
        number = len(self._all)
        is_in_main = self._head_in_main and number == 0
        address = self.bridge_address if is_in_main else f"{self._net}.{number + 1}"
        link = None if is_in_main else f"{self.tag}v{number}"
        if number == 0:
            self.ray_port = self.free_port() if is_in_main else 6379
            self.ray_address = f"{address}:{self.ray_port}"
        with self.names_file.open("a") as file:
            file.write(f"{address} h{number}\n")
        has_route = number == 0 and link is not None and self.index is not None
        host = Host(
            self, f"h{number}", address, link=link, has_route=has_route, root_bytes=root_bytes
        )
        self._all.append(host)
        host.boot()
        return host

    def start_ray(self, *, plugin: bool = False, fast_death: bool = False, **options: Any) -> None:
        """Start a node on each host, all workers at once; see `Host.start_ray`."""
        self.head.start_ray(plugin=plugin, fast_death=fast_death, **options)
        with ThreadPoolExecutor() as pool:
            began = [pool.submit(host.start_ray, plugin=plugin, **options) for host in self.workers]
        for each in began:
            each.result()

    def free_port(self) -> int:
        """A port that nobody has on the bridge's address."""
        with socket.create_server((self.bridge_address, 0)) as server:
            return int(server.getsockname()[1])

    # -- the cluster

    def driver(self, code: str | Path, *args: object, **options: Any) -> Ran:
        """Run a Python program on the head; see `Host.driver`."""
        return self.head.driver(code, *args, **options)

    def start_driver(self, code: str | Path, *args: object, **options: Any) -> Command:
        return self.head.start_driver(code, *args, **options)

    def nodes(self) -> list[dict[str, Any]]:
        """What `ray.nodes()` says on the head."""
        return list(self.driver(NODES).data)

    def wait_until_dead(self, node_id: str, *, deadline_s: float = DRIVER_S) -> float:
        """Return once Ray takes a node for dead: how many seconds that took from here on."""
        return float(self.driver(WAIT_UNTIL_DEAD, node_id, deadline_s=deadline_s).data)


def why_not() -> str:
    """What this machine lacks to make hosts; empty if nothing."""
    if not sys.platform.startswith("linux"):
        return "network and mount namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    tag = _new_tag()
    tried = (
        ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc",
         "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
        ["ip", "link", "add", f"{tag}b", "type", "bridge"],
        ["ip", "link", "add", f"{tag}v0", "type", "veth"],
    )  # fmt: skip
    try:
        for argv in tried:
            ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
            if ended.returncode != 0:
                return f"`{' '.join(argv)}` is refused: {ended.stderr.strip()}"
    finally:
        for name in (f"{tag}b", f"{tag}v0"):
            _ip(f"link delete {name}", check=False)
    return ""


def left(tag: str | None = None) -> list[str]:
    """What is there of the `Hosts` with this tag, or of all whose process is dead."""
    return [f"{kind} {name}" for kind, name in _things(tag)]


def sweep() -> None:
    """Remove what killed runs left."""
    things = list(_things(None))
    for kind, name in things:
        if kind == "process":
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(name)).kill()
        elif kind == "link":
            _ip(f"link delete {name}", check=False)
    for kind, name in things:
        if kind == "folder":
            shutil.rmtree(name, ignore_errors=True)


def _things(tag: str | None) -> Iterator[tuple[str, str]]:
    def is_meant(name: str) -> bool:
        found = _OURS.fullmatch(name)
        if found is None:
            return False
        return found[1] == tag if tag is not None else not psutil.pid_exists(int(found[2]))

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if words[:1] == ["unshare"] and is_meant(Path(words[-1]).parent.name):
                yield "process", str(process.pid)
    for link in json.loads(_ip("-json link show")):
        if is_meant(link["ifname"]):
            yield "link", link["ifname"]
    for folder in Path(tempfile.gettempdir()).iterdir():
        if is_meant(folder.name):
            yield "folder", str(folder)


def _new_tag() -> str:
    """A tag that no other `Hosts` of this process has."""
    while True:
        tag = f"re{os.getpid()}-{next(_NUMBERS) % 256:02x}"
        if not (Path(tempfile.gettempdir()) / tag).exists():
            return tag


def _ip(command: str, *, check: bool = True) -> str:
    ended = subprocess.run(
        ["ip", *command.split()], capture_output=True, text=True, timeout=60, check=False
    )
    if check and ended.returncode != 0:
        raise Unable(f"`ip {command}` ended with {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout


def _unused_net() -> tuple[int, int]:
    """The middle of a network 10.<high>.<low>.0/24 that no link of this machine has."""
    taken = {
        tuple(address["local"].split(".")[1:3])
        for link in json.loads(_ip("-json -4 address show"))
        for address in link["addr_info"]
    }
    while True:
        high, low = random.randrange(64, 128), random.randrange(256)
        if (str(high), str(low)) not in taken:
            return high, low


@functools.cache
def _upstream() -> str:
    try:
        return upstream_index()
    except UpstreamMissing as exc:
        raise Unable(str(exc)) from None


def main() -> None:
    """Start hosts with Ray on them, say how to use them, and end them with Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.multihost.hosts")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--root-bytes", type=int, help="the size of each host's root")
    parser.add_argument("--head-in-main", action="store_true", help="the head may go anywhere")
    parser.add_argument("--plugin", action="store_true", help="load the plugin on every node")
    parser.add_argument(
        "--fast-death", action="store_true", help="silent nodes die within about 10 s"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    with Hosts(given.hosts, head_in_main=given.head_in_main, root_bytes=given.root_bytes) as hosts:
        print(f"booted in {time.monotonic() - began:.1f} s, starting Ray …", flush=True)
        hosts.start_ray(plugin=given.plugin, fast_death=given.fast_death)
        print(f"Ray on {given.hosts} hosts after {time.monotonic() - began:.1f} s")
        for host in hosts:
            pss = sum(process.memory_full_info().pss for process in host.processes())
            print(f"\n{host.name} {host.address}, {pss >> 20} MiB. A shell in it:\n  "
                  f"{host.shell()}")  # fmt: skip
        print("\nCtrl-C ends them.", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
