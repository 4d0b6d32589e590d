"""The only code that runs inside a prepared environment; standard library only.

Two parts. `take_hold` is installed in every environment (with this file, as `_ray_envs_inside`)
and runs at each interpreter start there: it proves to a collector that the environment is in use.
`run_item` is sent by value with each item of a batch: it checks that the worker is where it was
promised to be before the payload runs, and reports what it saw. Ray is met only through
`sys.modules`: the worker that calls us has imported it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing itself is not imported: this file runs at every interpreter start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

#: The name under which this file stands in an environment's site-packages.
INSTALLED_AS = "_ray_envs_inside"

#: The descriptor whose shared lock is the hold; open for as long as the process lives.
hold_fd: int | None = None


def take_hold() -> None:
    """Take the shared lock that says that this environment is in use, until the process ends.

    The lock belongs to the open file, so a forked child keeps it and `kill -9` drops it. Exits the
    process where a collector holds the exclusive lock: the files are about to go away, and a
    process that went on would fail later, at an import, with a misleading error.

    The time stamp of the hold is the last use of the environment: renewed now and at the end.
    """
    global hold_fd  # noqa: PLW0603 - one process, one hold

    import atexit
    import fcntl

    venv = __file__
    for _ in range(4):  # .venv/lib/pythonX.Y/site-packages/_ray_envs_inside.py
        venv = os.path.dirname(venv)
    path = os.path.dirname(venv) + ".hold"
    if _is_open(hold_fd, path):  # Python reads the .pth files of a venv twice
        return
    try:
        hold_fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:  # out of the way of programs that close every low descriptor
            high = fcntl.fcntl(hold_fd, fcntl.F_DUPFD_CLOEXEC, 512)
            os.close(hold_fd)
            hold_fd = high
        except OSError:  # the limit of open files is below that
            pass
        is_held = shared_lock(hold_fd)
    except OSError as exc:
        raise SystemExit(f"ray_envs: cannot hold this environment: {exc}") from None
    if not is_held:
        raise SystemExit("ray_envs: this environment is being removed: " + venv)
    _renew(path, os.getpid())
    atexit.unregister(_renew)  # a hold that was closed and is taken again
    atexit.register(_renew, path, os.getpid())


def _renew(hold: str, pid: int) -> None:
    """Make now the last use of the environment of `hold`, unless this is a forked child of `pid`.

    By name: at the end of the process, the descriptor may be that of another file.
    """
    if os.getpid() == pid:
        try:  # noqa: SIM105 - contextlib is not imported at every interpreter start
            os.utime(hold)
        except OSError:  # the file is another user's; the agent renews what is held
            pass


def shared_lock(fd: int) -> bool:
    """Take a shared lock on `fd`; False where somebody keeps the exclusive one.

    Whoever only looks whether an environment is held has it for an instant: so, a few tries.
    """
    import fcntl

    for _ in range(20):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            import time

            time.sleep(0.02)
        else:
            return True
    return False


def run_item(request: dict[str, Any], payload: bytes | None, code: bytes | None) -> Iterator[Any]:
    """Run one item and report it, in three steps of a generator.

    Yields, in this order: `{"started_at", "node_id", "pid"}` before anything else happens; the
    outcome (see `_outcome`); and, where `request["as_json"]` is false and the payload succeeded,
    its value as it is.

    Args:
        request: `key`, `venv`, `python`, `ray` (what was promised), `entrypoint` or None, `args`,
            `kwargs`, `as_json` and `code_sha256`.
        payload: the pickled function, where there is no entrypoint.
        code: the zip archive of the code folder, or None.
    """
    import time

    ray = sys.modules["ray"]
    started = time.time()
    yield {
        "started_at": started,
        "node_id": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
    }
    clock = time.monotonic()
    outcome = {
        "python": ".".join(str(n) for n in sys.version_info[:3]),
        "ray": ray.__version__,
        "started_at": started,
        "shadowed": [],
        "kind": "payload",
        "has_run": False,
        "error": None,
        "value": None,
    }
    value = None
    folder = _current_folder()
    wrong = _what_is_wrong_here(request, outcome)
    if wrong:
        outcome["kind"] = "environment"
        outcome["error"] = {"type": "WrongEnvironment", "message": wrong, "traceback": ""}
    else:
        try:
            outcome["kind"] = "entrypoint"
            outcome["shadowed"] = _put_foreign_paths_last()
            function = _load(request, payload, code, outcome)
            _check_call(function, request)
            outcome["kind"] = "payload"
            outcome["has_run"] = True
            value = function(*request["args"], **request["kwargs"])
            if request["as_json"]:
                value = _as_json(value)
                outcome["value"] = value
        except (Exception, SystemExit) as exc:
            outcome["error"] = _described(exc)
            wrong = _what_is_wrong_here(request, outcome)
            if wrong:  # the disk was lost under it: that is what it failed of
                outcome["kind"] = "environment"
                outcome["error"] |= {"type": "WrongEnvironment", "message": wrong}
    outcome["duration_s"] = time.monotonic() - clock
    if folder is not None:  # a payload that left its folder, or removed it, must not spoil others
        import contextlib

        with contextlib.suppress(OSError):  # it is gone; the outcome of this payload stands
            os.chdir(folder)
    yield outcome
    if not request["as_json"] and outcome["error"] is None:
        yield value


def _what_is_wrong_here(request: dict[str, Any], outcome: dict[str, Any]) -> str:
    """Why this process is not in the environment that was promised, or an empty string."""
    import json

    venv = os.path.realpath(request["venv"])
    if os.path.realpath(sys.prefix) != venv:
        return f"the worker runs in {sys.prefix}, not in {venv}"
    try:
        with open(os.path.join(os.path.dirname(venv), "record.json"), encoding="utf-8") as file:
            key = json.load(file)["key"]
    except (OSError, ValueError, KeyError) as exc:
        return f"the environment {venv} has no readable record: {exc}"
    if key != request["key"]:
        return "the environment {} has the key {}, not {}".format(venv, key, request["key"])
    for name in ("python", "ray"):
        if outcome[name] != request[name]:
            return f"the worker has {name} {outcome[name]}, not {request[name]}"
    hold = sys.modules.get(INSTALLED_AS)
    if hold is None:
        return f"the worker does not hold the environment {venv}"
    if not _is_open(hold.hold_fd, os.path.dirname(venv) + ".hold"):
        try:  # an earlier payload has closed it
            hold.take_hold()
        except SystemExit as exc:
            return str(exc)
    return ""


def _is_open(fd: int | None, path: str) -> bool:
    """Whether `fd` is an open descriptor of the file `path`."""
    try:
        return fd is not None and os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # removed by somebody
        return None


def _is_foreign(path: str) -> bool:
    """Whether `path` is neither the environment's, the standard library's nor Python's zip."""
    if not path and _current_folder() is None:
        return True
    real = os.path.realpath(path or ".") + os.sep
    if real.startswith(os.path.realpath(sys.prefix) + os.sep) or path.endswith(".zip"):
        return False
    base = os.path.realpath(sys.base_prefix) + os.sep
    return not (real.startswith(base) and "site-packages" not in real and real != base)


