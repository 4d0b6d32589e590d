"""What the manager tells about variants: status, nodes, errors, and where their tasks may run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_envs.decisions import planning
from ray_envs.decisions.targets import Need, chosen, fits
from ray_envs.errors import EnvironmentNotReady, NoEligibleNode, NotFound, from_dict
from ray_envs.manager.fleet import Fleet, Node, site_name
from ray_envs.manager.registry import Registry, describe_record
from ray_envs.manager.variants import Variants
from ray_envs.manager.views import Views
from ray_envs.models import Generation, NodeEnvState, Phase, Status, VariantRecord
from ray_envs.node.store import Store

Answer = dict[str, Any]


@dataclass(eq=False)
class Statuses:
    """The states of variants over all nodes."""

    _variants: Variants
    _fleet: Fleet
    _views: Views
    _registry: Registry
    _paths: Store
    site: str

    #: Described variants, with the token and the parts that a description depends on.
    _described_of: dict[str, tuple[Any, Any, Answer]] = field(default_factory=dict, init=False)
    #: Where their tasks may run, each with the description that it was made from.
    _places_of: dict[str, tuple[Answer, Answer]] = field(default_factory=dict, init=False)

    def is_stale(self, generation: Generation) -> bool:
        """Whether it was locked for another Ray, Python or platform than this cluster has."""
        return site_name(generation.platform, generation.target) != self.site

    def eligible(self, generation: Generation) -> list[Node]:
        """The nodes that shall have a generation, also nodes that have not answered yet."""
        need = Need.of(generation.definition)
        site = site_name(generation.platform, generation.target)
        fitting = [
            node
            for node in self._fleet.nodes.values()
            if node.may_have(site) and fits(need, node.info.labels, node.info.num_gpus)
        ]
        if need.count is None:
            return fitting
        known = [node for node in fitting if node.site and node.error is None]  # as the planner
        nodes = {node.info.node_id: node for node in known or fitting}
        views = [self._views.of(node) for node in nodes.values()]
        return [nodes[view.node_id] for view in chosen(need, generation.key, views)]

    def states(self, generation: Generation) -> dict[str, NodeEnvState]:
        """Its state on each node that shall have it."""
        key = generation.key
        return {node.info.node_id: self._state(node, key) for node in self.eligible(generation)}

    def _state(self, node: Node, key: str) -> NodeEnvState:
        if node.error is not None:
            return NodeEnvState(key=key, phase=Phase.FAILED, error=node.error)
        if not node.site:
            return NodeEnvState(key=key, phase=Phase.WAITING, progress="the agent is starting")
        state = node.states.get(key)
        if state is None or planning.is_to_try_again(state, self._variants.wishes.attempt(key)):
            return NodeEnvState(key=key, phase=Phase.WAITING)
        return state

    def status_of(self, generation: Generation) -> Status:
        """The status of a generation over all nodes that shall have it."""
        states = self.states(generation)
        if self._lacks_nodes(generation, len(states)):
            return Status.ERROR
        return planning.status_of(
            generation.key, states, {n: {generation.key: state} for n, state in states.items()}
        )

    def _lacks_nodes(self, generation: Generation, found: int) -> bool:
        """Whether it asks for more nodes than there are live nodes of that kind."""
        return bool(self._fleet.nodes) and found < (Need.of(generation.definition).count or 1)

    def is_ready(self, generation: Generation) -> bool:
        return self.status_of(generation) is Status.ACTIVE

    def places(self, name: str) -> dict[str, Any]:
        """The nodes on which tasks in a variant may run now, as `placement.options` takes them."""
        described = self.status(name)
        known = self._places_of.get(name)
        if known is None or known[0] is not described:
            known = (described, self._placed(self._variants.by_name[name].current))
            self._places_of[name] = known
        return known[1]

    def _placed(self, generation: Generation) -> dict[str, Any]:
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
        for node_id, node in self._fleet.nodes.items():
            if node_id not in states:
                (others if node.may_have(site) else by_phase["unfit_nodes"]).append(node_id)
        need = Need.of(generation.definition)
        return {
            **{name: sorted(ids) for name, ids in by_phase.items()},
            "other_nodes": sorted(others),
            "is_gated": self._fleet.is_gated(),
            "label_selector": dict(need.labels),
            "num_gpus": generation.definition.num_gpus,
            "may_spread": need.count is None,
        }

    def status(self, name: str) -> dict[str, Any]:
        """The status of a variant; NOT_EXISTS if it is not defined."""
        try:
            record = self._variants.get(name)
        except NotFound:
            self._described_of.pop(name, None)
            self._places_of.pop(name, None)
            return {"variant_id": name, "status": Status.NOT_EXISTS.value, "nodes": {}}
        parts = (record, self._variants.staged.get(name), self._variants.relock_errors.get(name))
        token = (
            self._fleet.version,
            self._variants.wishes.version,
            self._variants.changing.get(name),
            name in self._variants.relocking,
            *map(id, parts),  # cheap; `parts` is kept, so that no id is used again
        )
        cached = self._described_of.get(name)
        if cached is None or cached[0] != token:
            cached = (token, parts, self._described(name, record))
            self._described_of[name] = cached
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
        staged = self._variants.staged.get(name)
        if staged is not None:
            described["change"] = {
                "operation": self._variants.changing.get(name, ""),
                "generation": staged.number,
                "key": staged.key,
                "nodes": self._told(staged.key, self.states(staged)),
            }
        return described

    def _told(self, key: str, states: Mapping[str, NodeEnvState]) -> dict[str, dict[str, Any]]:
        """The state of `key` on each node, with the address of the node and the reason."""
        told = {}
        for node_id, state in states.items():
            because = self._fleet.becauses.get((node_id, key), "")
            if state.phase is Phase.WAITING and not because and key in self._variants.wishes:
                because = "waits until another node has its wheels"
            told[node_id] = {
                **state.model_dump(mode="json"),
                "address": self._fleet.nodes[node_id].info.address,
                "because": because,
            }
        return told

    def summaries(self) -> list[dict[str, Any]]:
        """A row for each variant, sorted by id. Fast for thousands of variants."""
        rows = []
        seen: dict[tuple[str, str], tuple[Status, int, int]] = {}
        for name, record in sorted(self._variants.by_name.items()):
            current = record.current
            site = (current.key, current.platform)
            if site not in seen:
                states = self.states(current).values()
                ready = sum(state.phase is Phase.READY for state in states)
                seen[site] = (self.status_of(current), ready, len(states))
            status, ready_nodes, total_nodes = seen[site]
            if (
                name in self._variants.changing
                or name in self._variants.relocking
                or self.is_stale(current)
            ):
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
        operation = self._variants.changing.get(name)
        if operation == "delete":
            return Status.DELETING
        if self.is_stale(record.current):
            return Status.CREATING if name in self._variants.relocking else Status.ERROR
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
        if name in self._variants.relocking:
            return None
        if name in self._variants.relock_errors:
            return self._variants.relock_errors[name].to_dict()
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


def _lack_of_nodes(generation: Generation, found: int, *, variant_id: str) -> NoEligibleNode:
    need = Need.of(generation.definition)
    which = f"only {found} of {need.count} live nodes are" if found else "no live node is"
    return NoEligibleNode(
        f"{which} what {variant_id} asks for: {need}",
        variant_id=variant_id,
        hint="add such a node, or change the variant's label_selector, num_gpus or nodes",
    )
