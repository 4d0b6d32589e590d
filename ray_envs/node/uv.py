"""uv's commands, and what their exit codes and words mean.

`agent` decides when they run, `store` where; byte-code in uv's cache is `bytecode`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uv
from packaging.version import Version

from ray_envs.decisions.local_wheels import SOURCE_DATE_EPOCH
from ray_envs.disk.processes import Ended, Progress, last_words
from ray_envs.errors import InvalidPackages, ResolutionFailed, UvFailed
from ray_envs.models import RAY_GROUP, BuildRequest
from ray_envs.node import bytecode
from ray_envs.node.interpreter import base_python, uv_version
from ray_envs.node.startup import run_clean
from ray_envs.settings import Settings

#: uv's exit code if no versions satisfy the requirements.
_UV_SAYS_NO = 1
#: uv's words when an index refused its credentials.
_NOT_LET_IN = ("(401 Unauthorized)", "403 Forbidden")
#: uv's words when it must not use the network, and when no index has a package.
_NETWORK_OFF = "network was disabled"
_NOT_FOUND = ("was not found in the package registry", "was not found in the provided package")
#: uv's words when a package would have to be built, which is forbidden. There is no exit code.
_NO_WHEEL = "`--no-build`"
#: uv's words when a package is known malware. There is no exit code.
_MALWARE = "Malware detected"
#: The first uv that has the check; an older one ignores the variable that turns it on.
_MALWARE_SINCE = "0.11.16"
#: uv's words when it cannot use the project itself. The exit code is that of any other failure.
_BAD_PROJECT = (
    "Failed to parse: pyproject.toml",
    "malformed dependency groups",
    "don't overlap with Python requirement",
    "tool.uv.default-groups",
)
#: uv's words when the build of a package failed, and when a source names no index.
_NOT_BUILT = "The build backend returned an error"
_NO_SUCH_INDEX = "references an undeclared index"
_LOCK_HINT = "raise RAY_ENVS_UV_LOCK_TIMEOUT_S"
_SYNC_HINT = "raise RAY_ENVS_UV_SYNC_TIMEOUT_S"
_INDEX_HINT = "is the package index reachable from this node? see uv's words above"
_CREDENTIALS_HINT = (
    "the index wants credentials: set UV_INDEX_<NAME>_USERNAME and UV_INDEX_<NAME>_PASSWORD on the "
    "nodes, or put them into a netrc file there"
)
_ONLY_BINARY_HINT = (
    "publish a wheel of it, choose a version that has one, or allow builds "
    "(only_binary of the spec, RAY_ENVS_ONLY_BINARY)"
)
_OFFLINE_HINT = "uv may not use the network: unset UV_OFFLINE on this node"
_UNKNOWN_HINT = "check the spelling of the package that uv names, and the package index"
_BUILD_HINT = (
    "choose a version with a wheel, or give the build what it needs: extra-build-dependencies in "
    "[tool.uv], or dependency-metadata beside no-build-isolation-package"
)
_CHOICES_HINT = (
    "uv locks all extras and groups of a project together: name in [tool.uv] conflicts those that "
    "exclude each other; or give the folder as a package, such as ./folder[extra]: then only the "
    "named extras count"
)
#: uv's words when an extra or a group of the project cannot be had, or not beside another one.
_CHOICE = re.compile(r"your project requires [\w.-]+[\[:]")
_FORMATS = {"requirements": "requirements.txt", "pylock": "pylock.toml"}


@dataclass(frozen=True, slots=True)
class Locked:
    """A resolution, and uv's output."""

    #: The text of the uv.lock.
    text: str
    output: str


