"""What the planner costs, and how fast its plans fill a cluster:
`python -m tests.bench.planner_simulation [--nodes N] [--variants N] [--keys K ...]`.

Not a test, and no Ray: the real `plan`, a clock of its own, and nodes that are numbers. Assumed:

 * The head alone asks the package index: `--download-s` for each key, `--builds` at once a node.
 * Another node gets a key from the first of the peers that it was told of that lives, else from
   the index: `--transfer-s`, as `--mb` MB at `--mbps` MB/s of a sender, each of which serves
   `--receivers` at once, the rest in the order in which they came. Then it links: `--link-s`.
   Ray's object store, which lets receivers pass pieces on, would make this faster.
 * `--failures` of the builds end in a failure that may pass, after their whole time; each is due
   again after `pause_s`. A node dies every `--dies-s` and an empty one joins in its place.
 * The planner looks when anything has ended, at most every `--tick-s`; agents hear of it at once.
 * A tick's own time is measured, and not part of the simulated time.
 * `--counted` of the variants ask for two nodes only; the rest shall be everywhere.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count

from ray_envs.decisions.planning import Build, Wish, pause_s, plan
from ray_envs.decisions.targets import Need, NodeView
from ray_envs.models import NodeEnvState, Phase

SITE = "linux"


@dataclass(slots=True)
class Machine:
    """One simulated node."""

    node_id: str
    is_head: bool = False
    ready: frozenset[str] = frozenset()
    others: dict[str, NodeEnvState] = field(default_factory=dict)
    #: By key: how many failures in a row, and when it may be tried again.
    failures: dict[str, tuple[int, float]] = field(default_factory=dict)
    waiting: deque[Build] = field(default_factory=deque)
    running: int = 0
    #: Whoever waits to be sent something, and how many are sent something now.
    receivers: deque[tuple[Machine, Build]] = field(default_factory=deque)
    sending: int = 0
    is_alive: bool = True


class Simulation:
    """A cluster of machines, the events to come, and what was counted on the way."""

    def __init__(self, options: argparse.Namespace, keys: int) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, str, tuple[object, ...]]] = []
        self.machines = {m.node_id: m for m in (self._fresh() for _ in range(options.nodes))}
        next(iter(self.machines.values())).is_head = True
        self.wishes = self._wanted(keys)
        self.plans_s: list[float] = []
        self.views_s: list[float] = []
        self.actions: list[int] = []
        self.downloads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.finished_at = 0.0

    def _fresh(self) -> Machine:
        return Machine(f"{self.random.getrandbits(224):056x}")

    def _wanted(self, keys: int) -> list[Wish]:
        names: dict[str, list[str]] = {}
        for number in range(self.options.variants):
            names.setdefault(f"{number % keys:032x}", []).append(f"many/v{number}")
        limited = round(len(names) * self.options.counted / 100)
        return [
            Wish(key, 0, tuple(variants), SITE, (Need(count=2 if place < limited else None),))
            for place, (key, variants) in enumerate(names.items())
        ]

    # -- time -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Until everything is everywhere; nodes stop dying half-way through the allowed time."""
        self._at(0, "tick")
        if self.options.dies_s:
            self._at(self.options.dies_s, "die")
        is_tick_due = True
        while self._events and self.now < self.options.limit_s:
            self.now, _, kind, about = heapq.heappop(self._events)
            if kind == "tick":
                is_tick_due = False
                self._tick()
            else:
                getattr(self, f"_{kind}")(*about)
                if not is_tick_due:
                    is_tick_due = True
                    self._at(self.options.tick_s, "tick")

    def _at(self, delay_s: float, kind: str, *about: object) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._numbers), kind, about))

    def views(self) -> list[NodeView]:
        return [
            NodeView(
                node_id=machine.node_id,
                site=SITE,
                is_head=machine.is_head,
                ready=machine.ready,
                others=machine.others,
                due=frozenset(k for k, (_, at) in machine.failures.items() if at <= self.now),
            )
            for machine in self.machines.values()
        ]

    def _tick(self) -> None:
        began = time.process_time()
        views = self.views()
        built = time.process_time()
        actions = plan(self.wishes, views)
        self.plans_s.append(time.process_time() - built)
        self.views_s.append(built - began)
        self.actions.append(len(actions))
        for action in actions:
            self._tell(self.machines[action.node_id], action)

    # -- what nodes do --------------------------------------------------------------------------

    def _tell(self, machine: Machine, build: Build) -> None:
        machine.others[build.key] = NodeEnvState(key=build.key, phase=Phase.WAITING)
        machine.waiting.append(build)
        self._work(machine)

    def _work(self, machine: Machine) -> None:
        while machine.waiting and machine.running < self.options.builds:
            machine.running += 1
            self._get(machine, machine.waiting.popleft())

    def _get(self, machine: Machine, build: Build) -> None:
        """From the first peer that lives, else from the index."""
        for peer in filter(None, map(self.machines.get, build.peers)):
            peer.receivers.append((machine, build))
            self._send(peer)
            return
        self.downloads[build.key] += 1
        linking_s = 0 if build.is_cache_only else self.options.link_s
        self._at(self.options.download_s + linking_s, "end", machine, build)

    def _send(self, peer: Machine) -> None:
        self.peak[peer.node_id] = max(
            self.peak[peer.node_id], peer.sending + len(peer.receivers)
        )  # fmt: skip
        while peer.receivers and peer.sending < self.options.receivers:
            machine, build = peer.receivers.popleft()
            if machine.is_alive:
                peer.sending += 1
                self.sent[peer.node_id] += 1
                share = self.options.mbps / self.options.receivers
                self._at(self.options.mb / share, "sent", peer, machine, build)

    def _sent(self, peer: Machine, machine: Machine, build: Build) -> None:
        peer.sending -= 1
        if peer.is_alive:
            self._send(peer)
            self._at(self.options.link_s, "end", machine, build)
        elif machine.is_alive:
            self._get(machine, build)

    def _end(self, machine: Machine, build: Build) -> None:
        key = build.key
        if not machine.is_alive:
            return
        machine.running -= 1
        if self.random.random() * 100 < self.options.failures:
            failures = machine.failures.get(key, (0, 0.0))[0] + 1
            machine.failures[key] = (failures, self.now + pause_s(failures))
            machine.others[key] = NodeEnvState(key=key, phase=Phase.FAILED)
            self._at(pause_s(failures), "due")
        elif build.is_cache_only:
            machine.others[key] = NodeEnvState(key=key, phase=Phase.CACHED)
        else:
            machine.others.pop(key)
            machine.failures.pop(key, None)
            machine.ready |= {key}
            self.finished_at = self.now
        self._work(machine)

    def _due(self) -> None:
        """Only that the planner looks again."""

    def _die(self) -> None:
        """One dies, whoever it sends to asks another one, and a new one joins."""
        machine = self.random.choice([m for m in self.machines.values() if not m.is_head])
        del self.machines[machine.node_id]
        machine.is_alive = False
        for receiver, build in machine.receivers:
            if receiver.is_alive:
                self._get(receiver, build)
        fresh = self._fresh()
        self.machines[fresh.node_id] = fresh
        if self.now < self.options.limit_s / 2 and not self._is_done():
            self._at(self.options.dies_s, "die")

    def _is_done(self) -> bool:
        everywhere = {wish.key for wish in self.wishes if wish.needs[0].count is None}
        return sum(everywhere <= m.ready for m in self.machines.values()) >= len(self.machines) - 1

    # -- what came of it ------------------------------------------------------------------------

    def report(self, keys: int) -> str:
        tick, view = sorted(self.plans_s), sorted(self.views_s)
        began = time.process_time()
        views = self.views()
        built = time.process_time()
        left = plan(self.wishes, views)
        steady_s = time.process_time() - built
        have = Counter(key for machine in self.machines.values() for key in machine.ready)
        wanted = {w.key: w.needs[0].count or len(self.machines) for w in self.wishes}
        is_whole = not left and all(have[key] >= number for key, number in wanted.items())
        cells = [
            f"{self.options.nodes} × {self.options.variants}",
            f"{keys}",
            f"{statistics.median(tick) * 1e3:.0f} / {tick[-1] * 1e3:.0f}",
            f"{statistics.median(view) * 1e3:.1f} / {view[-1] * 1e3:.1f}",
            f"{steady_s * 1e3:.0f} (+ {(built - began) * 1e3:.1f})",
            f"{len(tick)}",
            f"{sum(self.actions)} / {max(self.actions)}",
            f"{self.finished_at:.0f}" if is_whole else f"not in {self.now:.0f}",
            f"{sum(self.downloads.values())}",
            f"{max(self.sent.values(), default=0)} / {max(self.peak.values(), default=0)}",
        ]
        return " | ".join(cells)


TITLES = (
    "nodes × variants", "keys", "plan ms p50 / max", "views ms p50 / max",
    "plan with nothing to do ms (+ views)", "ticks", "actions all / most in a tick",
    "everything everywhere s", "index downloads", "receivers of a sender all / at once, at most",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--variants", type=int, default=1000)
    parser.add_argument("--keys", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--counted", type=float, default=0, help="percent of the keys")
    parser.add_argument("--download-s", type=float, default=10)
    parser.add_argument("--mb", type=float, default=400)
    parser.add_argument("--mbps", type=float, default=1000)
    parser.add_argument("--receivers", type=int, default=4)
    parser.add_argument("--link-s", type=float, default=1)
    parser.add_argument("--builds", type=int, default=2)
    parser.add_argument("--tick-s", type=float, default=1)
    parser.add_argument("--failures", type=float, default=0, help="percent of the builds")
    parser.add_argument("--dies-s", type=float, default=0, help="0: no node dies")
    parser.add_argument("--limit-s", type=float, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(" | ".join(TITLES), flush=True)
    for keys in options.keys:
        simulation = Simulation(options, keys)
        simulation.run()
        print(simulation.report(keys), flush=True)


if __name__ == "__main__":
    main()
