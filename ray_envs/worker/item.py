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
from ray_envs.worker.outcome import as_json, described
from ray_envs.worker.paths import current_folder, module_names, put_foreign_paths_last, shadowed


def run_item(request: dict[str, Any], payload: bytes | None, code: bytes | None) -> Iterator[Any]:
    """Run one item and report it."""
    import time

    ray = sys.modules["ray"]
    started = time.time()
    yield {
        "started_at": started,
        "node_id": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
    }
    clock = time.monotonic()
    outcome = _new_outcome(started)
    value = None
    folder = current_folder()
    wrong = what_is_wrong_here(request, outcome)
    if wrong:
        outcome["kind"] = "environment"
        outcome["error"] = {"type": "WrongEnvironment", "message": wrong, "traceback": ""}
    else:
        try:
            outcome["kind"] = "entrypoint"
            outcome["shadowed"] = put_foreign_paths_last()
            function = _load(request, payload, code, outcome)
            _check_call(function, request)
            outcome["kind"] = "payload"
            outcome["has_run"] = True
            value = function(*request["args"], **request["kwargs"])
            if request["as_json"]:
                value = as_json(value)
                outcome["value"] = value
        except (Exception, SystemExit) as exc:
            outcome["error"] = described(exc)
            wrong = what_is_wrong_here(request, outcome)
            if wrong:  # it failed because the disk was lost meanwhile
                outcome["kind"] = "environment"
                outcome["error"] |= {"type": "WrongEnvironment", "message": wrong}
    outcome["duration_s"] = time.monotonic() - clock
    if folder is not None:  # later items need it, and the payload may have changed or deleted it
        import contextlib

        with contextlib.suppress(OSError):  # it is gone; the outcome stays
            os.chdir(folder)
    yield outcome
    if not request["as_json"] and outcome["error"] is None:
        yield value


def _new_outcome(started_at: float) -> dict[str, Any]:
    """Return the outcome of an item that has not run yet."""
    return {
        "python": ".".join(str(n) for n in sys.version_info[:3]),
        "ray": sys.modules["ray"].__version__,
        "started_at": started_at,
        "shadowed": [],
        "kind": "payload",
        "has_run": False,
        "error": None,
        "value": None,
    }


def _load(
    request: dict[str, Any], payload: bytes | None, code: bytes | None, outcome: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function to call: the unpickled payload or the imported entrypoint."""
    folder = None if code is None else unpacked(request["code_sha256"], code)
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
