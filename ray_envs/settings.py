"""The knobs: their names, defaults and meaning. Read from `RAY_ENVS_*` in one place, here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ray_envs.errors import InvalidInput
from ray_envs.models import Model
from ray_envs.validation import nearest_hint, validated

_PREFIX = "RAY_ENVS_"


class Settings(Model):
    """How one process of ray_envs behaves. Durations are seconds.

    Example:
        >>> Settings.from_environment({"RAY_ENVS_UV_RETRIES": "5"}).uv_retries
        5
    """

    #: The root folder: the same absolute path on every node. `RAY_ENVS_ROOT`.
    root: Path = Field(default_factory=lambda: Path.home() / ".ray_envs")
    #: How long uv may take to resolve. A guess: large resolutions from a cold cache take minutes.
    uv_lock_timeout_s: float = Field(default=600, gt=0)
    #: How long uv may take to download and install one environment.
    uv_sync_timeout_s: float = Field(default=3600, gt=0)
    #: How often a failed download is tried again, with growing pauses.
    uv_retries: int = Field(default=2, ge=0)
    #: How many uv processes a node runs at once.
    max_parallel_builds: int = Field(default=2, ge=1)
    #: Added to the niceness of uv and of the byte-code compiler: running tasks come first.
    build_niceness: int = Field(default=5, ge=0, le=19)
    #: How long a change waits for another process that changes the same thing.
    lock_timeout_s: float = Field(default=900, gt=0)
    #: How long `options()` and `prepare()` wait for environments, where the caller says nothing.
    prepare_timeout_s: float = Field(default=3600, gt=0)
    #: How long a worker waits at the gate of its node for its environment; Ray gives up after 600.
    gate_timeout_s: float = Field(default=480, ge=0, le=540)
    #: How often the manager looks again although nothing was reported.
    tick_s: float = Field(default=5, gt=0)
    #: Bytes that must be free on the root's file system before anything is built.
    min_free_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    #: The only package indexes that anything may come from; empty for any. Separated by commas.
    allowed_indexes: tuple[str, ...] = ()
    #: Where a package may come from besides indexes: "git" (a commit), "url" (a file).
    allowed_sources: tuple[Literal["git", "url"], ...] = ()
    #: Install wheels only, whatever a spec says: nothing is built from source.
    only_binary: bool = False
    #: The cut-off of specs that give none (a date or an RFC 3339 moment); theirs may be earlier.
    #: Of an index that tells no upload times, uv then takes nothing.
    exclude_newer: str | None = None
    #: Let uv ask OSV whether what it downloads is known malware. Without OSV no download succeeds.
    malware_check: bool = False
    #: An environment that nobody wants is collected after so many hours without use.
    idle_hours: float = Field(default=72, ge=0)
    #: A node's budget for its environments, in bytes: beyond it, what nobody wants is collected
    #: earlier. None for no limit.
    max_bytes: int | None = Field(default=None, gt=0)
    #: The same in inodes.
    max_inodes: int | None = Field(default=None, gt=0)
    #: How many generations of a variant are wanted: the current one and those to roll back to.
    keep_generations: int = Field(default=3, ge=1)
    #: How often unwanted environments are looked for; 0 for only on request.
    gc_interval_s: float = Field(default=3600, ge=0)
    #: Bring ray_envs and uv to nodes that have Ray only, or another version of ray_envs.
    bootstrap: bool = False
    #: How many days events and operations are kept.
    history_days: float = Field(default=90, gt=0)

    @field_validator("root")
    @classmethod
    def _root(cls, value: Path) -> Path:
        value = value.expanduser()
        if not value.is_absolute():
            raise ValueError(f"{value} is not an absolute path; every node must find it")
        # Ray starts a worker as `bash -c "exec <python> …"`, unquoted.
        bad = sorted({c for c in str(value) if not (c.isalnum() or c in "/._-+@=,~%")})
        if bad:
            raise ValueError(
                f"{value} contains {''.join(bad)!r}, which a shell would read differently"
            )
        return value

    @field_validator("allowed_indexes", "allowed_sources", mode="before")
    @classmethod
    def _list(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        if info.field_name == "allowed_sources":
            for name in ("path", "editable", "directory", "workspace"):
                if name in value:
                    raise ValueError(f"{name} can never be allowed: other nodes lack what is local")
        return value

    @field_validator("exclude_newer", "max_bytes", "max_inodes", mode="before")
    @classmethod
    def _optional(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("allowed_indexes")
    @classmethod
    def _indexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, url in enumerate(value):
            # Without the text: a URL that is refused for its credentials must not be repeated.
            if not re.fullmatch(r"https?://[^\s,/?#@]+(/[^\s,?#]*)?", url):
                raise ValueError(
                    f"number {number + 1} is not the plain URL of an index: "
                    "write https://host/path, without credentials, query and commas"
                )
        return value

    @field_validator("exclude_newer")
    @classmethod
    def _exclude_newer(cls, value: str | None) -> str | None:
        if value is not None:
            cut_off(value)
        return value

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, **overrides: Any
    ) -> Settings:
        """The settings that `environ` (by default `os.environ`) describes, `overrides` on top.

        Raises:
            InvalidInput: an unknown `RAY_ENVS_*` variable or a value of the wrong kind.
        """
        environ = os.environ if environ is None else environ
        known = {_PREFIX + name.upper(): name for name in cls.model_fields}
        data: dict[str, Any] = {}
        for name, value in environ.items():
            if name.startswith(_PREFIX):
                if name not in known:
                    raise InvalidInput(
                        f"unknown setting {name}",
                        where="environment",
                        hint=nearest_hint(name, known),
                    )
                data[known[name]] = value
        data.update({name: value for name, value in overrides.items() if value is not None})
        return validated(cls, data, where="settings (RAY_ENVS_*)")

    def to_environment(self) -> dict[str, str]:
        """The variables that `from_environment` reads back to the same settings."""
        return {
            _PREFIX + name.upper(): _as_text(getattr(self, name))
            for name in type(self).model_fields
        }


def cut_off(text: str) -> datetime:
    """The moment from which on uploads do not exist, for what uv calls `exclude-newer`.

    A date means its end, as it does for uv; in UTC, which is what nodes are set to.

    Raises:
        ValueError: neither a date nor an RFC 3339 moment. uv takes durations too, but those are
            another moment each day: they cannot be compared.
    """
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d))?", text
    )
    if match:
        date, time, fraction, zone = match.groups()
        try:
            if time is None:
                return datetime.fromisoformat(f"{date}T00:00:00+00:00") + timedelta(days=1)
            # Python 3.10 reads three or six digits, and no Z.
            fraction = (fraction or ".")[:7].ljust(7, "0")
            zone = "+00:00" if zone in "Zz" else zone
            moment = datetime.fromisoformat(f"{date}T{time}{fraction}{zone}")
            return moment.astimezone(timezone.utc)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{text!r} is no date: write it like 2026-01-31 or 2026-01-31T12:00:00Z")


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)
