"""The commands of a cluster: its manager (`up`, `down`), and what a job is submitted with.

None of them starts a Ray: where no cluster is, they say how to start one. `cluster.yaml` calls `up`
on a new cluster's head.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from ray_envs.cli.arguments import json_option, variant_argument
from ray_envs.cli.printing import NODE_SHOWN, Answer, columns, put, put_fields, put_json, say
from ray_envs.cli.waiting import Phases
from ray_envs.errors import InvalidInput, ManagerUnavailable, NoEligibleNode
from ray_envs.models import EnvId

if TYPE_CHECKING:
    from ray_envs.client.connection import ActorConnection

#: How long one long-poll for news of the nodes lasts: short enough that Ctrl-C is noticed.
_POLL_S = 2.0

_address_option = click.option(
    "--address", help="The Ray cluster; by default RAY_ADDRESS, or the one on this machine."
)


# -- up ------------------------------------------------------------------------------------------


@click.command()
@_address_option
@click.option(
    "--wait", "count", metavar="N", type=click.IntRange(min=1), help="Return once N nodes are ok."
)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="S",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    help="How many seconds --wait waits.",
)
@json_option
def up(address: str | None, count: int | None, timeout_s: float, as_json: bool) -> None:
    """Start the manager of a running Ray cluster, or find it, and show the nodes.

    A node that is not ok can run no environments; its row says why. With the plugin of ray_envs, a
    task may also land where its environment is not ready yet.

    \b
    Example: ray-envs up --wait 4
    """
    from ray_envs.client.connection import ActorConnection
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.cluster import actors

    if timeout_s != timeout_s:
        raise InvalidInput("nan is no number of seconds", where="--timeout", hint="give seconds")
    with _connected(address):
        was_there = actors.find_manager() is not None
        with RayEnvironmentProvider.connect():
            door = ActorConnection(actors.find_manager())
            told = _awaited(door, count or 0, timeout_s)
    told["is_started"] = not was_there
    if as_json:
        put_json(told)
        return
    say("the manager was there" if was_there else "the manager is started")
    put_fields({name: told[name] for name in ("root", "platform", "python", "ray")})
    rows = [
        (row["node_id"][:NODE_SHOWN], row["address"], "head" if row["is_head"] else None,
         row["problem"] or ("ok" if row["has_gate"] else "ok, without the plugin"))
        for row in told["nodes"]
    ]  # fmt: skip
    put(columns(("node", "address", "role", "state"), rows))


def _report(described: Answer) -> Answer:
    """What a manager describes, with the problem of each node in words; the head comes first."""
    from ray_envs.manager.fleet import site_name
    from ray_envs.models import Target

    target = described["target"]
    site = site_name(described["platform"], Target.model_validate(target))
    nodes = [
        {"node_id": node_id, **node, "problem": _problem(node, site)}
        for node_id, node in described["nodes"].items()
    ]
    return {
        **{name: described[name] for name in ("root", "platform")},
        "python": target["python"],
        "ray": target["ray"],
        "nodes": sorted(nodes, key=lambda row: (not row["is_head"], row["address"])),
    }


def _problem(node: Answer, site: str) -> str | None:
    """Why a node can run no environments; None where it can."""
    if node["error"]:
        return ": ".join(filter(None, (node["error"]["message"], node["error"].get("hint"))))
    if node["is_eligible"]:
        return None
    if node["site"]:
        return f"it is {node['site']}; environments are built for {site}"
    return "its agent has not answered yet"


def _awaited(door: ActorConnection, count: int, timeout_s: float) -> Answer:
    """The report of the nodes, once `count` of them can run environments.

    Raises:
        NoEligibleNode: fewer can after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    seen, before = -1, -1
    while True:
        left_s = max(deadline - time.monotonic(), 0)
        news = door.call("watch", variant_ids=[], seen=seen, timeout_s=min(_POLL_S, left_s))
        seen = news["version"]  # older than what follows: nothing new is missed
        told = _report(door.call("describe"))
        able = sum(row["problem"] is None for row in told["nodes"])
        if able >= count:
            return told
        if able != before:
            before = able
            say(f"waiting for nodes: {able} of {count}")
        if time.monotonic() >= deadline:
            raise NoEligibleNode(
                f"{able} of {count} nodes can run environments after {timeout_s:g} s",
                detail="\n".join(
                    f"{row['address']}: {row['problem']}" for row in told["nodes"] if row["problem"]
                ),
                hint="`ray status` shows which nodes have joined; --timeout waits longer",
            )


# -- down ----------------------------------------------------------------------------------------


@click.command()
@_address_option
@json_option
def down(address: str | None, as_json: bool) -> None:
    """End the manager of a cluster and its agents.

    Running tasks go on. Environments and definitions stay on the disks; `up`, or any program that
    connects, starts the manager again.

    \b
    Example: ray-envs down
    """
    from ray_envs.cluster import actors, connecting

    ended: list[str] = []
    if not connecting.embeds(address):
        with _connected(address):
            ended = actors.end_manager()
    if as_json:
        put_json({"ended": ended})
    elif ended:
        put("\n".join(ended))
        say("the manager and its agents ended; environments and definitions stay")
    else:
        say("no manager lives here: there is nothing to end")


# -- jobs ----------------------------------------------------------------------------------------


@click.command(name="runtime-env")
@variant_argument
@_address_option
@click.option(
    "--prepare/--no-prepare",
    "may_prepare",
    default=True,
    help="Whether to make it ready on every node first (the default).",
)
def runtime_env(variant: str, address: str | None, may_prepare: bool) -> None:
    """Print the runtime_env of VARIANT as one line of JSON, for `ray job submit`.

    A job's driver and its tasks may land on any node: there is an answer only where every
    node that can have the environment does.

    \b
    Example: ray-envs runtime-env old
    ray job submit --runtime-env-json "$(ray-envs runtime-env old)" -- python script.py
    """
    from ray_envs.client.provider import RayEnvironmentProvider

    variant = str(EnvId.parse(variant))  # before anything is started for it
    with _connected(address), RayEnvironmentProvider.connect() as provider:
        if may_prepare:
            provider.prepare(variant, on_status=_said())
        else:
            provider.environment(variant, prepare=False)
        answer = provider.runtime_env(variant)
    put(json.dumps(answer))


def _said() -> Callable[[dict[str, Answer]], None]:
    """Says each new phase of the variants whose statuses it is given."""
    phases = Phases()

    def tell(statuses: dict[str, Answer]) -> None:
        for name, status in statuses.items():
            phases.tell(name, status)

    return tell


# -- shared --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """This process is connected to a cluster that is there.

    Raises:
        ManagerUnavailable: nothing names a cluster, or it does not answer.
    """
    from ray_envs.cluster import connecting

    if connecting.embeds(address):
        raise ManagerUnavailable(
            "no Ray cluster runs on this machine, and none is named",
            hint="start one with `ray start --head` or `ray up cluster.yaml`, "
            "or name it with --address or RAY_ADDRESS",
        )
    import ray

    # Ray prints what workers and its autoscaler say to our stdout; data alone belongs there.
    with contextlib.redirect_stdout(sys.stderr):
        connecting.connect(address)
        try:
            yield
        finally:
            ray.shutdown()