def _put_foreign_paths_last() -> list[str]:
    """Move what is neither the environment nor the standard library behind them on sys.path.

    Ray puts the driver's folders first in every worker: a local `pgvector/` would win over the
    locked one. Returns the names of modules that stand in both; the environment's win now.
    """
    foreign = [path for path in sys.path if _is_foreign(path)]
    sys.path[:] = [path for path in sys.path if path not in foreign] + foreign
    return _shadowed(foreign)


_shadowed_by_folder: dict[str, set[str]] = {}


def _shadowed(folders: Iterable[str]) -> list[str]:
    """The names of modules in `folders` that site-packages of this environment has too."""
    names: set[str] = set()
    for folder in folders:
        if folder not in _shadowed_by_folder:
            site = [path for path in sys.path if path.endswith("site-packages")]
            theirs = set().union(*(_module_names(path) for path in site)) if site else set()
            _shadowed_by_folder[folder] = _module_names(folder) & theirs
        names |= _shadowed_by_folder[folder]
    return sorted(names)


def _module_names(folder: str) -> set[str]:
    try:
        entries = list(os.scandir(folder or "."))
    except OSError:
        return set()
    names = set()
    for entry in entries:
        stem, extension = os.path.splitext(entry.name)
        if extension in (".py", ".so") or (
            not extension and os.path.isfile(os.path.join(entry.path, "__init__.py"))
        ):
            names.add(stem.split(".")[0])
    return names


