"""Runs items of a batch in a worker, one after the other, and reports each. Sent by value.

`run_items` takes what all items share (see `Payload.shared`), their arguments, the pickled function
(None if there is an entrypoint) and the zip archive of the code folder (or None). It yields a
message before each item, and one after the last: `began` is `{"started_at", "node_id", "pid"}` of
the item that starts now, `ended` the outcome of the one before. The value of an item is in its
outcome; one that only Ray can send follows the outcome as a message of its own. Ray comes from
`sys.modules`: the worker has imported it. Docstrings of functions are sent too, and comments are
not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ray_envs.worker.check import what_is_wrong_here
from ray_envs.worker.code import unpacked, use_code
from ray_envs.worker.forked import in_child
from ray_envs.worker.hold import INSTALLED_AS
from ray_envs.worker.outcome import as_json, described, in_words
from ray_envs.worker.paths import current_folder, module_names, put_foreign_paths_last, shadowed
from ray_envs.worker.restoring import restorer


def run_items(
    shared: dict[str, Any], calls: list[dict[str, Any]], payload: bytes | None, code: bytes | None
) -> Iterator[Any]:
    """Run items and report each. End the worker if it is not fit for another item.

    Items that have not begun after `shared["budget_s"]` seconds are left to others: the last
    message is then `{"is_over": True, …}`.
    """
    import time

    outcome: dict[str, Any] = {}
    told: dict[str, Any] = {}
    value, until = None, time.monotonic() + shared["budget_s"]
    for number, call in enumerate(calls):
        if number and time.monotonic() > until:
            told["is_over"] = True
            break
        try:
            yield {**told, "began": _began(outcome)}
            value = _ran({**shared, **call}, payload, code, outcome)
        except Exception as exc:  # an item before this one has changed what we need
            _unfit(outcome, f"the worker was damaged: {type(exc).__name__}: {exc}")
        told = {"ended": dict(outcome)}
        if outcome["error"] is None and "value" not in outcome:
            yield told
            yield value
            told = {}
        if outcome["is_unfit"]:
            break
    if told:
        yield told
    if outcome["is_unfit"]:
        _end_worker()


def _began(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of an item that starts now, and make `outcome` that of this item."""
    import time

    outcome.clear()
    outcome.update(_new_outcome(time.time()))
    return {
        "started_at": outcome["started_at"],
        "node_id": sys.modules["ray"].get_runtime_context().get_node_id(),
        "pid": os.getpid(),
    }


def _ran(
    request: dict[str, Any], payload: bytes | None, code: bytes | None, outcome: dict[str, Any]
) -> Any:
    """Run an item, fill in its outcome, return its value; what is raised is not the payload's."""
    import time

    clock = time.monotonic()
    value, folder = None, current_folder()
    wrong = _what_is_wrong(request, outcome)
    if wrong:
        _unfit(outcome, wrong)
        return None
    restore = None
    try:
        outcome["kind"] = "entrypoint"
        outcome["shadowed"] = put_foreign_paths_last()
        function = _load(request, payload, code, outcome)
        _check_call(function, request)
        if request["isolation"] == "process":
            value = _call_in_child(function, request, outcome)
        else:
            restore = restorer(folder)  # what an import has set stays, as its modules do
            value = _call(function, request, outcome)
    except (Exception, SystemExit, KeyboardInterrupt) as exc:
        outcome["error"] = described(exc)
    outcome["duration_s"] = time.monotonic() - clock
    wrong = _what_is_wrong(request, outcome, restore)
    outcome["is_unfit"] = bool(wrong)
    if wrong and outcome["error"] is not None:  # it failed because the disk was lost meanwhile
        outcome["kind"] = "environment"
        outcome["error"] |= {"type": "WrongEnvironment", "message": wrong}
    return value


def _call(function: Callable[..., Any], request: dict[str, Any], outcome: dict[str, Any]) -> Any:
    """Call the function and return its value, which is put into `outcome` if it is plain."""
    outcome["kind"] = "payload"
    outcome["has_run"] = True
    value = function(*request["args"], **request["kwargs"])
    if request["as_json"]:
        outcome["value"] = as_json(value)
    elif value is None or type(value) in (bool, int, float, str):
        outcome["value"] = value
    else:
        outcome["text"] = in_words(value)
    return value


def _call_in_child(
    function: Callable[..., Any], request: dict[str, Any], outcome: dict[str, Any]
) -> Any:
    """`_call` in a child process. A value that is not plain is returned pickled."""

    def run() -> tuple[dict[str, Any], bytes | None]:
        pickled = None
        try:
            value = _call(function, request, outcome)
            if "value" not in outcome:
                outcome["is_pickled"] = True
                pickled = sys.modules["ray"].cloudpickle.dumps(value)
        except (Exception, SystemExit, KeyboardInterrupt) as exc:
            outcome["error"] = described(exc)
        return outcome, pickled

    how, told = in_child(run, request["timeout_s"])
    if how == "ended":
        outcome.update(told[0])
        return told[1]
    kind, message = "ProcessCrashed", told
    if how == "late":
        kind, message = "ItemTimeout", "did not end within {:g} s".format(request["timeout_s"])
    outcome.update(kind="payload" if how == "late" else "crash", has_run=True)
    outcome["error"] = {"type": kind, "message": message, "traceback": ""}
    return None


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
        if not callable(time.sleep):  # a call of it gives the processor away
            return "the worker was damaged: time.sleep cannot be called"
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
