"""Starts interpreters of environments, to see that a worker can start there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from packaging.utils import canonicalize_name

from ray_envs.decisions.credentials import secrets_in_toml
from ray_envs.disk import processes
from ray_envs.disk.processes import Ended, Progress
from ray_envs.disk.secrets import known_secrets
from ray_envs.errors import UvFailed
from ray_envs.models import BuildRequest
from ray_envs.settings import Settings
from ray_envs.worker.hold import INSTALLED_AS

#: Variables of this process that name other projects and modes: children must not inherit them.
NOT_INHERITED = (
    "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_WORKING_DIR", "UV_WORKING_DIRECTORY",
    "UV_FROZEN", "UV_LOCKED", "UV_NO_SYNC", "UV_ISOLATED", "UV_PYTHON", "UV_DEV", "UV_NO_DEV",
    "UV_NO_GROUP", "UV_NO_DEFAULT_GROUPS", "UV_COMPILE_BYTECODE", "UV_CACHE_DIR", "UV_NO_CACHE",
    "UV_ENV_FILE", "UV_RUN_RECURSION_DEPTH", "UV_EXCLUDE_NEWER", "UV_PREVIEW", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "CONDA_PREFIX",
)  # fmt: skip


async def verify(
    settings: Settings, python: Path, request: BuildRequest, site_packages: Path
) -> None:
    """Check that an environment starts, takes its hold, and has the packages of its lock.

    Packages are looked up by their metadata: an import of ray takes as long as a build.

    Raises `UvFailed`: it does not; `detail` says what is wrong.
    """
    installed = set()
    for entry in os.scandir(site_packages):
        name, dot, _ = entry.name.rpartition(".dist-info")
        if dot and os.path.exists(os.path.join(entry.path, "RECORD")):
            installed.add(canonicalize_name(name.rpartition("-")[0]))
    missing = {canonicalize_name(name) for name in request.packages} - installed
    if missing:
        raise UvFailed(f"uv reported success but did not install {', '.join(sorted(missing))}")
    ended = await run_clean(
        settings,
        [
            str(python), "-I", "-c",
            f"import sys, {INSTALLED_AS} as i;"
            "print(i.hold_fd is not None, *sys.version_info[:3])",
        ],
        site_packages,
        timeout_s=60,
    )  # fmt: skip
    said, wanted = ended.output.strip(), "True " + request.target.python.replace(".", " ")
    if ended.code or said != wanted:
        raise UvFailed(
            "the new environment failed its start-up check",
            detail=f"expected {wanted!r}, got {said!r} (exit code {ended.code})",
        )


async def run_clean(
    settings: Settings,
    command: list[str],
    cwd: Path,
    *,
    timeout_s: float,
    hint: str = "",
    on_line: Progress | None = None,
    environ: dict[str, str] | None = None,
) -> Ended:
    """Run a command without the variables of this process that name other projects and modes."""
    clean = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    child = {**clean, **(environ or {})}
    secrets = known_secrets(child)
    with suppress(OSError):  # `cwd` is not always that of a project
        secrets |= secrets_in_toml((cwd / "pyproject.toml").read_text(encoding="utf-8"))
    return await processes.run(
        command,
        cwd,
        timeout_s=timeout_s,
        niceness=settings.build_niceness,
        environ=child,
        on_line=on_line,
        hint=hint,
        secrets=secrets,
    )