def _load(
    request: dict[str, Any], payload: bytes | None, code: bytes | None, outcome: dict[str, Any]
) -> Callable[..., Any]:
    """The function to call: the unpickled payload, or the entrypoint imported here."""
    folder = None if code is None else _unpacked(request["code_sha256"], code)
    _use_code(folder)
    if folder is not None:
        outcome["shadowed"] = sorted({*outcome["shadowed"], *_shadowed([folder])})
    if payload is not None:
        function: Callable[..., Any] = sys.modules["ray"].cloudpickle.loads(payload)
        return function
    import importlib

    entrypoint = request["entrypoint"]
    module_name, _, name = entrypoint.partition(":")
    module = importlib.import_module(module_name)
    top = module_name.split(".")[0]
    if folder is not None and top in _module_names(folder):
        place = os.path.realpath(getattr(module, "__file__", None) or "")
        if not place.startswith(os.path.realpath(folder) + os.sep):
            raise ImportError(
                f"the code folder and the environment both have a module {top!r}; rename yours"
            )
    try:
        found: Callable[..., Any] = getattr(module, name)
    except AttributeError:
        raise AttributeError(
            f"{module_name} has no function {name!r} (entrypoint {entrypoint!r})"
        ) from None
    if not callable(found):
        raise TypeError(f"the entrypoint {entrypoint!r} is not a function")
    return found


def _code_folders() -> str:
    """Where this user's code folders are unpacked on this machine."""
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"ray_envs-code-{os.getuid()}")


def _unpacked(sha256: str, code: bytes) -> str:
    """The folder that holds the archive `code`, unpacked once per machine and content."""
    import io
    import shutil
    import tempfile
    import zipfile

    parent = _code_folders()
    os.makedirs(parent, mode=0o700, exist_ok=True)
    if os.stat(parent).st_uid != os.getuid():
        raise PermissionError(f"{parent} belongs to another user")
    folder = os.path.join(parent, sha256)
    # Looked at once a worker; kept where every batch of this worker finds it.
    checked: set[str] = vars(sys.modules.get(INSTALLED_AS, os)).setdefault("_checked_code", set())
    if folder in checked and os.path.isdir(folder):
        os.utime(folder)  # it is in use: see `_sweep`
        return folder
    with zipfile.ZipFile(io.BytesIO(code)) as archive:
        if not _is_unpacked(archive, folder):
            _sweep(parent)
            scratch = tempfile.mkdtemp(dir=parent)
            try:
                archive.extractall(scratch)
                if not _is_unpacked(archive, folder):  # else another worker was first
                    if os.path.isdir(folder):  # changed by a payload or a cleaner of /tmp
                        os.rename(folder, scratch + ".old")
                    os.rename(scratch, folder)
            except OSError:
                if not _is_unpacked(archive, folder):
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                shutil.rmtree(scratch + ".old", ignore_errors=True)
    checked.add(folder)
    os.utime(folder)
    return folder


def _sweep(parent: str) -> None:
    """Delete code that no item has used for a week."""
    import shutil
    import time

    with os.scandir(parent) as entries:
        for entry in entries:
            try:
                is_old = time.time() - entry.stat().st_mtime > 7 * 24 * 3600
            except OSError:  # another worker has just renamed its scratch folder
                continue
            if is_old:
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_unpacked(archive: Any, folder: str) -> bool:
    """Whether `folder` holds every file of the zip `archive` as it is there."""
    import zlib

    try:
        for info in archive.infolist():
            if not info.is_dir():
                with open(os.path.join(folder, info.filename), "rb") as file:
                    if zlib.crc32(file.read()) != info.CRC:
                        return False
    except OSError:
        return False
    return os.path.isdir(folder)


