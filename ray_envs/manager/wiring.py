"""Makes the parts of an EnvManager and gives each the other parts that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from ray_envs.cluster.nodes import NodeInfo, Nodes
from ray_envs.events import EventKind
from ray_envs.manager.changes import Changes
from ray_envs.manager.collector import Collector
from ray_envs.manager.inspector import Inspector
from ray_envs.manager.leases import Leases
from ray_envs.manager.operations import Operations
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.resolver import Resolver
from ray_envs.models import NodeEnvState, Phase, Platform, Target
from ray_envs.node.uv import this_platform, this_target
from ray_envs.settings import Settings

#: Up to this many variants of one environment, each gets an event of its own when it is ready.
_OWN_EVENTS = 20


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one EnvManager."""

    settings: Settings
    cluster: Nodes
    platform: Platform
    target: Target
    registry: Registry
    operations: Operations
    leases: Leases
    reconciler: Reconciler
    resolver: Resolver
    collector: Collector
    inspector: Inspector
    changes: Changes


def wired(settings: Settings, cluster: Nodes) -> Parts:
    """The parts of an EnvManager of `cluster`, each with the parts that it uses."""
    platform, target = this_platform(), this_target(cluster.ray_version())
    registry = Registry(settings)
    operations = Operations(settings, registry)
    leases = Leases(settings.root / "leases.json")

    def on_node(info: NodeInfo, has_joined: bool) -> None:
        kind = EventKind.NODE_JOINED if has_joined else EventKind.NODE_LOST
        operations.say(kind, node_id=info.node_id, address=info.address)

    def on_final(info: NodeInfo, state: NodeEnvState) -> None:
        names = reconciler.sharing(state.key)
        for name in names if len(names) <= _OWN_EVENTS else [None]:
            operations.say(
                EventKind.PREPARED if state.phase is Phase.READY else EventKind.PREPARATION_FAILED,
                variant_id=name,
                key=state.key,
                node_id=info.node_id,
                how=state.how,
                duration_s=state.duration_s,
                error=state.error,
            )

    reconciler = Reconciler(
        settings,
        cluster,
        registry,
        platform=platform,
        target=target,
        on_node=on_node,
        on_final=on_final,
    )
    resolver = Resolver(
        settings,
        registry,
        reconciler.fleet,
        platform=platform,
        target=target,
        known=reconciler.known,
    )
    collector = Collector(settings, cluster, registry, reconciler, leases, operations)
    inspector = Inspector(
        settings, registry, reconciler, operations, collector, leases, target=target
    )
    changes = Changes(settings, registry, reconciler, resolver, operations, users=inspector.users)
    return Parts(
        settings, cluster, platform, target, registry, operations, leases, reconciler, resolver,
        collector, inspector, changes,
    )  # fmt: skip
