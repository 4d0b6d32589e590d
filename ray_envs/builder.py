"""Runs uv and the byte-code compiler; the only module that starts their processes.

Knows commands and exit codes, not why something is built: `agent` decides when, `store` where.
Every process has a time-out, its own process group, and dies with this process.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import uv
from packaging.markers import default_environment
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name

from ray_envs.errors import InvalidInput, ResolutionFailed, StorageFailed, UvFailed
from ray_envs.inside import INSTALLED_AS
from ray_envs.models import BuildRequest, Platform, Target
from ray_envs.policy import redacted
from ray_envs.settings import Settings

#: uv's exit code where it works as meant but the answer is no: nothing satisfies the requirements.
_UV_SAYS_NO = 1
_DETAIL_LINES = 40
#: How much of a child's output is read at once, in bytes.
_CHUNK = 65536
_PR_SET_PDEATHSIG = 1

#: What uv must not take over from the process that calls us: it names other projects and modes.
_NOT_FOR_UV = frozenset(
    [
        "UV_PROJECT",
        "UV_PROJECT_ENVIRONMENT",
        "UV_WORKING_DIR",
        "UV_WORKING_DIRECTORY",
        "UV_FROZEN",
        "UV_LOCKED",
        "UV_NO_SYNC",
        "UV_ISOLATED",
        "UV_PYTHON",
        "UV_DEV",
        "UV_NO_DEV",
        "UV_NO_GROUP",
        "UV_NO_DEFAULT_GROUPS",
        "UV_COMPILE_BYTECODE",
        "UV_CACHE_DIR",
        "UV_NO_CACHE",
        "UV_ENV_FILE",
        "UV_RUN_RECURSION_DEPTH",
        "UV_EXCLUDE_NEWER",
        "UV_PREVIEW",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONSTARTUP",
        "CONDA_PREFIX",
    ]
)

#: What uv takes from the process that calls us and that decides what a resolution finds.
_INDEX_SETTINGS = (
    "UV_BUILD_CONSTRAINT",
    "UV_CONFIG_FILE",
    "UV_CONSTRAINT",
    "UV_DEFAULT_INDEX",
    "UV_EXCLUDE",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
    "UV_FORK_STRATEGY",
    "UV_INDEX",
    "UV_INDEX_STRATEGY",
    "UV_INDEX_URL",
    "UV_NO_BINARY",
    "UV_NO_BINARY_PACKAGE",
    "UV_NO_BUILD",
    "UV_NO_BUILD_PACKAGE",
    "UV_NO_CONFIG",
    "UV_NO_INDEX",
    "UV_NO_SOURCES",
    "UV_NO_SOURCES_PACKAGE",
    "UV_NO_SYSTEM_CONFIG",
    "UV_OVERRIDE",
    "UV_PRERELEASE",
    "UV_RESOLUTION",
    "UV_TORCH_BACKEND",
)

Progress = Callable[[str], None]


def base_python() -> str:
    """The interpreter that environments are made from: this one's, outside any environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def this_platform() -> Platform:
    """Where environments of this node are installed; the same for the life of the process."""
    libc = "".join(platform.libc_ver()) or platform.release()
    markers = {name: str(value) for name, value in default_environment().items()}
    # The kernel's release says nothing about which wheels fit and differs from node to node.
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
    return {name: redacted(value) for name, value in found.items() if value}


