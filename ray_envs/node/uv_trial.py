"""Tries the uv of this node: whether its locks and its cache are as they are read here.

uv promises neither the format of its cache nor its layout. So each uv is tried once on each root,
with a tiny wheel, a scratch cache and no network, before it is used. Nothing else of the node
changes. `uv_entries` knows the layout, `probing` tells `doctor`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import uv
from pydantic import Field, ValidationError

from ray_envs.decisions import locks
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.disk.files import storage_errors, write_atomically
from ray_envs.disk.processes import dying_with_parent, last_words
from ray_envs.errors import RayEnvsError, UvFailed
from ray_envs.models import RAY_GROUP, Installed
from ray_envs.node.interpreter import base_python, this_platform, uv_version
from ray_envs.node.probing import how_linked
from ray_envs.node.store import Store
from ray_envs.node.uv_cache import UvCache
from ray_envs.node.uv_entries import Cached, layout_of
from ray_envs.validation import Model

#: How long each of the three commands may take, in seconds. They take 0.1 s together.
_TIMEOUT_S = 60.0
#: How many versions of uv a root remembers.
_KEPT = 16
#: The format of `uv.lock` that `decisions.locks` reads.
_LOCK_VERSION = 1
_NAME, _MODULE, _VERSION = "ray-envs-trial", "ray_envs_trial", "1.0"
_PROJECT = f"""\
[project]
name = "trial"
version = "0"
requires-python = ">=3.8"
[dependency-groups]
{RAY_GROUP} = ["{_NAME}"]
"""
_HINT = "install another uv on this node: `pip install 'uv>=0.9,<1'`"
#: The layout of the cache of the uv with this version, as far as this process knows it.
_layouts: dict[str, str] = {}


class _Trials(Model):
    """What was tried with success: the layout of the cache, by uv's version."""

    layouts: dict[str, str] = Field(default_factory=dict)


