"""The knobs: their names, defaults and meaning. Read from `RAY_ENVS_*` in one place, here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ray_envs.errors import InvalidInput
from ray_envs.models import Model, nearest_hint, validated

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
    #: How often the manager looks again although nothing was reported.
    tick_s: float = Field(default=5, gt=0)
    #: Bytes that must be free on the root's file system before anything is built.
    min_free_bytes: int = Field(default=64 * 1024 * 1024, ge=0)

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
            _PREFIX + name.upper(): str(getattr(self, name)) for name in type(self).model_fields
        }
