"""This node's interpreter, platform and uv: what environments here are made with."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache

from packaging.markers import default_environment
from packaging.tags import sys_tags

from ray_envs.decisions.credentials import redacted, secrets_in
from ray_envs.models import Platform, Target

#: The variables of this process that uv reads, and that decide what a resolution finds.
_INDEX_SETTINGS = (
    "UV_BUILD_CONSTRAINT", "UV_CONFIG_FILE", "UV_CONSTRAINT", "UV_DEFAULT_INDEX", "UV_EXCLUDE",
    "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_FORK_STRATEGY", "UV_INDEX", "UV_INDEX_STRATEGY",
    "UV_INDEX_URL", "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE", "UV_NO_BUILD",
    "UV_NO_BUILD_PACKAGE", "UV_NO_CONFIG", "UV_NO_INDEX", "UV_NO_SOURCES",
    "UV_NO_SOURCES_PACKAGE", "UV_NO_SYSTEM_CONFIG", "UV_OVERRIDE", "UV_PRERELEASE",
    "UV_RESOLUTION", "UV_TORCH_BACKEND",
)  # fmt: skip


def base_python() -> str:
    """The interpreter that environments are made from: this one's, outside any environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def this_platform() -> Platform:
    """Where environments of this node are installed; the same for the life of the process."""
    libc = "".join(platform.libc_ver()) or platform.release()
    markers = {name: str(value) for name, value in default_environment().items()}
    # The kernel's release does not decide which wheels fit, and differs from node to node.
    markers.update(platform_release="", platform_version="")
    return Platform(
        markers=markers,
        tags=tuple(str(tag) for tag in sys_tags()),
        name=f"{sys.platform}-{platform.machine()}-{libc}",
    )


def this_target(ray_version: str) -> Target:
    """What environments of this node must match."""
    return Target(python=platform.python_version(), ray=ray_version)


@cache
def uv_version() -> str:
    """The version of the uv that this module runs."""
    from importlib.metadata import version

    return version("uv")


def index_settings() -> dict[str, str]:
    """The UV_* variables of this process that decide a resolution, for `resolving.fingerprint`.

    Without credentials: an index is the same one after its password has changed.
    """
    found = {name: os.environ.get(name, "") for name in _INDEX_SETTINGS}
    return {
        name: redacted(value, secrets_in(value, has_paths=True))
        for name, value in found.items()
        if value
    }
