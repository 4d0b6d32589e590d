"""Makes the parts of an EnvManager and gives each the other parts that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from ray_envs.cluster.nodes import NodeInfo, Nodes
from ray_envs.events import EventKind
from ray_envs.manager.changes import Changes
from ray_envs.manager.collector import Collector
from ray_envs.manager.demand import Wishes
from ray_envs.manager.fleet import Fleet, site_name
from ray_envs.manager.inspector import Inspector
from ray_envs.manager.leases import Leases
from ray_envs.manager.operations import Operations
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.resolver import Resolver
from ray_envs.manager.statuses import Statuses
from ray_envs.manager.switching import Switching
from ray_envs.manager.variants import Variants
from ray_envs.manager.views import Views
from ray_envs.models import NodeEnvState, Phase, Platform, Target
from ray_envs.node.interpreter import this_platform, this_target
from ray_envs.node.store import Store
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
    variants: Variants
    fleet: Fleet
    statuses: Statuses
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
        names = variants.sharing(state.key)
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

    kept_wishes = settings.root / "wishes.json" if cluster.address() else None
    wishes = Wishes(kept_wishes, is_writer=False)
    fleet = Fleet(cluster, settings.to_environment(), on_node, on_final, wishes.outdate)
    variants, views = Variants(settings, registry, wishes), Views()
    store, site = Store(settings), site_name(platform.name, target)
    statuses = Statuses(variants, fleet, views, registry, store, site)
    reconciler = Reconciler(settings, registry, variants, fleet, views, statuses)
    resolver = Resolver(settings, registry, fleet, platform, target, variants.known)
    collector = Collector(settings, cluster, registry, variants, reconciler, leases, operations)
    inspector = Inspector(
        settings, registry, variants, statuses, reconciler, operations, collector, leases, target
    )
    switching = Switching(settings, registry, variants, statuses, reconciler, resolver, store)
    changes = Changes(
        settings, registry, variants, statuses, reconciler, resolver, operations, inspector.users,
        switching,
    )  # fmt: skip
    return Parts(
        settings, cluster, platform, target, registry, operations, leases, variants, fleet,
        statuses, reconciler, resolver, collector, inspector, changes,
    )  # fmt: skip