def _use_code(folder: str | None) -> None:
    """Put `folder` behind the environment on sys.path; forget other code and its modules.

    A warm worker may have run other code before. It is recognised by where it lies, not by what
    this module remembers: each batch sends a fresh copy of this module.
    """
    parent = os.path.realpath(_code_folders()) + os.sep
    keep = None if folder is None else os.path.realpath(folder) + os.sep

    def is_old(path: str) -> bool:
        real = os.path.realpath(path) + os.sep
        return real.startswith(parent) and not (keep and real.startswith(keep))

    names = set() if folder is None else _module_names(folder)
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        # Also a copy of this code that came from the driver's folder.
        is_copy = name.split(".")[0] in names and name != "__main__" and path and _is_foreign(path)
        if is_old(path) or (is_copy and not (keep and os.path.realpath(path).startswith(keep))):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != folder and not (path and is_old(path))]
    if folder is not None:
        import importlib

        # Behind the environment, before the driver's folders: those may hold another copy.
        own_places = [n for n, path in enumerate(sys.path) if not _is_foreign(path)]
        sys.path.insert(own_places[-1] + 1 if own_places else 0, folder)
        importlib.invalidate_caches()


def _check_call(function: Callable[..., Any], request: dict[str, Any]) -> None:
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions have none
        return
    try:
        signature.bind(*request["args"], **request["kwargs"])
    except TypeError as exc:
        raise TypeError(
            "{}{}: {}".format(getattr(function, "__name__", function), signature, exc)
        ) from None


def _as_json(value: Any) -> Any:
    """`value` as plain data, the way a JSON file will hold it."""
    import json

    def plain(thing: Any) -> Any:
        if type(thing).__module__ == "numpy" and getattr(thing, "ndim", None) == 0:
            return thing.item()
        raise TypeError(f"{repr(thing)[:80]} of type {type(thing).__qualname__}")

    try:
        text = json.dumps(value, default=plain, allow_nan=False, ensure_ascii=False)
        text.encode()  # half a surrogate pair is no text that a file could hold
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as exc:  # also NaN, a circle, too deep
        raise TypeError(f"the value is not JSON: {exc}") from None


#: How much of an error travels: a message may hold a whole array.
_MESSAGE_LENGTH = 10_000
_TRACEBACK_LENGTH = 20_000


def _described(exc: BaseException) -> dict[str, str]:
    """`exc` as plain data, without the frames of this file."""
    import traceback

    frames = exc.__traceback__
    while (
        frames is not None and frames.tb_frame.f_code.co_filename == _described.__code__.co_filename
    ):
        frames = frames.tb_next
    try:
        message = str(exc)
        text = "".join(traceback.format_exception(type(exc), exc, frames))
    except Exception as broken:  # a payload's own __str__
        message = text = f"<no message: its __str__ raised {type(broken).__name__}>"
    module = type(exc).__module__
    name = type(exc).__qualname__
    return {
        "type": name if module == "builtins" else f"{module}.{name}",
        "message": _writable(message[:_MESSAGE_LENGTH]),
        "traceback": _writable(text[-_TRACEBACK_LENGTH:]),
    }


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def actor_shell(module: str, name: str, verbs: Iterable[str]) -> type:
    """A class that is `module.name` for Ray, and imports it only where it runs.

    Sent by value to a worker of the cluster's own Python. Ray puts the folders of the job that
    creates an actor before its packages: a `tomlkit.py` there would end the actor. So they go
    behind first. And an error of ours would need ray_envs where it arrives, so that each verb
    turns it into a `RuntimeError` of its text and a plain dict.
    """

    def __init__(self: Any, **arguments: Any) -> None:
        _put_foreign_paths_last()
        import importlib

        self._actor = getattr(importlib.import_module(module), name)(**arguments)

    def travelling(verb: str) -> Callable[..., Any]:
        async def call(self: Any, **arguments: Any) -> Any:
            try:
                return await getattr(self._actor, verb)(**arguments)
            except Exception as exc:
                if not hasattr(exc, "to_dict"):
                    raise
                raise RuntimeError(f"{type(exc).__name__}: {exc}", exc.to_dict()) from None

        call.__name__ = call.__qualname__ = verb
        return call

    return type(name, (), {"__init__": __init__, **{verb: travelling(verb) for verb in verbs}})
