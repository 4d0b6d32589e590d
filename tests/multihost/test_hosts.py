"""The hosts themselves: own disks, no way out, deaths and cut cables as Ray sees them, no trace."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from uv import find_uv_bin

from tests.multihost.host import ROOT, CommandFailed, Host
from tests.multihost.hosts import Hosts, left, sweep
from tests.multihost.index import Downloaded, upstream_index

#: Two starts of Ray on a busy machine fit into it.
pytestmark = [pytest.mark.timeout(600), pytest.mark.thorough]

#: How long what the kernel does may take: closing, removing.
_GONE_S = 30.0
#: How long Ray may take to see a silent node as dead, with `fast_death`; it takes about 10 s.
_DEAD_S = 60.0

#: Prints what hinders a connection to each "host:port", or null.
CONNECT = """
import json, socket, sys
said = []
for each in sys.argv[1:]:
    host, _, port = each.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        said.append(None)
    except OSError as exc:
        said.append(type(exc).__name__ + ": " + str(exc))
print(json.dumps(said))
"""
ONE_TASK_A_HOST = """
import json, os, sys, ray
ray.init(log_to_driver=False)

@ray.remote
def where():
    return os.uname().nodename, os.environ["RAY_ENVS_ROOT"]

asked = [where.options(label_selector={"host": name}).remote() for name in sys.argv[1:]]
print(json.dumps(ray.get(asked, timeout=120)))
"""


def connected(host: Host, *addresses: str) -> list[str | None]:
    return list(host.run([sys.executable, "-c", CONNECT, *addresses]).data)


def install(host: Host, name: str, *, check: bool = True) -> int:
    """Install one wheel from the index, with a cache of its own."""
    folder = host.run(["mktemp", "-d"]).out.strip()
    argv = [find_uv_bin(), "pip", "install", "--python", sys.executable, "--target",
            f"{folder}/target", "--cache-dir", f"{folder}/cache", name]  # fmt: skip
    return host.run(argv, env={"UV_HTTP_RETRIES": "0"}, check=check).code


def commands(host: Host) -> str:
    """The command lines of all that runs in the host."""
    return host.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"], check=False).out


def wait_until(holds: Callable[[], bool], what: str, within_s: float = _GONE_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(0.05)


# -- hosts that stay as they are


def test_a_host_writes_to_no_disk_but_its_own(hosts: Hosts) -> None:
    for folder in (ROOT, Path("/tmp"), Path("/dev/shm")):
        for host in hosts:
            host.run(["sh", "-c", f"echo {host.name} > {folder}/{hosts.tag}-{host.name}"])
        for host in hosts:
            found = [path.name for path in host.seen(folder).glob(f"{hosts.tag}-*")]
            assert found == [f"{hosts.tag}-{host.name}"], (host, folder)
        assert list(folder.glob(f"{hosts.tag}-*")) == []
    ours = Path(__file__).parent / "written"
    assert "Read-only" in hosts[1].run(["touch", ours], check=False).err
    assert not ours.exists()


def test_only_the_head_reaches_the_index_and_nothing_reaches_further(hosts: Hosts) -> None:
    assert hosts.index is not None
    name = urlsplit(upstream_index()).hostname
    known = socket.gethostbyname(str(name))
    index = hosts.index.base.removeprefix("http://")
    outside = [f"{known}:443", f"{name}:443"]
    for address in (index, *outside):  # all of it is there
        socket.create_connection(
            (address.rpartition(":")[0], int(address.rpartition(":")[2]))
        ).close()
    assert connected(hosts.head, index) == [None]
    for worker in hosts.workers:
        assert str(connected(worker, index)).count("Network is unreachable") == 1
        # the network itself is there
        assert connected(worker, hosts.ray_address) == [None]
    for host in hosts:
        direct, by_name = connected(host, *outside)
        assert "Network is unreachable" in str(direct)
        assert "gaierror" in str(by_name)


def test_each_host_is_a_node_with_its_address_and_its_name_as_a_label(hosts: Hosts) -> None:
    nodes = {node["NodeManagerAddress"]: node for node in hosts.nodes()}
    assert sorted(nodes) == sorted(host.address for host in hosts)
    for host in hosts:
        node = nodes[host.address]
        assert (node["Alive"], node["Labels"]["host"], node["Resources"]["CPU"]) == (
            True, host.name, 1,
        )  # fmt: skip
        assert host.node_id() == node["NodeID"]


def test_a_task_runs_on_the_host_that_its_label_names(hosts: Hosts) -> None:
    names = [host.name for host in hosts]
    told = hosts.driver(ONE_TASK_A_HOST, *names).data
    assert told == [[name, str(ROOT)] for name in names]


def test_a_driver_with_another_token_is_not_let_in(hosts: Hosts) -> None:
    # as it is for a driver of this machine, whatever token that has
    hosts.head.seen("/tmp/home/other").write_text("0" * 64)
    ended = hosts.driver("import ray; ray.init()", env={"RAY_AUTH_TOKEN_PATH": "/tmp/home/other"},
                         check=False)  # fmt: skip
    assert ended.code != 0
    assert "InvalidAuthToken" in ended.err


def test_a_driver_that_does_not_end_is_killed_and_shown(hosts: Hosts) -> None:
    started = hosts.start_driver("import time; print('so far', flush=True); time.sleep(600)")
    wait_until(lambda: started.so_far()[0] == "so far\n", "the first words of a driver")
    assert "/tmp/driver/" in commands(hosts.head)
    with pytest.raises(CommandFailed, match=r"did not end within 0\.1 s\n--- stdout\nso far"):
        started.wait(0.1)
    wait_until(lambda: "/tmp/driver/" not in commands(hosts.head), "the end of the driver")


def test_the_index_counts_what_goes_out_of_each_file(hosts: Hosts) -> None:
    index, head, worker = hosts.index, hosts.head, hosts.workers[0]
    assert index is not None
    index.forget()
    assert install(worker, "six==1.17.0", check=False) != 0
    assert index.downloads == {}
    install(head, "six==1.17.0")
    [(name, once)] = index.downloads.items()
    assert name.startswith("six-1.17.0-")
    assert once.count == 1
    worker.route_to_index()
    try:
        install(worker, "six==1.17.0")
    finally:
        worker.route_to_index(open=False)
    assert index.downloads == {name: Downloaded(2, 2 * once.n_bytes)}
    assert index.downloads_of == {head.address: {name: once}, worker.address: {name: once}}
    with index.unreachable():
        assert install(head, "six==1.17.0", check=False) != 0
    install(head, "six==1.17.0")
    assert index.downloads[name].count == 3


def test_a_node_outlives_a_cable_that_is_cut_for_seconds(hosts: Hosts) -> None:
    host = hosts.workers[-1]
    before = host.node_id()
    with host.disconnected():
        # takes the three seconds of its time-out, or as long as the neighbour is looked for
        assert connected(hosts.head, f"{host.address}:22") != [None]
        assert "refused" not in str(connected(hosts.head, f"{host.address}:22"))
    wait_until(lambda: "refused" in str(connected(hosts.head, f"{host.address}:22")), "mended")
    assert hosts.driver(ONE_TASK_A_HOST, host.name).data == [[host.name, str(ROOT)]]
    assert host.node_id() == before


# -- hosts with faults


@pytest.fixture(scope="module")
def faulty(new_hosts: Callable[..., Hosts]) -> Hosts:
    hosts = new_hosts(3, with_index=False, root_bytes=64 << 20)
    hosts.start_ray(fast_death=True)
    return hosts


@pytest.mark.parametrize("power_loss", [False, True])
def test_a_killed_host_is_gone_at_once_and_dead_to_ray_soon(
    faulty: Hosts, power_loss: bool
) -> None:
    host = faulty[1]
    node_id = host.node_id()
    host.seen("/tmp/kept").write_text("x")
    assert len(host.processes()) > 3
    host.kill(power_loss=power_loss)
    assert host.processes() == []
    faulty.wait_until_dead(node_id, deadline_s=_DEAD_S)
    if power_loss:
        host.wipe_disk()
    host.boot()
    host.start_ray()
    assert host.node_id() != node_id
    assert host.seen("/tmp/kept").exists() != power_loss
    assert faulty.driver(ONE_TASK_A_HOST, host.name).data == [[host.name, str(ROOT)]]


def test_a_host_whose_ray_is_killed_stays_up(faulty: Hosts) -> None:
    host = faulty[2]
    node_id = host.node_id()
    host.kill_ray()
    assert [process.name() for process in host.processes()] == ["cat"]
    faulty.wait_until_dead(node_id, deadline_s=_DEAD_S)
    host.start_ray()
    assert host.node_id() != node_id


def test_a_full_disk_has_no_room_until_it_is_freed(faulty: Hosts) -> None:
    host = faulty[1]
    host.fill_disk()
    assert "No space left" in host.run(["cp", "/proc/self/status", ROOT], check=False).err
    faulty[2].run(["cp", "/proc/self/status", ROOT])
    host.free_disk()
    host.run(["cp", "/proc/self/status", ROOT])
    host.wipe_root()
    assert list(host.seen(ROOT).iterdir()) == []


def test_a_host_that_is_added_becomes_a_node(faulty: Hosts) -> None:
    host = faulty.add()
    host.start_ray(num_cpus=2, labels={"rack": "b"}, resources={"disk": 3})
    [node] = [node for node in faulty.nodes() if node["NodeID"] == host.node_id()]
    assert node["Labels"]["rack"] == "b"
    assert (node["Resources"]["CPU"], node["Resources"]["disk"]) == (2, 3)


# -- without Ray


def test_a_head_in_this_machines_network_reaches_what_the_machine_reaches(namespaces: None) -> None:
    with Hosts(2, with_index=False, head_in_main=True) as hosts:
        out = f"{urlsplit(upstream_index()).hostname}:443"
        assert connected(hosts.head, out) == [None]
        assert connected(hosts[1], out) != [None]
        assert not hosts.head.seen("/tmp/reh").exists()


def test_what_hosts_leave_to_their_first_process_is_reaped(namespaces: None) -> None:
    with Hosts(1, with_index=False) as hosts:
        hosts.head.run(["sh", "-c", "setsid true & exit"])
        wait_until(lambda: len(hosts.head.processes()) == 1, "the orphan's end")


@pytest.fixture
def killed(namespaces: None) -> Iterator[tuple[str, list[psutil.Process]]]:
    """The tag of hosts whose owner was killed, and the processes in them."""
    program = (
        "import json, signal; from tests.multihost.hosts import Hosts\n"
        "with Hosts(2, with_index=False) as hosts:\n"
        "    hosts[1].start(['sleep', '600'])\n"
        "    inside = [each.pid for host in hosts for each in host.processes()]\n"
        "    print(json.dumps([hosts.tag, inside]), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parents[2]) as owner:  # fmt: skip
        try:
            assert owner.stdout is not None
            tag, pids = json.loads(owner.stdout.readline())
            inside = [psutil.Process(pid) for pid in pids]
        finally:
            owner.send_signal(signal.SIGKILL)
    yield tag, inside
    sweep()


def test_hosts_end_with_the_process_that_made_them_and_the_rest_is_swept(
    killed: tuple[str, list[psutil.Process]],
) -> None:
    tag, inside = killed
    assert len(inside) >= 2
    assert left(tag) != []
    wait_until(lambda: not any(each.is_running() for each in inside), "the hosts' end")
    sweep()
    assert left(tag) == []


def test_hosts_of_one_process_do_not_meet(namespaces: None) -> None:
    with Hosts(0, with_index=False) as one, Hosts(0, with_index=False) as other:
        assert one.tag != other.tag
        assert one.bridge_address != other.bridge_address
        other.close()
        assert left(other.tag) == []
        assert left(one.tag) == [f"link {one.bridge}", f"folder {one.folder}"]


def test_hosts_leave_nothing_when_they_end(namespaces: None) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    with Hosts(2, with_index=False, root_bytes=1 << 20) as hosts:
        made = left(hosts.tag)
        inside = [each for host in hosts for each in host.processes()]
        for what in (f"link {hosts.bridge}", f"folder {hosts.folder}", f"link {hosts.tag}v1"):
            assert what in made
        assert Path("/proc/self/mountinfo").read_text() == mounts
    assert left(hosts.tag) == []
    wait_until(lambda: not any(each.is_running() for each in inside), "the hosts' end")
    assert Path("/proc/self/mountinfo").read_text() == mounts
