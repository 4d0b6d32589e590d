"""The commands for a Ray cluster: `up` and `down` for its manager, `runtime-env` for its jobs.

None of them starts Ray. If there is no cluster, they say how to start one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ray_envs.cli.arguments import json_option, variant_argument
from ray_envs.cli.printing import NODE_SHOWN, Answer, columns, put, put_fields, put_json, say
from ray_envs.cli.waiting import Phases
from ray_envs.errors import InvalidInput, ManagerUnavailable, NoEligibleNode
from ray_envs.models import EnvId

if TYPE_CHECKING:
    from ray_envs.client.connection import ActorConnection

#: How long one long-poll lasts. Ctrl-C has no effect in the meantime.
_POLL_S = 2.0

_address_option = click.option(
    "--address", help="The Ray cluster. Default: RAY_ADDRESS, or the cluster on this machine."
)


@click.command()
@_address_option
@click.option(
    "--wait", "count", metavar="N", type=click.IntRange(min=1), help="Wait until N nodes are ok."
)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="S",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    help="Seconds that --wait waits.",
)
@json_option
def up(address: str | None, count: int | None, timeout_s: float, as_json: bool) -> None:
    """Start the manager of a Ray cluster, and show its nodes.

    A manager that is running already stays. A node that is not ok cannot run environments; its row
    says why. With the plugin of ray_envs on every node, tasks may also start on nodes where their
    environment is not ready yet.

    \b
    Example: ray-envs up --wait 4
    """
    from ray_envs.client.connection import ActorConnection
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.cluster import actors

    if timeout_s != timeout_s:
        raise InvalidInput("nan is not a number of seconds", where="--timeout")
    with _connected(address):
        was_there = actors.find_manager() is not None
        with RayEnvironmentProvider.connect():
            connection = ActorConnection(actors.find_manager())
            report = _wait_for_nodes(connection, count or 0, timeout_s)
    report["is_started"] = not was_there
    if as_json:
        put_json(report)
        return
    say("the manager was running already" if was_there else "the manager is started")
    put_fields({name: report[name] for name in ("root", "platform", "python", "ray")})
    rows = [
        (row["node_id"][:NODE_SHOWN], row["address"], "head" if row["is_head"] else None,
         row["problem"] or ("ok" if row["has_gate"] else "ok, without the plugin"))
        for row in report["nodes"]
    ]  # fmt: skip
    put(columns(("node", "address", "role", "state"), rows))


def _report(described: Answer) -> Answer:
    """Return the manager's description, with the problem of each node in words, the head first."""
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
    """Return why a node cannot run environments; None if it can."""
    if node["error"]:
        return ": ".join(filter(None, (node["error"]["message"], node["error"].get("hint"))))
    if node["is_eligible"]:
        return None
    if node["site"]:
        return f"it is {node['site']}, but environments are built for {site}"
    return "its agent has not answered yet"


def _wait_for_nodes(connection: ActorConnection, count: int, timeout_s: float) -> Answer:
    """Wait until `count` nodes can run environments. Returns the report of all nodes.

    Raises `NoEligibleNode`: fewer nodes can after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    seen, before = -1, -1
    while True:
        left_s = max(deadline - time.monotonic(), 0)
        news = connection.call("watch", variant_ids=[], seen=seen, timeout_s=min(_POLL_S, left_s))
        seen = news["version"]  # read before `describe`: no news is missed
        report = _report(connection.call("describe"))
        able = sum(row["problem"] is None for row in report["nodes"])
        if able >= count:
            return report
        if able != before:
            before = able
            say(f"waiting for nodes: {able} of {count}")
        if time.monotonic() >= deadline:
            rows = [row for row in report["nodes"] if row["problem"]]
            raise NoEligibleNode(
                f"{able} of {count} nodes can run environments after {timeout_s:g} s",
                detail="\n".join(f"{row['address']}: {row['problem']}" for row in rows),
                hint="`ray status` shows which nodes have joined; --timeout waits longer",
            )


@click.command()
@_address_option
@json_option
def down(address: str | None, as_json: bool) -> None:
    """Stop the manager of a cluster and its agents.

    Running tasks go on. Environments and definitions stay on the disks. `ray-envs up`, or any
    program that connects, starts the manager again.

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
        say("the manager and its agents are stopped; environments and definitions stay")
    else:
        say("no manager is running: there is nothing to stop")


@click.command(name="runtime-env")
@variant_argument
@_address_option
@click.option(
    "--prepare/--no-prepare",
    "may_prepare",
    default=True,
    help="Make it ready on every node first (the default), or not.",
)
def runtime_env(variant: str, address: str | None, may_prepare: bool) -> None:
    """Print the runtime_env of VARIANT, for `ray job submit`.

    It is one line of JSON. The driver of a job and its tasks may start on any node. So the command
    fails if an eligible node does not have the environment.

    \b
    Example: ray-envs runtime-env old
    ray job submit --runtime-env-json "$(ray-envs runtime-env old)" -- python script.py
    """
    from ray_envs.client.provider import RayEnvironmentProvider

    variant = str(EnvId.parse(variant))  # refused before anything is started
    with _connected(address), RayEnvironmentProvider.connect() as provider:
        if may_prepare:
            provider.prepare(variant, on_status=Phases().tell_all)
        else:
            provider.environment(variant, prepare=False)
        answer = provider.runtime_env(variant)
    put(json.dumps(answer))


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect this process to a running cluster.

    Raises `ManagerUnavailable`: there is no cluster, or it does not answer.
    """
    from ray_envs.cluster import connecting

    if connecting.embeds(address):
        raise ManagerUnavailable(
            "no Ray cluster is running on this machine, and no address is given",
            hint="start one with `ray start --head` or `ray up cluster.yaml`, "
            "or give its address with --address or RAY_ADDRESS",
        )
    import ray

    # Ray prints the output of workers to stdout, which is for data only.
    with contextlib.redirect_stdout(sys.stderr):
        connecting.connect(address)
        try:
            yield
        finally:
            ray.shutdown()
