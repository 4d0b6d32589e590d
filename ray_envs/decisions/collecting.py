"""Which environments may go, and why each other one stays. Pure: what is there in, verdicts out.

A verdict is no permission: whoever removes still needs the exclusive hold (`store`). `collector`
gathers what is needed here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

from pydantic import Field

from ray_envs.models import Model


class EnvUse(Model):
    """One directory of a node's store: what it takes, and when it was used last."""

    key: str
    #: The node it is on; `store` does not know it, its caller fills it in.
    node_id: str = ""
    #: Its share of the disk: a file with n links counts 1/n here, so that sums over environments
    #: and uv's cache are true. Removing it may free less than its share.
    bytes: int = Field(ge=0)
    inodes: int = Field(ge=0)
    #: Seconds since the epoch, by the clock of the node.
    last_used_at: float = Field(allow_inf_nan=False)
    is_held: bool
    #: Whether it has a record; what has none is rubbish, unless somebody is building it.
    is_ready: bool
    created_at: float | None = None


class Limits(Model):
    """How much of what nobody wants a node keeps."""

    idle_s: float = Field(default=72 * 3600, ge=0, allow_inf_nan=False)
    max_bytes: int | None = Field(default=None, ge=0)
    max_inodes: int | None = Field(default=None, ge=0)


class Verdict(Model):
    """What becomes of one directory; `because` is for people."""

    key: str
    node_id: str
    collect: bool
    because: str
    bytes: int
    #: Seconds since the last use; 0 where that lies in the future.
    idle_s: float


def plan_collection(
    uses: Iterable[EnvUse],
    *,
    wanted: Mapping[str, str],
    leases: Mapping[str, str],
    busy: Collection[str],
    limits: Limits,
    now: float,
) -> list[Verdict]:
    """One verdict for each use, by node, the least recently used first.

    What is held, wanted, leased or busy stays, and so does what a changed clock puts into the
    future. Of the rest goes what has no record, what was idle for too long, and then the least
    recently used, for as long as everything on the node together is over a limit.

    Args:
        uses: what is there, on any number of nodes.
        wanted: why a key is wanted ("current generation 3 of x"); these stay.
        leases: to whom a key is promised; these stay.
        busy: keys that are being built or changed now.
        limits: for each node.
        now: seconds since the epoch, by the clock that `last_used_at` was read from.
    """
    ordered = sorted(uses, key=lambda use: (use.node_id, use.last_used_at, use.key))
    verdicts = []
    for _, group in groupby(ordered, key=lambda use: use.node_id):
        there = list(group)
        keep = {use.key: why for use in there if (why := _why_keep(use, wanted, leases, busy, now))}
        free = [use for use in there if use.key not in keep]
        gone = {use.key: why for use in free if (why := _why_collect(use, limits, now))}
        size = sum(use.bytes for use in there if use.key not in gone)
        inodes = sum(use.inodes for use in there if use.key not in gone)
        for use in free:
            if use.key not in gone and (why := _why_over(limits, size, inodes)):
                gone[use.key] = why
                size, inodes = size - use.bytes, inodes - use.inodes
        verdicts += [_verdict(use, keep.get(use.key), gone.get(use.key), now) for use in there]
    return verdicts


def _verdict(use: EnvUse, keep: str | None, collect: str | None, now: float) -> Verdict:
    idle_s = max(0.0, now - use.last_used_at)
    return Verdict(
        key=use.key,
        node_id=use.node_id,
        collect=collect is not None,
        because=keep or collect or f"last used {_span(idle_s)} ago, within the limits",
        bytes=use.bytes,
        idle_s=idle_s,
    )


def _why_keep(
    use: EnvUse,
    wanted: Mapping[str, str],
    leases: Mapping[str, str],
    busy: Collection[str],
    now: float,
) -> str:
    """Why a directory must stay whatever the limits say, or an empty string."""
    if use.is_held:
        return "a process runs in it"
    if use.key in busy:
        return "it is being built or changed"
    if use.key in wanted:
        return wanted[use.key] or "wanted"
    if use.key in leases:
        return f"leased to {leases[use.key] or 'somebody'}"
    if use.last_used_at > now:
        ahead = _span(use.last_used_at - now)
        return f"its last use lies {ahead} in the future: a clock was changed"
    return ""


def _why_collect(use: EnvUse, limits: Limits, now: float) -> str:
    """Why a directory that may go is to go, whatever else is there, or an empty string."""
    if not use.is_ready:
        return "it has no record: nobody finished its build"
    idle_s = now - use.last_used_at
    if idle_s > limits.idle_s:
        return f"not used for {_span(idle_s)}, and the limit is {_span(limits.idle_s)}"
    return ""


def _why_over(limits: Limits, size: int, inodes: int) -> str:
    """Why a node that keeps this much has to give up its least recently used, or nothing."""
    if limits.max_bytes is not None and size > limits.max_bytes:
        return (
            f"least recently used, and {_mib(size)} are over the limit of {_mib(limits.max_bytes)}"
        )
    if limits.max_inodes is not None and inodes > limits.max_inodes:
        return f"least recently used, and {inodes} files are over the limit of {limits.max_inodes}"
    return ""


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _span(seconds: float) -> str:
    """A duration for people, in the unit that suits it."""
    for unit_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"