class Builder:
    """uv, as one node uses it.

    Args:
        settings: time-outs, niceness and retries.
        cache: uv's cache folder; on the file system of the store, or links become copies.
        uv_command: the uv to run, in place of the one that the `uv` package carries.
    """

    def __init__(
        self, settings: Settings, cache: Path, *, uv_command: tuple[str, ...] | None = None
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._uv = uv_command or (uv.find_uv_bin(),)

    async def lock(
        self, project: Path, *, exclude_newer: str | None = None, on_line: Progress | None = None
    ) -> str:
        """Resolve the pyproject.toml in `project`; returns the text of its uv.lock.

        A uv.lock that is already there is kept where it satisfies the project.

        Raises:
            ResolutionFailed: nothing satisfies the requirements; `detail` is uv's explanation.
            UvFailed: uv could not work: index not reachable, time-out.
        """
        code, output = await self._run_uv(
            ["lock", *_newer(exclude_newer)],
            project,
            timeout_s=self._settings.uv_lock_timeout_s,
            on_line=on_line,
        )
        if code == _UV_SAYS_NO:
            raise ResolutionFailed(
                "uv found no packages that satisfy the requirements",
                detail=_explanation(output),
                hint="change the requirements; every environment also holds the cluster's Ray",
            )
        if code:
            raise UvFailed(
                f"uv lock ended with exit code {code}",
                detail=_explanation(output),
                hint="is the package index reachable from the head node? see uv's words above",
            )
        return (project / "uv.lock").read_text(encoding="utf-8")

    async def sync(
        self,
        project: Path,
        venv: Path,
        request: BuildRequest,
        *,
        is_offline: bool,
        on_line: Progress | None = None,
    ) -> None:
        """Install what the lock in `project` names into `venv`, exactly.

        Raises:
            UvFailed: uv ended with an error; offline, most often a wheel is not in the cache.
        """
        command = ["sync", "--frozen", "--no-install-project", "--no-default-groups"]
        command += ["--group", "ray-envs"]
        for group in request.groups:
            command += ["--group", group]
        for extra in request.extras:
            command += ["--extra", extra]
        command += _newer(request.exclude_newer)
        if is_offline:
            command += ["--offline"]
        code, output = await self._run_uv(
            command,
            project,
            timeout_s=self._settings.uv_sync_timeout_s,
            on_line=on_line,
            environ={"UV_PROJECT_ENVIRONMENT": str(venv)},
        )
        if code:
            raise UvFailed(
                f"uv sync ended with exit code {code}",
                detail=_explanation(output),
                hint="see uv's words above; try again when the package index is reachable",
            )

    def without_bytecode(self, site_packages: Path, *, before: float) -> list[str]:
        """The names of dist-info folders that were linked before their byte-code was complete.

        Args:
            site_packages: of the environment.
            before: when uv began to link it (seconds since the epoch). A marker that is younger
                may stand for byte-code that came too late for this environment.
        """
        names = []
        for entry in os.scandir(site_packages):
            if entry.name.endswith(".dist-info"):
                try:
                    made_at = float(Path(entry.path, _marker_name()).read_text())
                except (OSError, ValueError):
                    made_at = float("inf")
                if made_at >= before:
                    names.append(entry.name)
        return sorted(names)

    async def compile(self, site_packages: Path, dist_infos: Iterable[str]) -> bool:
        """Byte-compile, in uv's cache, the wheels that these dist-info folders were linked from.

        The caller holds the node's compile lock. Returns whether the cache had all of them:
        where uv cannot cache a wheel (some local builds), there is nothing to compile there.

        As `unchecked-hash`: by time stamp, byte-code is worthless where uv copies instead of
        linking.
        """
        archives = self._archives()
        todo: list[Path] = []
        has_all = True
        for name in dist_infos:
            found = [
                path for path in archives.get(name, []) if _is_linked(path, site_packages, name)
            ]
            found = found or archives.get(name, [])
            has_all = has_all and bool(found)
            todo += [path for path in found if not (path / name / _marker_name()).exists()]
        if todo:
            await self._compile_folders(todo)
        for path in todo:
            for info in path.glob("*.dist-info"):
                (info / _marker_name()).write_text(repr(time.time()))
            _make_read_only(path)
        return has_all

    def _archives(self) -> dict[str, list[Path]]:
        """uv's unpacked wheels by the name of their dist-info folder."""
        found: dict[str, list[Path]] = {}
        for archive in self._cache.glob("archive-v*/*"):
            with suppress(OSError):
                for entry in os.scandir(archive):
                    if entry.name.endswith(".dist-info"):
                        found.setdefault(entry.name, []).append(archive)
        return found

    async def _compile_folders(self, folders: list[Path]) -> None:
        """Compile the modules below `folders`, with one process for each processor.

        Not with compileall's own pool: its workers would outlive us when we are killed.
        """
        modules = sorted(
            (os.path.getsize(path), path) for folder in folders for path in _modules_below(folder)
        )
        count = max(1, min(os.cpu_count() or 1, len(modules)))
        shares = [[path for _, path in modules[start::count]] for start in range(count)]
        command = [base_python(), "-I", "-m", "compileall", "-qq"]
        command += ["--invalidation-mode", "unchecked-hash", "-i", "-"]
        ended = await asyncio.gather(
            *(
                self._run(
                    command,
                    self._cache,
                    timeout_s=self._settings.uv_sync_timeout_s,
                    stdin="\n".join(share) + "\n",
                )
                for share in shares
            )
        )
        for code, output in ended:
            # 1: a file is not Python of this version; wheels ship such files that nobody imports.
            if code not in (0, 1):
                raise UvFailed(
                    f"compileall ended with exit code {code}", detail=_explanation(output)
                )

    async def verify(self, python: Path, request: BuildRequest, site_packages: Path) -> None:
        """Check that the environment starts, takes its hold, and has the promised versions.

        Versions are read from metadata: importing ray would cost as much as the whole build.

        Raises:
            UvFailed: it does not, although uv reported success.
        """
        installed = set()
        for entry in os.scandir(site_packages):
            name, dot, _ = entry.name.rpartition(".dist-info")
            if dot and os.path.exists(os.path.join(entry.path, "RECORD")):
                installed.add(canonicalize_name(name.rpartition("-")[0]))
        missing = {canonicalize_name(name) for name in request.packages} - installed
        if missing:
            raise UvFailed(f"uv reported success but did not install {', '.join(sorted(missing))}")
        code, output = await self._run(
            [
                str(python), "-I", "-c",
                f"import sys, {INSTALLED_AS} as i;"
                "print(i.hold_fd is not None, *sys.version_info[:3])",
            ],
            site_packages,
            timeout_s=60,
        )  # fmt: skip
        wanted = "True " + request.target.python.replace(".", " ")
        if code or output.strip() != wanted:
            raise UvFailed(
                f"the new interpreter says {output.strip()!r} (exit code {code}), not {wanted!r}"
            )

    async def try_start(self, python: Path, env_vars: dict[str, str]) -> None:
        """Start `python` with these variables, as a worker would be.

        Raises:
            InvalidInput: it does not start; `detail` is what it said.
        """
        code, output = await self._run(
            [str(python), "-c", ""], python.parent, timeout_s=60, environ=env_vars
        )
        if code:
            raise InvalidInput(
                f"the interpreter does not start with env_vars {', '.join(sorted(env_vars))}",
                detail=_explanation(output),
                hint="mend or remove the variable that it names",
            )

    async def _run_uv(
        self,
        command: list[str],
        project: Path,
        *,
        timeout_s: float,
        on_line: Progress | None = None,
        environ: dict[str, str] | None = None,
    ) -> tuple[int, str]:
        return await self._run(
            [*self._uv, *command, "--color", "never", "--no-progress", "--python", base_python()],
            project,
            timeout_s=timeout_s,
            on_line=on_line,
            environ={
                "UV_CACHE_DIR": str(self._cache),
                "UV_PYTHON_DOWNLOADS": "never",
                **(environ or {}),
            },
        )

    async def _run(
        self,
        command: list[str],
        cwd: Path,
        *,
        timeout_s: float,
        on_line: Progress | None = None,
        environ: dict[str, str] | None = None,
        stdin: str = "",
    ) -> tuple[int, str]:
        """Run `command`; returns its exit code and what it wrote, credentials redacted."""
        clean = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_UV}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=cwd,
                env={**clean, **(environ or {})},
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_dying_with_parent(self._settings.build_niceness),
            )
        except OSError as exc:
            raise StorageFailed(f"cannot start {command[0]}: {exc.strerror}") from exc
        lines: list[str] = []

        def tell(raw: bytes) -> None:
            line = redacted(raw.decode("utf-8", "replace").rstrip())
            lines.append(line)
            if on_line is not None:
                on_line(line)

        async def talk() -> None:
            if process.stdin is not None:
                with suppress(BrokenPipeError, ConnectionResetError):  # it ended before it read all
                    process.stdin.write(stdin.encode())
                    await process.stdin.drain()
                process.stdin.close()
            assert process.stdout is not None
            rest = b""
            while chunk := await process.stdout.read(_CHUNK):
                *whole, rest = (rest + chunk).split(b"\n")
                for raw in whole:
                    tell(raw)
            if rest:
                tell(rest)
            await process.wait()

        try:
            await asyncio.wait_for(talk(), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise UvFailed(
                f"{os.path.basename(command[0])} did not end within {timeout_s:g} s",
                detail=_explanation("\n".join(lines)),
                hint="raise RAY_ENVS_UV_SYNC_TIMEOUT_S or RAY_ENVS_UV_LOCK_TIMEOUT_S",
            ) from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # the group: uv's build backends too
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        assert process.returncode is not None
        return process.returncode, "\n".join(lines)


def _newer(date: str | None) -> list[str]:
    return ["--exclude-newer", date] if date else []


def _marker_name() -> str:
    """The file in a wheel's dist-info folder that says: byte-code of this Python is complete.

    Its content is the moment at which it was. It is linked into environments with the rest, and
    so tells for each whether the byte-code was there in time.
    """
    return f"ray_envs-bytecode.{sys.implementation.cache_tag}"


def _make_read_only(folder: Path) -> None:
    """Take the right to write from the files of an unpacked wheel; folders keep it.

    Environments link to these very files: an edit in one would reach all others. Superusers are
    not stopped by this.
    """
    for place, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            with suppress(OSError):  # a link that leads nowhere
                os.chmod(path, os.stat(path).st_mode & ~0o222)


def _modules_below(folder: Path) -> Iterator[str]:
    """The modules of an unpacked wheel. Outside `*.data/`: a `__pycache__` among a wheel's
    scripts makes uv refuse the wheel.
    """
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if not name.endswith(".data")]
        for name in files:
            if name.endswith(".py"):
                yield os.path.join(place, name)


def _is_linked(archive: Path, site_packages: Path, dist_info: str) -> bool:
    try:
        return os.path.samefile(archive / dist_info / "WHEEL", site_packages / dist_info / "WHEEL")
    except OSError:
        return False


def _explanation(output: str) -> str:
    """uv's last lines, without those that say which interpreter it used."""
    lines = [line for line in output.splitlines() if line and not line.startswith("Using CPython")]
    return "\n".join(lines[-_DETAIL_LINES:])


def _dying_with_parent(niceness: int) -> Callable[[], None]:
    """What the child does before it becomes uv: a lower priority, and death with its parent."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died between fork and prctl
                os._exit(1)
        os.nice(niceness)

    return prepare


__all__ = [
    "Builder",
    "base_python",
    "index_settings",
    "this_platform",
    "this_target",
    "uv_version",
]