class UvTrial:
    """The trials on one root. One that went well is kept there, in `uv-trials.json`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file = store.root / "uv-trials.json"
        self._trying = asyncio.Lock()

    async def check(self, *, is_forced: bool = False) -> None:
        """Check that the uv of this node can be used, unless it was tried on this root before.

        Raises:
            UvFailed: it cannot; the error says what is different.
            StorageFailed: the root cannot be written.
        """
        async with self._trying:
            version, known = uv_version(), self._known()
            if version not in known or is_forced:
                with self._store.scratch({}) as folder:
                    layout = await asyncio.to_thread(tried, folder)
                known = {version: layout, **{k: v for k, v in known.items() if k != version}}
                kept = _Trials(layouts=dict(list(known.items())[:_KEPT]))
                with suppress(OSError):  # a full disk: the next agent tries again
                    write_atomically(self._file, kept.model_dump_json(), is_durable=False)
            _layouts[version] = known[version]

    def _known(self) -> dict[str, str]:
        try:
            return _Trials.model_validate_json(self._file.read_bytes()).layouts
        except (OSError, ValidationError):  # none yet; or of another version
            return {}


def layout_here() -> str:
    """Return the layout of the cache of this node's uv; tries it if this process has not.

    Raises `UvFailed`: it cannot be used.
    """
    version = uv_version()
    if version not in _layouts:
        with tempfile.TemporaryDirectory(prefix="ray_envs-trial-") as folder:
            _layouts[version] = tried(Path(folder))
    return _layouts[version]


def tried(folder: Path) -> str:
    """Try the uv of this node in the empty `folder`. Return the layout of its cache.

    Raises:
        UvFailed: uv fails, or does something else than is expected here.
        StorageFailed: the folder cannot be written.
    """
    project, cache, other = (folder / name for name in ("project", "cache", "other-cache"))
    with storage_errors("try uv"):
        project.mkdir()
        (project / "pyproject.toml").write_text(_PROJECT)
        pin = _make_index(folder / "index")
        package = Installed(name=_NAME, version=_VERSION, pin=f"sha256:{pin}", is_built=False)
        _run(project, cache, "lock", "--default-index", (folder / "index").as_uri())
        _check_lock((project / "uv.lock").read_text(encoding="utf-8"), package)
        cached = _synced(project, cache, package)
        _copy(UvCache(cache), UvCache(other), cached)
        again = _synced(project, other, package)
        if again.archives != tuple(other / path.relative_to(cache) for path in cached.archives):
            raise _different("it does not use a wheel that comes from the cache of another node")
        return layout_of(cache)


def _make_index(folder: Path) -> str:
    """Make a package index with one wheel; returns the sha256 of the wheel."""
    info = f"{_MODULE}-{_VERSION}.dist-info"
    files = {
        f"{_MODULE}.py": "value = 1\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {_VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: ray_envs\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = _record(files) + f"{info}/RECORD,,\n"
    wheel = folder / _NAME / f"{_MODULE}-{_VERSION}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    link = f'<a href="{wheel.name}#sha256={sha256}">{wheel.name}</a>'
    (wheel.parent / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    return sha256


def _record(files: Mapping[str, str]) -> str:
    rows = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rows.append(f"{name},sha256={digest.rstrip('=')},{len(text)}\n")
    return "".join(rows)


def _run(project: Path, cache: Path, *command: str) -> None:
    """Run a command of uv. No setting of this node counts: only uv itself is tried."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    words = [
        uv.find_uv_bin(), *command, "--offline", "--no-config", "--color", "never",
        "--no-progress", "--python", base_python(),
    ]  # fmt: skip
    environ |= {"UV_CACHE_DIR": str(cache), "UV_PYTHON_DOWNLOADS": "never"}
    environ.pop("VIRTUAL_ENV", None)
    try:
        done = subprocess.run(
            words, cwd=project, env=environ, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT_S, check=False, preexec_fn=dying_with_parent(niceness=0),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _different(f"`uv {command[0]}` does not end within {_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise _different(
            f"`uv {command[0]}` ends with exit code {done.returncode}",
            detail=last_words(done.stdout + done.stderr),
        )


def _check_lock(lock: str, package: Installed) -> None:
    try:
        version = parsed_toml(lock, where="uv.lock").get("version")
        if version != _LOCK_VERSION:
            raise _different(
                f"its uv.lock has the version {version}, and ray_envs reads {_LOCK_VERSION}"
            )
        found = locks.installed(lock, this_platform())
    except UvFailed:
        raise
    except (RayEnvsError, KeyError, TypeError, AttributeError) as exc:
        raise _different("its uv.lock cannot be read", detail=f"{exc!r}") from exc
    if found != (package,):
        raise _different("its uv.lock is read as another package", detail=str(found))


def _synced(project: Path, cache: Path, package: Installed) -> Cached:
    """Install the lock with `cache`. Return its entry of the package, which must be as expected."""
    shutil.rmtree(project / ".venv", ignore_errors=True)
    _run(
        project, cache, "sync", "--frozen", "--no-install-project", "--no-default-groups",
        "--group", RAY_GROUP,
    )  # fmt: skip
    installed = next((project / ".venv").glob(f"lib/python3*/site-packages/{_MODULE}.py"), None)
    if installed is None:
        raise _different("`uv sync` does not install what is in the lock")
    try:
        cached = UvCache(cache).cached(package)
    except UnicodeError as exc:
        raise _different("its cache cannot be read", detail=str(exc)) from exc
    if cached is None:
        raise _different(f"its cache has another layout: {layout_of(cache) or 'no known folder'}")
    (archive,) = cached.archives
    source = archive / f"{_MODULE}.py"
    is_linked = source.is_file() and source.samefile(installed)
    if installed.is_symlink() or (how_linked(cache, project) == "hard link" and not is_linked):
        raise _different("it does not link files from its cache into an environment")
    return cached


def _copy(cache: UvCache, other: UvCache, cached: Cached) -> None:
    """Put an entry of one cache into another one, as nodes do."""

    def within(path: Path) -> str:
        return str(path.relative_to(cache.folder))

    leads: list[tuple[str, str | None]] = []
    for known in cache.folder.glob("interpreter-v*"):  # uv need not ask the interpreter again
        shutil.copytree(known, other.folder / known.name)
    with other.arriving() as arriving:
        for archive in cached.archives:
            shutil.copytree(archive, arriving / within(archive))
        for lead in cached.leads:
            if lead.is_symlink():
                target = Path(os.path.normpath(lead.parent / os.readlink(lead)))
                leads.append((within(lead), within(target)))
            else:
                (arriving / within(lead)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(lead, arriving / within(lead))
                leads.append((within(lead), None))
        other.move_in(arriving, map(within, cached.archives), leads)


def _different(why: str, *, detail: str = "") -> UvFailed:
    return UvFailed(
        f"uv {uv_version()} cannot be used on this node: {why}", detail=detail, hint=_HINT
    )
