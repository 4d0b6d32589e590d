"""Faults in the middle of a running batch, on four hosts: every item ends once, and rightly so.

By hand: first all in one batch; then one by one, from harmless to destructive. Each test ends with
all live hosts ready again, which `storm` waits for. The last ones have a head that takes a silent
node for dead after 5 s.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.multihost.batches import (
    PINS,
    READY_S,
    Console,
    Running,
    measured,
    phases,
    processes,
    records,
    wait_until,
    wait_until_ready,
)
from tests.multihost.host import ROOT, Host
from tests.multihost.hosts import Hosts

pytestmark = pytest.mark.timeout(900)

IDS = [f"batch/{variant}" for variant in PINS]
#: Enough items that none of the storms sees their end; `hurry` then lets them end.
CASES, SECONDS = 40, 1.5
#: The length of a storm that is a length of time.
CUT_S = 20
#: A root in memory, which can be filled: three environments and their wheels take 400 MiB.
ROOT_BYTES = 1 << 30


class World:
    """The hosts, the console on their head, and which of them are nodes that live."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.live = [host for host in hosts if host.is_up]
        self.console = Console(hosts)

    @property
    def head(self) -> Host:
        return self.hosts.head

    def run(self, results: str, **options: Any) -> Running:
        given = {"cases": CASES, "seconds": SECONDS, **options}
        return Running(self.head, self.hosts.ray_address, results=results, **given)

    def settle(self) -> None:
        with measured("settled") as facts:
            wait_until_ready(self.console, self.live, IDS)
            facts["hosts"] = [host.name for host in self.live]

    def join(self, **options: Any) -> Host:
        host = self.hosts.add(**options)
        host.start_ray(plugin=True)
        self.live.append(host)
        return host

    def wheels(self) -> dict[str, int]:
        """Which wheels went out of the index since it was told to forget, and how often."""
        assert self.hosts.index is not None
        return {n: sent.count for n, sent in self.hosts.index.downloads.items() if sent.count}

    def forget(self) -> None:
        assert self.hosts.index is not None
        self.hosts.index.forget()

    def made(self) -> dict[str, dict[str, str]]:
        """When each environment was made, by host and key."""
        return {
            host.name: {key: rec["created_at"] for key, rec in records(host).items()}
            for host in self.live
        }


@pytest.fixture(scope="module")
def world(four: Hosts) -> World:
    world = World(four)
    with measured("the first batch"):
        world.run("first", cases=2, seconds=0.1).all_ok()
    world.settle()
    return world


@pytest.fixture
def storm(world: World) -> Iterator[World]:
    """The world, which is as it was when the test has ended, apart from who lives."""
    world.forget()
    yield world
    world.settle()


def hosts_of(results: list[dict[str, Any]]) -> set[str]:
    return {result["value"]["host"] for result in results}


def fresh(world: World, running: Running, host: Host, seen: int) -> None:
    """Wait until a host has given a result that was not among the first `seen`."""
    wait_until(
        lambda: host.name in hosts_of([r for r in running.so_far()[seen:] if r["ok"]]),
        f"a result of {host.name}",
    )


def is_node(world: World, node_id: str) -> bool:
    """Whether Ray takes the node for alive."""
    nodes = world.console.ask("[node['NodeID'] for node in ray.nodes() if node['Alive']]")
    return node_id in nodes


def lose_store(*hosts: Host) -> None:
    lost = ROOT / ".lost"  # moved first: the agent begins anew while they are deleted
    for host in hosts:
        host.run(["sh", "-c", f"mkdir {lost} && mv {ROOT}/store {ROOT}/uv-cache {lost}"])
    for host in hosts:
        host.run(["rm", "-rf", lost])


@contextmanager
def slowed(host: Host) -> Iterator[None]:
    """What the host sends takes seconds: with all of Ray's wheel, about ten."""
    shape = ["root", "tbf", "rate", "200mbit", "burst", "256kb", "latency", "400ms"]
    host.run(["tc", "qdisc", "add", "dev", "eth0", *shape])
    try:
        yield
    finally:
        host.run(["tc", "qdisc", "delete", "dev", "eth0", "root"])


# -- all at once