class Builder:
    """uv, as one node uses it.

    Args:
        settings: time-outs, niceness and policy.
        cache: uv's cache folder; on the file system of the store, or links become copies.
        uv_command: the uv to run, in place of the one that the `uv` package carries.
    """

    def __init__(
        self, settings: Settings, cache: Path, *, uv_command: tuple[str, ...] | None = None
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._uv = uv_command or (uv.find_uv_bin(),)

    async def resolve(
        self,
        project: Path,
        *,
        exclude_newer: str | None = None,
        upgrade: Iterable[str] | None = None,
        only_binary: bool = False,
        on_line: Progress | None = None,
    ) -> Locked:
        """Resolve the pyproject.toml in `project`.

        A uv.lock that is already there is kept where it satisfies the project, also where one of
        its packages has no wheel and `only_binary` is set: `policy.check_lock` refuses that.

        Args:
            project: the folder; its uv.lock is written.
            exclude_newer: distributions that were uploaded later do not exist.
            upgrade: packages whose pins in the uv.lock do not count; empty for all of them.
            only_binary: packages that have no wheel do not exist.
            on_line: called with each line of uv as it comes.

        Raises:
            ResolutionFailed: no versions satisfy the requirements, or the project is malformed;
                `detail` is uv's explanation.
            UvFailed: uv could not work: index not reachable, time-out.
        """
        command = ["lock", *_newer(exclude_newer), *_no_build(only_binary)]
        if upgrade is not None:
            names = list(upgrade)
            command += [f"--upgrade-package={name}" for name in names] or ["--upgrade"]
        ended = await self._run_uv(
            command,
            project,
            timeout_s=self._settings.uv_lock_timeout_s,
            hint=_LOCK_HINT,
            on_line=on_line,
        )
        if ended.code == _UV_SAYS_NO:
            raise ResolutionFailed(
                "uv found no packages that satisfy the requirements",
                detail=last_words(ended.output),
                hint=_why_nothing(ended.output, only_binary=only_binary),
            )
        if ended.code and any(words in _unwrapped(ended.output) for words in _BAD_PROJECT):
            raise ResolutionFailed(
                "uv cannot use the project",
                detail=last_words(ended.output),
                where="pyproject.toml",
                hint="correct the entry that uv names",
            )
        if ended.code:
            raise _failed("uv lock", ended)
        return Locked((project / "uv.lock").read_text(encoding="utf-8"), ended.output)

    async def sync(
        self,
        project: Path,
        venv: Path,
        request: BuildRequest,
        *,
        is_offline: bool,
        on_line: Progress | None = None,
    ) -> str:
        """Install what the lock in `project` names into `venv`, exactly; returns uv's words.

        Raises:
            InvalidPackages: a package is known to do harm.
            ResolutionFailed: a package has no wheel for this node, and may not be built.
            UvFailed: uv ended with an error, or has no check for malware and must make one;
                offline, most often a wheel is not in the cache.
        """
        command = ["sync", "--frozen", "--no-install-project"]
        command += _selection(request.extras, request.groups)
        command += [*_newer(request.exclude_newer), *_no_build(request.only_binary)]
        environ = {"UV_PROJECT_ENVIRONMENT": str(venv)}
        if is_offline:
            command += ["--offline"]
            # The check needs the network; offline it would refuse what is in the cache.
            environ["UV_MALWARE_CHECK"] = "0"
        elif self._settings.malware_check:
            _check_uv_knows_malware()
            environ["UV_MALWARE_CHECK"] = "1"
        ended = await self._run_uv(
            command,
            project,
            timeout_s=self._settings.uv_sync_timeout_s,
            hint=_SYNC_HINT,
            on_line=on_line,
            environ=environ,
        )
        if ended.code and _MALWARE in ended.output:
            raise InvalidPackages(
                "a package of the environment is known malware",
                detail=last_words(ended.output),
                hint="choose another version or package; nothing was installed",
            )
        if ended.code and request.only_binary and _NO_WHEEL in ended.output:
            raise ResolutionFailed(
                "a package has no wheel for this node, and none may be built",
                detail=last_words(ended.output),
                hint=_ONLY_BINARY_HINT,
            )
        if ended.code:
            raise _failed("uv sync", ended)
        return ended.output

    async def build_wheel(self, source: Path, folder: Path) -> Path:
        """Build the wheel of `source`, a project's folder or a source archive, into `folder`.

        uv builds in isolation, with the build requirements that the project names.

        Raises:
            InvalidPackages: it cannot be built; `detail` has the words of its build back end.
            UvFailed: that took too long.
        """
        # setuptools would put modules that were deleted since its last build into the wheel.
        extra = folder / "setup.cfg"
        extra.write_text(f"[build]\nbuild_base = {folder / 'build'}\n", encoding="utf-8")
        ended = await self._run_uv(
            ["build", "--wheel", "--out-dir", str(folder), str(source)],
            folder,
            timeout_s=self._settings.uv_sync_timeout_s,
            hint=_SYNC_HINT,
            environ={"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH), "DIST_EXTRA_CONFIG": str(extra)},
        )
        wheels = list(folder.glob("*.whl"))
        if ended.code or len(wheels) != 1:
            raise InvalidPackages(
                "the package could not be built",
                detail=last_words(ended.output),
                where=str(source),
                hint="see the words of its build back end above; `uv build --wheel` there shows "
                "the same",
            )
        return wheels[0]

    async def export(
        self,
        project: Path,
        *,
        extras: Iterable[str] = (),
        groups: Iterable[str] = (),
        format: Literal["requirements", "pylock"] = "requirements",
    ) -> str:
        """What the lock in `project` pins, in a form that other tools read; the same every time.

        Raises `UvFailed`: uv ended with an error.
        """
        # To a file: whatever uv warns of is not part of it.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, _FORMATS[format])
            command = ["export", "--frozen", "--offline", "--no-emit-project", "--no-header"]
            command += ["--format", _FORMATS[format], "--output-file", str(file)]
            command += _selection(extras, groups)
            ended = await self._run_uv(
                command, project, timeout_s=self._settings.uv_lock_timeout_s, hint=_LOCK_HINT
            )
            if ended.code:
                raise _failed("uv export", ended, hint="see uv's words above")
            return file.read_text(encoding="utf-8")

    async def prune_cache(self) -> str:
        """Remove unreferenced entries from uv's cache; returns uv's output.

        Waits for every uv that uses the cache. Environments keep their links.

        Raises `UvFailed`: uv ended with an error, or had to wait for too long.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        ended = await self._run_uv(
            ["cache", "prune"],
            self._cache.parent,  # uv refuses to work inside its cache
            timeout_s=self._settings.uv_sync_timeout_s,
            hint=_SYNC_HINT,
            has_python=False,
        )
        if ended.code:
            raise _failed("uv cache prune", ended, hint="see uv's words above")
        return ended.output

    async def check_index(self, project: Path, timeout_s: float) -> None:
        """Check that the package index can resolve `project` now. Raises `UvFailed` if it cannot.

        Ray's metadata is asked for again, whatever the cache has; nothing is written.

        Raises `UvFailed`: it cannot, or not within `timeout_s` seconds.
        """
        ended = await self._run_uv(
            ["lock", "--dry-run", "--refresh-package", "ray"],
            project,
            timeout_s=timeout_s,
            hint=_INDEX_HINT,
        )
        if ended.code:
            raise _failed("uv lock", ended)

    async def compile(self, site_packages: Path, dist_infos: Iterable[str]) -> bool:
        """See `bytecode.compile_wheels`; the caller holds the node's compile lock."""
        return await bytecode.compile_wheels(
            self._cache, site_packages, dist_infos, python=base_python(), settings=self._settings
        )

    async def _run_uv(
        self,
        command: list[str],
        cwd: Path,
        *,
        timeout_s: float,
        hint: str,
        on_line: Progress | None = None,
        environ: dict[str, str] | None = None,
        has_python: bool = True,
    ) -> Ended:
        """Run a command of uv, with this node's interpreter unless it is about the cache."""
        command = [*self._uv, *command, "--color", "never", "--no-progress"]
        if has_python:
            command += ["--python", base_python()]
        return await run_clean(
            self._settings,
            command,
            cwd,
            timeout_s=timeout_s,
            hint=hint,
            on_line=on_line,
            environ={
                "UV_CACHE_DIR": str(self._cache),
                "UV_PYTHON_DOWNLOADS": "never",
                **(environ or {}),
            },
        )


def _newer(date: str | None) -> list[str]:
    return ["--exclude-newer", date] if date else []


def _no_build(only_binary: bool) -> list[str]:
    return ["--no-build"] if only_binary else []


def _selection(extras: Iterable[str], groups: Iterable[str]) -> list[str]:
    """The options that choose from a lock: the cluster's Ray, and what was asked for."""
    command = ["--no-default-groups", "--group", RAY_GROUP]
    for group in groups:
        command += ["--group", group]
    for extra in extras:
        command += ["--extra", extra]
    return command


def _check_uv_knows_malware() -> None:
    version = uv_version()
    if Version(version) < Version(_MALWARE_SINCE):
        raise UvFailed(
            f"uv {version} has no check for malware, and RAY_ENVS_MALWARE_CHECK wants one",
            hint=f"install uv {_MALWARE_SINCE} or newer on this node: "
            f"`pip install 'uv>={_MALWARE_SINCE},<1'`",
        )


def _why_nothing(output: str, *, only_binary: bool) -> str:
    """The hint for a resolution that uv found impossible, by uv's words."""
    output = _unwrapped(output)
    output = " ".join(output.split())  # uv breaks long lines
    if any(words in output for words in _NOT_LET_IN):
        return _CREDENTIALS_HINT
    if _NETWORK_OFF in output:
        return _OFFLINE_HINT
    if only_binary and _NO_WHEEL in output:
        return _ONLY_BINARY_HINT
    if any(words in output for words in _NOT_FOUND):
        return _UNKNOWN_HINT
    if _NOT_BUILT in output:
        return _BUILD_HINT
    if _NO_SUCH_INDEX in output:
        return "declare the index that uv names in [[tool.uv.index]], with that name"
    if _CHOICE.search(output) and f":{RAY_GROUP}" not in output:
        return _CHOICES_HINT
    return "change the requirements; every environment also holds the cluster's Ray"


def _unwrapped(output: str) -> str:
    """`output` in one line: uv breaks its lines at a width, also inside a sentence."""
    return " ".join(output.split())


def _failed(command: str, ended: Ended, *, hint: str = _INDEX_HINT) -> UvFailed:
    config = os.environ.get("UV_CONFIG_FILE")
    if config and config in ended.output:
        hint = f"uv cannot use {config}: correct or unset UV_CONFIG_FILE on this node"
    return UvFailed(
        f"{command} ended with exit code {ended.code}", detail=last_words(ended.output), hint=hint
    )
