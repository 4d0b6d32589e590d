"""Runs one item of a batch in a worker and reports it. Sent by value with each item.

`run_item` takes a request (see `Payload.request`), the pickled function (None if the request has an
entrypoint) and the zip archive of the code folder (or None). It yields `{"started_at", "node_id",
"pid"}` before it does anything else; then the outcome; then the value as it is, if
`request["as_json"]` is false and the item succeeded. Ray comes from `sys.modules`: the worker has
imported it. Docstrings of functions are sent too, and comments are not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ray_envs.worker.check import what_is_wrong_here
from ray_envs.worker.code import unpacked, use_code
from ray_envs.worker.hold import INSTALLED_AS
from ray_envs.worker.outcome import as_json, described, in_words
from ray_envs.worker.paths import current_folder, module_names, put_foreign_paths_last, shadowed
from ray_envs.worker.restoring import restorer


def run_item(request: dict[str, Any], payload: bytes | None, code: bytes | None) -> Iterator[Any]:
    """Run one item and report it. End the worker if it is not fit for another item."""
    outcome: dict[str, Any] = {}
    try:
        yield from _steps(request, payload, code, outcome)
    except Exception as exc:  # an item before this one has changed what we need
        if not outcome.get("is_told"):
            yield _unfit(outcome, f"the worker was damaged: {type(exc).__name__}: {exc}")
        _end_worker()
    if outcome["is_unfit"]:
        _end_worker()


def _steps(
    request: dict[str, Any], payload: bytes | None, code: bytes | None, outcome: dict[str, Any]
) -> Iterator[Any]:
    """Run and report an item; what is raised here is not the payload's."""
    import time

    ray = sys.modules["ray"]
    started = time.time()
    yield {
        "started_at": started,
        "node_id": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
    }
    clock = time.monotonic()
    outcome.update(_new_outcome(started))
    value, folder = None, current_folder()
    wrong = _what_is_wrong(request, outcome)
    if wrong:
        _unfit(outcome, wrong)
    else:
        restore = None
        try:
            outcome["kind"] = "entrypoint"
            outcome["shadowed"] = put_foreign_paths_last()
            function = _load(request, payload, code, outcome)
            _check_call(function, request)
            outcome["kind"] = "payload"
            outcome["has_run"] = True
            restore = restorer(folder)  # what an import has set stays, as its modules do
            value = function(*request["args"], **request["kwargs"])
            if request["as_json"]:
                value = as_json(value)
                outcome["value"] = value
            else:
                outcome["text"] = in_words(value)
        except (Exception, SystemExit, KeyboardInterrupt) as exc:
            outcome["error"] = described(exc)
        outcome["duration_s"] = time.monotonic() - clock
        wrong = _what_is_wrong(request, outcome, restore)
        outcome["is_unfit"] = bool(wrong)
        if wrong and outcome["error"] is not None:  # it failed because the disk was lost meanwhile
            outcome["kind"] = "environment"
            outcome["error"] |= {"type": "WrongEnvironment", "message": wrong}
    outcome["is_told"] = True
    yield outcome
    if not request["as_json"] and outcome["error"] is None:
        yield value


def _unfit(outcome: dict[str, Any], wrong: str) -> dict[str, Any]:
    """Make `outcome` that of an item that met a worker in which no item can run."""
    error = {"type": "WrongEnvironment", "message": wrong, "traceback": ""}
    given = {"is_first": False, "has_run": False, **outcome}
    outcome.update({**given, "kind": "environment", "error": error, "is_unfit": True})
    return outcome


def _end_worker() -> None:
    """End this process. First the driver gets what was yielded; then it kills this worker itself.

    An error here instead would let Ray decide, which may have lost its own files.
    """
    import time

    try:
        time.sleep(10)
    finally:
        os._exit(1)


def _what_is_wrong(
    request: dict[str, Any], outcome: dict[str, Any], restore: Callable[[], None] | None = None
) -> str:
    """Restore what an item has changed; return why no item can run here, empty if one can."""
    import json
    import time

    try:
        if restore is not None:
            restore()
        sys.modules["ray"]  # an item may have emptied sys.modules, or patched what we need
        time.sleep(0)
        time.time()
        time.monotonic()
        json.loads(json.dumps([os.getpid()]))
        return what_is_wrong_here(request, outcome)
    except Exception as exc:
        return f"the worker was damaged: {type(exc).__name__}: {exc}"


def _new_outcome(started_at: float) -> dict[str, Any]:
    """Return the outcome of an item that has not run yet."""
    memory = vars(sys.modules.get(INSTALLED_AS, os))
    is_first = not memory.get("_has_run_items")
    memory["_has_run_items"] = True
    return {
        "python": ".".join(str(n) for n in sys.version_info[:3]),
        "ray": sys.modules["ray"].__version__,
        "started_at": started_at,
        "shadowed": [],
        "kind": "payload",
        "has_run": False,
        "duration_s": 0.0,
        "is_unfit": False,
        #: If something is wrong here, no earlier item of this worker can be the reason.
        "is_first": is_first,
        "error": None,
        "value": None,
    }


def _load(
    request: dict[str, Any], payload: bytes | None, code: bytes | None, outcome: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function to call: the unpickled payload or the imported entrypoint."""
    folder = None
    if code is not None:
        store = os.path.dirname(os.path.dirname(os.path.realpath(request["venv"])))
        folder = unpacked(os.path.dirname(store), request["code_sha256"], code)
    use_code(folder)
    if folder is not None:
        outcome["shadowed"] = sorted({*outcome["shadowed"], *shadowed([folder])})
    if payload is not None:
        function: Callable[..., Any] = sys.modules["ray"].cloudpickle.loads(payload)
        return function
    import importlib

    entrypoint = request["entrypoint"]
    module_name, _, name = entrypoint.partition(":")
    module = importlib.import_module(module_name)
    top = module_name.split(".")[0]
    if folder is not None and top in module_names(folder):
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
