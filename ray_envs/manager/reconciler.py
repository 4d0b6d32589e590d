"""What is wanted, what is there, and the loop that makes the second follow the first.

Verbs only write wishes; nobody but the loop acts on nodes. The state after a restart is the
registry and a new look at the agents: start-up and recovery are the same code. What to do is
decided in `planning`; definitions are changed by `changes`, next door.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_envs.cluster.nodes import NodeInfo, Nodes
from ray_envs.decisions import planning
from ray_envs.decisions.locks import lock_sha256
from ray_envs.decisions.targets import Need, NodeView, chosen, fits
from ray_envs.errors import (
    EnvironmentNotReady,
    ManagerUnavailable,
    NoEligibleNode,
    NotFound,
    RayEnvsError,
    StorageFailed,
    from_dict,
)
from ray_envs.manager.demand import Wishes
from ray_envs.manager.fleet import Fleet, Node, ended, site_name
from ray_envs.manager.registry import Registry, build_request, describe_record
from ray_envs.models import (
    EnvId,
    Generation,
    NodeEnvState,
    Phase,
    Platform,
    Status,
    Target,
    VariantRecord,
)
from ray_envs.node.store import Store
from ray_envs.settings import Settings

OnFinal = Callable[[NodeInfo, NodeEnvState], None]
OnNode = Callable[[NodeInfo, bool], None]


class Reconciler:
    """The variants of one cluster, and their environments on its nodes.

    Args:
        settings: the root, and how often the loop looks again.
        nodes: who answers about the cluster.
        registry: the definitions.
        platform: of the head node.
        target: the cluster's interpreter and Ray.
        on_node: told when a node has joined or was lost.
        on_final: told when an environment has become ready on a node, or has failed.
    """

    def __init__(
        self,
        settings: Settings,
        nodes: Nodes,
        registry: Registry,
        *,
        platform: Platform,
        target: Target,
        on_node: OnNode,
        on_final: OnFinal,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._paths = Store(settings)
        #: The environments that somebody asked for. Without a cluster, for this process only: no
        #: command makes what another one has given up.
        self.wishes = Wishes(settings.root / "wishes.json" if nodes.address() else None)
        self.fleet = Fleet(
            nodes,
            settings.to_environment(),
            on_node=on_node,
            on_final=on_final,
            on_outdated=self.wishes.outdate,
        )
        self.site = site_name(platform.name, target)
        self.variants: dict[str, VariantRecord] = {}
        self._stamps: dict[str, int] = {}
        #: The folders of definitions that cannot be read.
        self.damaged: set[str] = set()
        #: Keys that somebody waits for, and how many do.
        self.awaited: Counter[str] = Counter()
        #: Generations that are prepared next to the current one, by variant.
        self.staged: dict[str, Generation] = {}
        #: Variants whose current generation cannot run here and is being locked again.
        self.relocking: dict[str, asyncio.Task[Any]] = {}
        self.relock_errors: dict[str, RayEnvsError] = {}
        #: What is being changed: the name of the operation, by variant.
        self.changing: dict[str, str] = {}
        #: By node and key: the failure that was seen last, how many there were, and when.
        self._failures: dict[tuple[str, str], tuple[NodeEnvState, int, float]] = {}
        #: Why the loop did something last, by node and key; for people.
        self.becauses: dict[tuple[str, str], str] = {}
        #: Described variants, with what the description depends on.
        self._statuses: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
        #: Where their tasks may go, each with the description that it is of.
        self._places: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._first_look = asyncio.Event()
        self._is_stopping = False

    # -- definitions ------------------------------------------------------------------------

    def get(self, name: str) -> VariantRecord:
        """The variant, as the registry has it now.

        Raises:
            NotFound: it is not defined.
            StorageFailed: it cannot be read.
        """
        record = self.variants.get(name)
        env_id = EnvId.parse(name) if record is None else record.env_id
        if record is None or self._registry.stamp(env_id) != self._stamps.get(env_id.folder):
            record = self._registry.get(env_id)
            if record is None:
                self.forget(env_id)
                raise NotFound(
                    f"no variant {name!r} is defined under {self._settings.root}",
                    variant_id=name,
                    hint="`ray-envs list` shows the defined ones, `ray-envs create` makes one",
                )
            self.remember(record)
        return record

    def remember(self, record: VariantRecord) -> None:
        self.variants[str(record.env_id)] = record
        self._stamps[record.env_id.folder] = self._registry.stamp(record.env_id)

    def forget(self, env_id: EnvId) -> None:
        """Stop knowing a variant, and wanting what nobody else wants."""
        record = self.variants.pop(str(env_id), None)
        self._stamps.pop(env_id.folder, None)
        self._statuses.pop(str(env_id), None)
        self._places.pop(str(env_id), None)
        if record is not None:
            self.unwant(record.current.key)

    def reload(self) -> None:
        """Take over what other processes changed in the registry."""
        now = self._registry.stamps()
        if now == self._stamps:
            return
        folders = {record.env_id.folder: record for record in self.variants.values()}
        for folder in self._stamps.keys() - now.keys():
            if folder in folders:
                self.forget(folders[folder].env_id)
        for folder, stamp in now.items():
            if self._stamps.get(folder) != stamp:
                self.damaged.discard(folder)
                try:
                    record = self._registry.read(folder)
                    if record is not None and record.env_id.folder == folder:
                        self.variants[str(record.env_id)] = record
                except StorageFailed:  # it must not hide the others
                    self.damaged.add(folder)
                self._stamps[folder] = stamp
        self.damaged &= now.keys()
        self.fleet.version += 1

    def known(self, fingerprint: str) -> VariantRecord | None:
        """A variant whose current lock came from `fingerprint`."""
        for record in self.variants.values():
            if record.current.fingerprint == fingerprint:
                return record
        return None

    def sharing(self, key: str) -> list[str]:
        """The variants whose current generation, or the one being prepared, has this key."""
        names = {n for n, record in self.variants.items() if record.current.key == key}
        return sorted(names | {n for n, gen in self.staged.items() if gen.key == key})

    # -- wishes -----------------------------------------------------------------------------

    def want(self, keys: Iterable[str]) -> None:
        """Want environments on every node that fits, failed ones once more."""
        with self.wishes.at_once():
            for key in keys:
                states = (node.states.get(key) for node in self.fleet.nodes.values())
                failed = [s.attempt for s in states if s is not None and s.phase is Phase.FAILED]
                self.wishes.want(key, failed=max(failed, default=None))
                if failed:
                    self.wishes.outdate(key)
        self.fleet.wake_up.set()

    def unwant(self, key: str) -> None:
        """Stop wanting `key`, unless a variant has it."""
        if not self.sharing(key):
            self.wishes.drop(key)

    # -- status -----------------------------------------------------------------------------

    def is_stale(self, generation: Generation) -> bool:
        """Whether it was locked for another Ray, Python or platform than this cluster has."""
        return site_name(generation.platform, generation.target) != self.site

    def eligible(self, generation: Generation) -> list[Node]:
        """The nodes that shall have it; those that cannot tell what they have are among them."""
        need = Need.of(generation.definition)
        site = site_name(generation.platform, generation.target)
        fitting = [
            node
            for node in self.fleet.nodes.values()
            if node.may_have(site) and fits(need, node.info.labels, node.info.num_gpus)
        ]
        if need.count is None:
            return fitting
        known = [node for node in fitting if node.site and node.error is None]  # as the planner
        nodes = {node.info.node_id: node for node in known or fitting}
        views = [self._view(node) for node in nodes.values()]
        return [nodes[view.node_id] for view in chosen(need, generation.key, views)]

    def states(self, generation: Generation) -> dict[str, NodeEnvState]:
        """What each node that shall have it says of it."""
        key = generation.key
        return {node.info.node_id: self._state(node, key) for node in self.eligible(generation)}

    def _state(self, node: Node, key: str) -> NodeEnvState:
        if node.error is not None:
            return NodeEnvState(key=key, phase=Phase.FAILED, error=node.error)
        if not node.site:
            return NodeEnvState(key=key, phase=Phase.WAITING, progress="the agent is starting")
        state = node.states.get(key)
        if state is None or planning.is_to_try_again(state, self.wishes.attempt(key)):
            return NodeEnvState(key=key, phase=Phase.WAITING)
        return state

    def status_of(self, generation: Generation) -> Status:
        """What a generation is, over all nodes that shall have it."""
        states = self.states(generation)
        if self._lacks_nodes(generation, len(states)):
            return Status.ERROR
        return planning.status_of(
            generation.key, states, {n: {generation.key: state} for n, state in states.items()}
        )

    def _lacks_nodes(self, generation: Generation, found: int) -> bool:
        """Whether fewer live nodes than it asks for are what it asks for."""
        return bool(self.fleet.nodes) and found < (Need.of(generation.definition).count or 1)

    def places(self, name: str) -> dict[str, Any]:
        """Where tasks in a variant may go now, as `placement.options` wants to know it."""
        described = self.status(name)
        known = self._places.get(name)
        if known is None or known[0] is not described:
            known = (described, self._places_of(self.variants[name].current))
            self._places[name] = known
        return known[1]

    def _places_of(self, generation: Generation) -> dict[str, Any]:
        states = self.states(generation)
        by_phase: dict[str, list[str]] = {
            "ready_nodes": [],
            "preparing_nodes": [],
            "unfit_nodes": [],
        }
        for node_id, state in states.items():
            place = "unfit_nodes" if state.phase is Phase.FAILED else "preparing_nodes"
            by_phase["ready_nodes" if state.phase is Phase.READY else place].append(node_id)
        site = site_name(generation.platform, generation.target)
        others: list[str] = []
        for node_id, node in self.fleet.nodes.items():
            if node_id not in states:
                (others if node.may_have(site) else by_phase["unfit_nodes"]).append(node_id)
        need = Need.of(generation.definition)
        return {
            **{name: sorted(ids) for name, ids in by_phase.items()},
            "other_nodes": sorted(others),
            "is_gated": self.fleet.is_gated(),
            "label_selector": dict(need.labels),
            "num_gpus": generation.definition.num_gpus,
            "may_spread": need.count is None,
        }

    def is_ready(self, generation: Generation) -> bool:
        return self.status_of(generation) is Status.ACTIVE

    def status(self, name: str) -> dict[str, Any]:
        """What is known of a variant; NOT_EXISTS where it is not defined."""
        try:
            record = self.get(name)
        except NotFound:
            return {"variant_id": name, "status": Status.NOT_EXISTS.value, "nodes": {}}
        parts = (record, self.staged.get(name), self.relock_errors.get(name))
        token = (
            self.fleet.version,
            self.wishes.version,
            self.changing.get(name),
            name in self.relocking,
            *map(id, parts),  # identity: it is cheap, and `parts` is kept, so no id comes back
        )
        cached = self._statuses.get(name)
        if cached is None or cached[0] != token:
            cached = (token, parts, self._described(name, record))
            self._statuses[name] = cached
        return cached[2]

    def _described(self, name: str, record: VariantRecord) -> dict[str, Any]:
        generation = record.current
        states = self.states(generation)
        folder = self._registry.folder(record.env_id)
        described = {
            **describe_record(record, self._registry, self._paths.venv(generation.key)),
            "status": self._variant_status(name, record).value,
            "nodes": self._told(generation.key, states),
            "packages": dict(generation.packages),
            "has_pyproject": (folder / "pyproject.toml").is_file(),
            "has_uv_lock": (folder / "uv.lock").is_file(),
            "has_venv": any(state.phase is Phase.READY for state in states.values()),
            "metadata": {
                "made_by": generation.made_by,
                "generations": list(record.numbers),
                "env_vars": dict(generation.definition.env_vars),
            },
            "error": self._error_of(name, record, states),
            "change": None,
        }
        staged = self.staged.get(name)
        if staged is not None:
            described["change"] = {
                "operation": self.changing.get(name, ""),
                "generation": staged.number,
                "key": staged.key,
                "nodes": self._told(staged.key, self.states(staged)),
            }
        return described

    def _told(self, key: str, states: Mapping[str, NodeEnvState]) -> dict[str, dict[str, Any]]:
        """The state of `key` on each node, with where that is and why it is so."""
        told = {}
        for node_id, state in states.items():
            because = self.becauses.get((node_id, key), "")
            if state.phase is Phase.WAITING and not because and key in self.wishes:
                because = "waits until another node has its wheels"
            told[node_id] = {
                **state.model_dump(mode="json"),
                "address": self.fleet.nodes[node_id].info.address,
                "because": because,
            }
        return told

    def summaries(self) -> list[dict[str, Any]]:
        """Every variant in a row, by its id; made for lists of thousands."""
        rows = []
        seen: dict[tuple[str, str], tuple[Status, int, int]] = {}
        for name, record in sorted(self.variants.items()):
            current = record.current
            site = (current.key, current.platform)
            if site not in seen:
                states = self.states(current).values()
                ready = sum(state.phase is Phase.READY for state in states)
                seen[site] = (self.status_of(current), ready, len(states))
            status, ready_nodes, total_nodes = seen[site]
            if name in self.changing or name in self.relocking or self.is_stale(current):
                status = self._variant_status(name, record)
            rows.append(
                {
                    "variant_id": name,
                    "workflow_id": record.env_id.workflow_id,
                    "node_id": record.env_id.node_id,
                    "version_id": record.env_id.version_id,
                    "status": status.value,
                    "key": current.key,
                    "generation": current.number,
                    "python_version": current.target.python,
                    "ray_version": current.target.ray,
                    "is_pinned": record.is_pinned,
                    "ready_nodes": ready_nodes,
                    "total_nodes": total_nodes,
                    "updated_at": record.updated_at.isoformat(),
                }
            )
        return rows

    def _variant_status(self, name: str, record: VariantRecord) -> Status:
        operation = self.changing.get(name)
        if operation == "delete":
            return Status.DELETING
        if self.is_stale(record.current):
            return Status.CREATING if name in self.relocking else Status.ERROR
        status = self.status_of(record.current)
        if operation is not None and status is Status.ACTIVE:
            return Status.UPDATING
        return status

    def _error_of(
        self, name: str, record: VariantRecord, states: Mapping[str, NodeEnvState]
    ) -> dict[str, str] | None:
        if not self.is_stale(record.current):
            told = next((state.error for state in states.values() if state.error), None)
            if told is None and self._lacks_nodes(record.current, len(states)):
                return _lack_of_nodes(record.current, len(states), variant_id=name).to_dict()
            return told
        if name in self.relocking:
            return None
        if name in self.relock_errors:
            return self.relock_errors[name].to_dict()
        target = record.current.target
        return EnvironmentNotReady(
            f"generation {record.current.number} of {name} was locked for ray {target.ray} on "
            f"{record.current.platform} python {target.python}; this cluster is {self.site}",
            variant_id=name,
            hint="prepare() or `ray-envs sync` locks it again; the old generation stays listed",
        ).to_dict()

    def raise_failure(self, generation: Generation, *, variant_id: str) -> None:
        """Raise what a node reported about `generation`, or that there are too few nodes for it."""
        states = self.states(generation)
        for node_id, state in states.items():
            if state.error:
                raise from_dict(state.error).about(variant_id=variant_id, node_id=node_id)
        if self._lacks_nodes(generation, len(states)):
            raise _lack_of_nodes(generation, len(states), variant_id=variant_id)

    async def until_final(
        self, generation: Generation, timeout_s: float, *, variant_id: str
    ) -> None:
        """Return once every node is ready or has failed.

        Raises:
            EnvironmentNotReady: that took longer than `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        self.awaited[generation.key] += 1
        try:
            while True:
                seen = self.fleet.version
                if self.status_of(generation) is not Status.CREATING:
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise EnvironmentNotReady(
                        f"variant {variant_id} was not ready after {timeout_s:g} s",
                        variant_id=variant_id,
                        hint="allow more time; what is built so far is used again",
                    )
                await self.fleet.news(seen, left_s)
        finally:
            self.awaited[generation.key] -= 1

    # -- the loop ---------------------------------------------------------------------------

    async def awake(self, chore: Callable[[], Any]) -> None:
        """Start the loop with the first verb: an actor's constructor has no running loop.

        Args:
            chore: what else is to be done at each turn of the loop.
        """
        if self._loop_task is None:
            self.wishes.load()
            self.reload()
            self._loop_task = asyncio.create_task(self._loop(chore))
        await self._first_look.wait()

    async def stop(self) -> None:
        """End the loop and, where the agent lives in this process, its builds."""
        self._is_stopping = True
        if self._loop_task is not None:
            await ended({self._loop_task})
        await ended(set(self.relocking.values()))
        await self.fleet.stop()

    async def _loop(self, chore: Callable[[], Any]) -> None:
        while not self._is_stopping:
            self.fleet.wake_up.clear()
            for work in (self._tick, chore):
                try:
                    await work()
                except Exception as exc:
                    print(f"ray_envs: EnvManager: {type(exc).__name__}: {exc}", file=sys.stderr)
                self._first_look.set()  # chores are nothing that a verb has to wait for
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self.fleet.wake_up.wait(), self._settings.tick_s)

    async def _tick(self) -> None:
        await self.fleet.look_at_nodes()
        sources = self._sources()
        await self._refuse_unknown(sources)
        if not sources:
            return
        wishes = [
            planning.Wish(
                key=key,
                attempt=self.wishes.attempt(key),
                variants=tuple(str(env_id) for env_id, _ in found),
                site=site_name(found[0][1].platform, found[0][1].target),
                needs=tuple({Need.of(made.definition): None for _, made in found}),
            )
            for key, found in sources.items()
        ]
        self._note_failures()
        views = [self._view(node) for node in self.fleet.healthy()]
        actions = planning.plan(wishes, views)
        await asyncio.gather(*(self._act(action, sources[action.key]) for action in actions))

    def _sources(self) -> dict[str, list[tuple[EnvId, Generation]]]:
        """The generations with each key that is wanted, or that a worker waits for.

        Any of them has the texts to build it from.
        """
        asked = {key for node in self.fleet.healthy() for key in node.asked}
        found: dict[str, list[tuple[EnvId, Generation]]] = {}
        for name, record in self.variants.items():
            for made in filter(None, (record.current, self.staged.get(name))):
                if made.key in self.wishes or made.key in asked:
                    found.setdefault(made.key, []).append((record.env_id, made))
        for key in asked - found.keys():
            older = self._older(key)  # of a task that was handed over before an update
            if older is not None:
                found[key] = [older]
        return found

    def _older(self, key: str) -> tuple[EnvId, Generation] | None:
        """A generation with this key that is not the current one of its variant."""
        for record in list(self.variants.values()):
            for number in record.numbers:
                with suppress(StorageFailed):
                    made = self._registry.generation(record.env_id, number)
                    if made.key == key:
                        return record.env_id, made
        return None

    async def _refuse_unknown(self, sources: Iterable[str]) -> None:
        """Tell workers that wait for what will never be made where they are."""
        known = set(sources)
        for node in self.fleet.healthy():
            for key in node.asked.keys() - known:
                with suppress(RayEnvsError):
                    await node.call("refuse", key=key, reason="no variant has this environment")

    def _view(self, node: Node) -> NodeView:
        """A node, as the planner sees it."""
        node_id, now = node.info.node_id, time.monotonic()
        due = set()
        for key in node.others:
            seen = self._failures.get((node_id, key))
            if seen is not None and now - seen[2] >= planning.pause_s(seen[1]):
                due.add(key)
        return NodeView(
            node_id=node_id,
            site=node.site,
            is_head=node.info.is_head,
            labels=node.info.labels,
            num_gpus=node.info.num_gpus,
            ready=node.ready,
            others=node.others,
            asked=node.asked,
            due=frozenset(due),
        )

    def _note_failures(self) -> None:
        """Remember since when, and how often in a row, an environment failed that may succeed."""
        failures = {}
        for node in self.fleet.healthy():
            for key, state in node.others.items():
                place = (node.info.node_id, key)
                last = self._failures.get(place)
                if state.phase is Phase.FAILED and planning.may_pass(state.error or {}):
                    if last is None or last[0] != state:
                        last = (state, last[1] + 1 if last else 1, time.monotonic())
                    failures[place] = last
                elif last is not None and not state.phase.is_final:  # it is tried again just now
                    failures[place] = last
        self._failures = failures

    async def _act(self, action: planning.Build, sources: list[tuple[EnvId, Generation]]) -> None:
        node = self.fleet.nodes.get(action.node_id)
        if node is None:  # lost while another one was told
            return
        self.becauses[action.node_id, action.key] = action.because
        try:
            request = self._request_of_any(sources)
            state = await node.call(
                "ensure",
                request=request,
                attempt=action.attempt,
                peers=list(action.peers),
                is_cache_only=action.is_cache_only,
            )
            node.know_one(NodeEnvState.model_validate(state))
        except ManagerUnavailable:  # the agent is restarting: it is met again, and told again
            self.fleet.lose(node)
        except RayEnvsError as exc:
            node.know_one(
                NodeEnvState(
                    key=action.key, phase=Phase.FAILED, error=exc.to_dict(), attempt=action.attempt
                )
            )
        await self.fleet.announce()

    def _request_of_any(self, sources: list[tuple[EnvId, Generation]]) -> dict[str, Any]:
        """The request from the first variant whose texts can be read."""
        for env_id, generation in sources[:-1]:
            with suppress(StorageFailed):  # the damage of one must not fail the others
                return self.request(env_id, generation)
        return self.request(*sources[-1])

    def request(self, env_id: EnvId, generation: Generation) -> dict[str, Any]:
        """What a node needs to build a generation, as plain data.

        Raises:
            StorageFailed: its texts cannot be read, or somebody has edited the lock.
        """
        pyproject, uv_lock = self._registry.lock_text(env_id, generation.number)
        if lock_sha256(uv_lock) != generation.lock_sha256:
            path = Path("generations", str(generation.number), "uv.lock")
            raise StorageFailed(
                f"{self._registry.folder(env_id) / path} is not what was locked",
                hint="restore the file, or create the variant again with replace",
                variant_id=str(env_id),
            )
        return build_request(generation, pyproject, uv_lock).model_dump(mode="json")


def _lack_of_nodes(generation: Generation, found: int, *, variant_id: str) -> NoEligibleNode:
    need = Need.of(generation.definition)
    which = f"only {found} of {need.count} live nodes are" if found else "no live node is"
    return NoEligibleNode(
        f"{which} what {variant_id} asks for: {need}",
        variant_id=variant_id,
        hint="add such a node, or change the variant's label_selector, num_gpus or nodes",
    )
