"""The settings of ray_envs and their defaults. Only this module reads `RAY_ENVS_*`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ray_envs.errors import InvalidInput
from ray_envs.validation import Model, nearest_hint, validated

_PREFIX = "RAY_ENVS_"


class Settings(Model):
    """The settings of one process, each also a variable: `root` is `RAY_ENVS_ROOT`.

    Example:
        >>> Settings.from_environment({"RAY_ENVS_UV_RETRIES": "5"}).uv_retries
        5
    """

    #: The root folder: the same absolute path on every node.
    root: Path = Field(default_factory=lambda: Path.home() / ".ray_envs")
    #: How long uv may resolve. A guess: a large resolution without a cache takes minutes.
    uv_lock_timeout_s: float = Field(default=600, gt=0)
    #: How long uv may download and install one environment.
    uv_sync_timeout_s: float = Field(default=3600, gt=0)
    #: How often a failed download is repeated, with growing pauses.
    uv_retries: int = Field(default=2, ge=0)
    #: How many uv processes a node runs at the same time.
    max_parallel_builds: int = Field(default=2, ge=1)
    #: Added to the niceness of uv and of the byte-code compiler, so that tasks come first.
    build_niceness: int = Field(default=5, ge=0, le=19)
    #: How long a change waits for another process that changes the same variant.
    lock_timeout_s: float = Field(default=900, gt=0)
    #: How long `options()` and `prepare()` wait for environments by default.
    prepare_timeout_s: float = Field(default=3600, gt=0)
    #: How long a task waits on its node for its environment. Ray itself gives up after 600 s.
    gate_timeout_s: float = Field(default=480, ge=0, le=540)
    #: A worker of an item that has not started after so long, on a node that is ready, is examined.
    worker_start_timeout_s: float = Field(default=120, gt=0)
    #: The time between two looks of the manager when nothing is reported.
    tick_s: float = Field(default=5, gt=0)
    #: Bytes that must be free on the root's file system before a build.
    min_free_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    #: The only package indexes that may be used, separated by commas; empty for any.
    allowed_indexes: tuple[str, ...] = ()
    #: What packages may come from besides indexes: "git" (a commit), "url" (a file).
    allowed_sources: tuple[Literal["local", "git", "url"], ...] = ("local",)
    #: Install wheels only, for every spec: nothing is built from source.
    only_binary: bool = False
    #: uv ignores files uploaded later (a date or an RFC 3339 time); a spec may give an earlier one.
    #: From an index without upload times uv then takes nothing.
    exclude_newer: str | None = None
    #: uv asks OSV about malware in each download. If OSV does not answer, the download fails.
    malware_check: bool = False
    #: An unwanted environment is deleted after so many hours without use.
    idle_hours: float = Field(default=72, ge=0)
    #: A node deletes unwanted environments earlier if all together take more bytes or inodes.
    max_bytes: int | None = Field(default=None, gt=0)
    max_inodes: int | None = Field(default=None, gt=0)
    #: How many generations of a variant are kept: the current one and those to roll back to.
    keep_generations: int = Field(default=3, ge=1)
    #: The time between two collections of unwanted environments; 0 for only on request.
    gc_interval_s: float = Field(default=3600, ge=0)
    #: Bring ray_envs and uv to nodes that lack them or have another version of ray_envs.
    bootstrap: bool = False
    #: How many days events and operations are kept.
    history_days: float = Field(default=90, gt=0)

    @field_validator("root")
    @classmethod
    def _root(cls, value: Path) -> Path:
        value = value.expanduser()
        if not value.is_absolute():
            raise ValueError(f"{value} is not an absolute path; every node must find it")
        # Ray starts a worker as `bash -c "exec <python> …"`, without quotes.
        bad = sorted({c for c in str(value) if not (c.isalnum() or c in "/._-+@=,~%")})
        if bad:
            raise ValueError(f"{value} contains {''.join(bad)!r}, which is special in a shell")
        return value

    @field_validator("allowed_indexes", "allowed_sources", mode="before")
    @classmethod
    def _list(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        if info.field_name == "allowed_sources":
            for name in ("path", "editable", "directory", "workspace"):
                if name in value:
                    raise ValueError(f"{name} is not a kind of source: write local")
        return value

    @field_validator("exclude_newer", "max_bytes", "max_inodes", mode="before")
    @classmethod
    def _optional(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("allowed_indexes")
    @classmethod
    def _indexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, url in enumerate(value):
            # The message does not show the URL: it may contain credentials.
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
        """Return the settings of `environ` (by default `os.environ`), with `overrides` on top.

        Raises `InvalidInput`: a `RAY_ENVS_*` variable is unknown or its value is wrong.
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
        """Return variables from which `from_environment` makes the same settings."""
        return {
            _PREFIX + name.upper(): _as_text(getattr(self, name))
            for name in type(self).model_fields
        }


def cut_off(text: str) -> datetime:
    """Return the time of an `exclude-newer`; uploads from then on are ignored.

    A date means the end of that day in UTC, as in uv.

    Raises:
        ValueError: it is neither a date nor an RFC 3339 time. The durations that uv accepts too
            are refused: they mean another time each day.
    """
    match = re.fullmatch(
        r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d))?", text
    )
    if match:
        date, time, fraction, zone = match.groups()
        try:
            if time is None:
                return datetime.fromisoformat(f"{date}T00:00:00+00:00") + timedelta(days=1)
            # Python 3.10 reads only three or six digits, and no Z.
            fraction = (fraction or ".")[:7].ljust(7, "0")
            zone = "+00:00" if zone in "Zz" else zone
            moment = datetime.fromisoformat(f"{date}T{time}{fraction}{zone}")
            return moment.astimezone(timezone.utc)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{text!r} is not a date: write it like 2026-01-31 or 2026-01-31T12:00:00Z")


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)