@pytest.mark.thorough
def test_a_batch_that_meets_every_storm_gives_every_result_once(storm: World) -> None:
    """One host dies, one joins, one loses its store, one its cable for 20 s; then a disk fills."""
    killed, wiped, cut = storm.live[1:4]
    running = storm.run("every", cases=3 * CASES)
    running.until(6)
    with measured("four storms: Ray on a host that joins"):
        joined = storm.join(root_bytes=ROOT_BYTES)
    killed.kill()
    storm.live.remove(killed)
    lose_store(wiped)
    node_id = cut.node_id()
    with cut.disconnected():
        cut.run(["sleep", str(CUT_S)])
    with measured("four storms: until all that live are ready and give results"):
        wait_until_ready(storm.console, storm.live, IDS)
        seen = len(running.so_far())
        for host in (wiped, joined):
            fresh(storm, running, host, seen)
        wait_until(
            lambda: cut.name in hosts_of(running.so_far()[seen:]) or not is_node(storm, node_id),
            "a result of the host whose cable was cut, or its end",
        )
    if not is_node(storm, node_id):  # on a busy machine Ray may take it for dead, and for good
        cut.kill_ray()
        cut.start_ray(plugin=True)
        wait_until_ready(storm.console, storm.live, IDS)
    fresh(storm, running, cut, seen)
    lose_store(joined)
    joined.fill_disk()
    told: dict[str, Any] = {}

    def has_failed() -> bool:
        told.update({i: phases(storm.console, i).get(joined.address, {}) for i in IDS})
        return any(
            (node.get("error") or {}).get("type") == "StorageFailed" for node in told.values()
        )

    wait_until(has_failed, "the failure of a full disk")
    joined.free_disk()
    with measured("a full disk: until it is ready by itself and gives results"):
        wait_until_ready(storm.console, storm.live, IDS)
        fresh(storm, running, joined, len(running.so_far()))
    running.hurry(storm.live)
    results = running.all_ok()
    assert {host.name for host in storm.live} <= hosts_of(results)
    assert storm.wheels() == {}


# -- one by one, with Ray's own idea of when a node is dead


@pytest.mark.thorough
def test_a_store_that_is_lost_in_a_batch_is_made_again(storm: World) -> None:
    running, host = storm.run("lost"), storm.live[1]
    seen = len(running.until(6))
    lose_store(host)
    with measured("lost store: until it gives results again"):
        wait_until_ready(storm.console, storm.live, IDS)
        fresh(storm, running, host, seen)
    running.hurry(storm.live)
    running.all_ok()
    assert storm.wheels() == {}
    assert {record["how"] for record in records(host).values()} <= {"fetched", "linked"}


@pytest.mark.thorough
def test_a_store_that_is_lost_under_idle_workers_is_no_trap(storm: World) -> None:
    storm.run("warm", cases=3, seconds=0.1).all_ok()
    for host in storm.live[1:3]:
        lose_store(host)
    results = storm.run("trap", cases=4, seconds=0.2).all_ok()
    assert len(results) == 4 * len(PINS)
    assert storm.wheels() == {}


@pytest.mark.thorough
def test_a_link_that_is_cut_for_seconds_costs_no_item(storm: World) -> None:
    host = storm.live[2]
    node_id = host.node_id()
    running = storm.run("cut")
    running.until(6)
    with host.disconnected():
        host.run(["sleep", str(CUT_S)])
    with measured("a cut link: until it gives results again"):
        fresh(storm, running, host, len(running.so_far()))
    running.hurry(storm.live)
    running.all_ok()
    assert host.node_id() == node_id


@pytest.mark.thorough
def test_a_manager_that_is_killed_in_a_batch_is_not_missed(storm: World) -> None:
    [manager] = processes(storm.head, "ray::EnvManager")
    running = storm.run("manager")
    seen = len(running.until(4))
    os.kill(manager, signal.SIGKILL)
    with measured("a killed manager: until it answers"):
        storm.settle()
    running.until(seen + 12)
    running.hurry(storm.live)
    running.all_ok()
    [other] = processes(storm.head, "ray::EnvManager")
    assert other != manager


@pytest.mark.thorough
def test_a_sender_that_is_killed_in_the_middle_is_replaced(storm: World) -> None:
    sender, *receivers = storm.live[1:4]  # the head is asked last
    [agent] = processes(sender, "ray::NodeAgent")
    name = sender.node_id()[:12]
    running = storm.run("sender")
    seen = len(running.until(4))
    getting: set[str] = set()

    def is_sending() -> bool:
        told = [phases(storm.console, variant_id) for variant_id in IDS]
        for host in receivers:
            said = [t[host.address]["progress"] for t in told if host.address in t]
            if any(re.match(rf"ray .* from node {name}: ", each) for each in said):
                getting.add(host.name)
        return len(getting) == len(receivers)

    with slowed(sender):
        lose_store(*receivers)
        wait_until(is_sending, "ray on its way from one to two")
        os.kill(agent, signal.SIGKILL)
    with measured("a killed sender: until all are ready"):
        wait_until_ready(storm.console, storm.live, IDS)
    for host in receivers:
        fresh(storm, running, host, seen)
    running.hurry(storm.live)
    running.all_ok()
    [other] = processes(sender, "ray::NodeAgent")
    assert other != agent
    assert storm.wheels() == {}


