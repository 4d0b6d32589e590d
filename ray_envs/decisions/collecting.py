"""Decides which environments to delete, and says why each other one is kept.

A verdict is not yet permission: deleting also needs the exclusive hold (`node.store`). The
manager's `collector` gathers the arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import groupby

from pydantic import Field

from ray_envs.validation import Model


class EnvUse(Model):
    """One directory of a node's store: its size, and when it was used last."""

    key: str
    #: Its node. The caller of `store` sets it: `store` does not know the node's id.
    node_id: str = ""
    #: Its share of the disk. A file with n links counts 1/n, so that the sum over environments and
    #: uv's cache is right. Deleting the directory may free less.
    bytes: int = Field(ge=0)
    inodes: int = Field(ge=0)
    #: Seconds since the epoch, by the clock of the node.
    last_used_at: float = Field(allow_inf_nan=False)
    is_held: bool
    #: Whether it has a record. A directory without one is rubbish, unless it is being built.
    is_ready: bool
    created_at: float | None = None


class Limits(Model):
    """How long and how much of the unused environments a node keeps."""

    idle_s: float = Field(default=72 * 3600, ge=0, allow_inf_nan=False)
    max_bytes: int | None = Field(default=None, ge=0)
    max_inodes: int | None = Field(default=None, ge=0)


class Verdict(Model):
    """Whether to delete one directory, and why; `because` is for people."""

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
    """Return one verdict for each directory, by node, the least recently used first.

    A directory is kept if it is held, wanted, leased or busy, or if its last use is in the future
    (a clock was changed). Of the others, those without a record and those idle for too long are
    deleted; then the least recently used ones, while the node's total is over a limit.

    Args:
        uses: the directories of any number of nodes.
        wanted: by key, why it is wanted ("current generation 3 of x").
        leases: by key, to whom it is promised.
        busy: keys that are being built or changed now.
        limits: apply to each node.
        now: seconds since the epoch, by the same clock as `last_used_at`.
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
    """Return why a directory is kept regardless of limits, or an empty string."""
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
    """Return why an unused directory is deleted even if there is space, or an empty string."""
    if not use.is_ready:
        return "it has no record: nobody finished its build"
    idle_s = now - use.last_used_at
    if idle_s > limits.idle_s:
        return f"not used for {_span(idle_s)}, and the limit is {_span(limits.idle_s)}"
    return ""


def _why_over(limits: Limits, size: int, inodes: int) -> str:
    """Return why a node of this size must delete its oldest directory, or an empty string."""
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
    """Return a duration as text, in days, hours, minutes or seconds."""
    for unit_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"
