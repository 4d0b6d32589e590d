"""Checks that a worker runs in the environment that was promised to its item."""

from __future__ import annotations

import os
import sys
from typing import Any

from ray_envs.worker.hold import INSTALLED_AS, is_open


def what_is_wrong_here(request: dict[str, Any], outcome: dict[str, Any]) -> str:
    """Return why this process is not in the promised environment; empty if it is."""
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
    if not is_open(hold.hold_fd, os.path.dirname(venv) + ".hold"):
        try:  # an earlier payload has closed it
            hold.take_hold()
        except SystemExit as exc:
            return str(exc)
    return ""