@pytest.mark.thorough
def test_a_batch_whose_driver_is_killed_goes_on_with_resume(storm: World) -> None:
    leases = storm.head.seen(ROOT / "leases.json")

    def holders() -> set[str]:
        return {each for found in json.loads(leases.read_text()).values() for each in found}

    before = holders()
    running = storm.run("driver", cases=12)
    done = {(r["variant_id"], r["case_id"]): r["started_at"] for r in running.until(8)}
    [ours] = holders() - before
    running.command.kill()
    with measured("a killed driver: until its leases end"):
        wait_until(lambda: ours not in holders(), "the end of a dead job's leases")
    again = storm.run("driver", cases=12, is_resumed=True)
    again.until(len(done) + 1)
    again.hurry(storm.live)
    results = {(r["variant_id"], r["case_id"]): r["started_at"] for r in again.all_ok()}
    assert {item: results[item] for item in done} == done


# -- hosts that join


@contextmanager
def flipped(host: Host, pattern: str) -> Iterator[bytes]:
    """One byte of the one file of a host's uv cache that matches is another one."""
    [file] = host.seen(ROOT / "uv-cache").glob(pattern)
    good = file.read_bytes()

    def write(content: bytes) -> None:
        with file.open("r+b") as opened:
            opened.write(content)

    write(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    try:
        yield good
    finally:
        write(good)


_FILE = "archive-v0/*/tabulate/__init__.py"


@pytest.mark.thorough
def test_a_host_that_joins_gets_items_and_takes_nothing_that_is_damaged(storm: World) -> None:
    running = storm.run("joins", cases=2 * CASES)
    running.until(4)
    workers = storm.live[1:]
    with flipped(workers[0], _FILE), flipped(workers[1], _FILE), flipped(workers[2], _FILE) as good:
        with measured("a host that joins: Ray"):
            host = storm.join(root_bytes=ROOT_BYTES)
        with measured("a host that joins: until it is ready and gives results"):
            wait_until_ready(storm.console, storm.live, IDS)
            fresh(storm, running, host, 0)
    running.hurry(storm.live)
    running.all_ok()
    [file] = host.seen(ROOT / "uv-cache").glob(_FILE)
    assert file.read_bytes() == good
    assert storm.wheels() == {}
    assert host.address not in storm.hosts.index.downloads_of  # type: ignore[union-attr]
    assert {record["how"] for record in records(host).values()} <= {"fetched", "linked"}


@pytest.mark.thorough
def test_a_wheel_that_is_damaged_everywhere_is_named_and_not_taken(storm: World) -> None:
    # only the head has it, and has never sent it: what was sent is for a while in its memory
    host, ids = storm.live[-1], ["had", "lacked"]
    pin = 'packages=["toolz==0.12.1"]'
    label = f'label_selector={{"host": "{host.name}"}}'
    storm.console.ask(f"envs.create('had', EnvSpec({pin}, label_selector={{'host': 'h0'}}))")
    storm.console.ask("envs.prepare('had', timeout_s=200)", deadline_s=READY_S)
    told: dict[str, Any] = {}

    def has_failed() -> bool:
        told.update(phases(storm.console, "lacked").get(host.address, {}))
        return told.get("phase") == "failed"

    with flipped(storm.head, "archive-v0/*/toolz/__init__.py"):
        storm.console.ask(f"envs.create('lacked', EnvSpec({pin}, {label}))")
        wait_until(has_failed, "the failure")
        assert "toolz 0.12.1 in uv's cache is damaged" in told["error"]["detail"], told
        assert list(host.seen(ROOT / "uv-cache").glob("archive-v0/*/toolz")) == []
    with measured("after the damage is mended, by prepare()"):
        storm.console.ask("envs.prepare('lacked', timeout_s=200)", deadline_s=READY_S)
    for name in ids:
        storm.console.ask(f"envs.delete({name!r}, force=True)")


@pytest.mark.thorough
def test_a_full_disk_fails_its_host_alone_until_it_is_freed(storm: World) -> None:
    host = storm.live[-1]
    host.fill_disk()
    pins = {"late": "toolz==1.0.0"}
    running = storm.run("full", name="late", pins=pins, cases=12, seconds=0.2)
    results = running.all_ok()
    assert host.name not in hosts_of(results)
    told: dict[str, Any] = {}

    def has_failed() -> bool:
        told.update(phases(storm.console, "late/late").get(host.address, {}))
        return told.get("phase") == "failed"

    wait_until(has_failed, "the failure of a full disk")
    assert told["error"]["type"] == "StorageFailed", told
    host.free_disk()
    with measured("a freed disk, by itself"):
        wait_until_ready(storm.console, storm.live, ["late/late"])
    storm.console.ask("envs.delete('late/late', force=True)")


# -- the head


def restart(world: World, *, is_disk_lost: bool) -> dict[str, Any]:
    """Kill the head and start it again, with what Ray makes of the workers meanwhile."""
    head, *workers = world.live[:4]
    for host in world.live[4:]:  # two cores have enough to do with four
        host.kill()
    world.live = [head, *workers]
    head.kill()
    if is_disk_lost:
        head.wipe_disk()
    head.boot()
    head.start_ray(plugin=True, fast_death=True)
    waited = 0.0
    if not is_disk_lost:  # once is enough
        # Ray's nodes do not join a new head: they end, within the minute that they look for theirs.
        waited = wait_until(
            lambda: not any(raylets(host) for host in workers), "the end of the workers' raylets"
        )
    for host in workers:
        host.kill_ray()
        host.start_ray(plugin=True)
    world.console = Console(world.hosts)
    return {"raylets_ended_after_s": round(waited, 1)}


def raylets(host: Host) -> list[int]:
    return [p.pid for p in host.processes() if Path((p.cmdline() or [""])[0]).name == "raylet"]


@pytest.mark.thorough
def test_a_batch_goes_on_after_its_head_was_restarted(storm: World) -> None:
    made = storm.made()
    running = storm.run("head", cases=6)
    done = {(r["variant_id"], r["case_id"]): r["started_at"] for r in running.until(6)}
    with measured("a restarted head") as facts:
        facts.update(restart(storm, is_disk_lost=False))
    storm.forget()
    results = storm.run("head", cases=6, is_resumed=True).all_ok()
    again = {(r["variant_id"], r["case_id"]): r["started_at"] for r in results}
    assert {item: again[item] for item in done} == done
    storm.settle()
    assert storm.made() == {host.name: made[host.name] for host in storm.live}
    assert storm.wheels() == {}


@pytest.mark.thorough
def test_a_head_that_lost_its_disk_takes_what_the_workers_have(storm: World) -> None:
    made = storm.made()
    running = storm.run("disk", cases=6)
    running.until(6)
    with measured("a restarted head without its disk") as facts:
        facts.update(restart(storm, is_disk_lost=True))
    storm.forget()
    assert records(storm.head) == {}
    storm.run("disk", cases=6, is_resumed=True, seconds=0.5).all_ok()
    storm.settle()
    now = storm.made()
    for host in storm.live[1:]:
        assert now[host.name] == made[host.name]
    assert {record["how"] for record in records(storm.head).values()} <= {"fetched", "linked"}
    assert storm.wheels() == {}


# -- with a head that takes silent nodes for dead after 5 s


@pytest.mark.thorough
def test_a_link_that_is_cut_until_its_node_is_dead_costs_no_item(storm: World) -> None:
    host = storm.live[2]
    running = storm.run("dead")
    seen = len(running.until(6))
    with host.disconnected():
        host.run(["sleep", str(CUT_S)])
        storm.live.remove(host)
        wait_until_ready(storm.console, storm.live, IDS)
    running.until(seen + 12)
    host.kill_ray()
    host.start_ray(plugin=True)
    storm.live.append(host)
    with measured("a node that was taken for dead: until it gives results again"):
        fresh(storm, running, host, len(running.so_far()))
    running.hurry(storm.live)
    running.all_ok()
    assert storm.wheels() == {}


@pytest.mark.thorough
def test_a_host_that_loses_power_costs_no_item_and_comes_back_as_it_was(storm: World) -> None:
    host, made = storm.live[1], storm.made()
    running = storm.run("power")
    seen = len(running.until(6))
    host.kill(power_loss=True)
    storm.live.remove(host)
    with measured("a host without power: until it is forgotten"):
        wait_until_ready(storm.console, storm.live, IDS)
    running.until(seen + 12)
    host.boot()
    host.start_ray(plugin=True)
    storm.live.append(host)
    with measured("a host with power again: until it gives results"):
        fresh(storm, running, host, len(running.so_far()))
    running.hurry(storm.live)
    running.all_ok()
    assert storm.made() == made
    assert storm.wheels() == {}
