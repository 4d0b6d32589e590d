"""What a batch sends to its workers: the user's function, the code folder, and `run_items`."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_envs import worker
from ray_envs.batch_models import RunDefaults
from ray_envs.client.code_folder import pack_code
from ray_envs.cluster.actors import by_value
from ray_envs.worker.item import run_items


class Payload:
    """What all items of a batch share: the function or its name, and the code folder."""

    def __init__(self, function: Any, code: Path | None) -> None:
        import ray

        self.entrypoint: str | None = None
        self.function: bytes | None = None
        if isinstance(function, str):
            self.entrypoint = function
        else:
            plain = plain_function(function)
            with by_value(_own_modules(plain)):
                self.function = ray.cloudpickle.dumps(plain)
        self.code_sha256: str | None = None
        self.code: Any = None
        if code is not None:
            self.code_sha256, archive = pack_code(code)
            self.code = ray.put(archive)
        with by_value([worker]):
            # Ray pickles a remote function at its first use, when `by_value` is over. So make a
            # copy now that belongs to no module.
            self.task = ray.remote(ray.cloudpickle.loads(ray.cloudpickle.dumps(run_items)))

    def shared(
        self, environment: Mapping[str, Any], limits: RunDefaults, budget_s: float
    ) -> dict[str, Any]:
        """What `run_items` is told about all items of an environment; see there."""
        return {
            "key": environment["key"],
            "venv": environment["venv_path"],
            "python": environment["python_version"],
            "ray": environment["ray_version"],
            "entrypoint": self.entrypoint,
            "as_json": self.entrypoint is not None,
            "code_sha256": self.code_sha256,
            "budget_s": budget_s,
            "isolation": limits.isolation,
            "timeout_s": limits.timeout_s,
        }


def plain_function(function: Any) -> Any:
    """Return the function inside a Ray remote function; return any other one unchanged."""
    return getattr(function, "_function", function)


def _own_modules(function: Any) -> list[ModuleType]:
    """Return the top module of a function that is neither installed nor built in, in a list.

    Such a module is the user's own, and the workers' environments do not have it.
    """
    name = getattr(function, "__module__", None)
    if name in (None, "__main__", "builtins"):
        return []
    top = sys.modules.get(str(name).split(".")[0])
    path = getattr(sys.modules.get(str(name)), "__file__", None)
    if top is None or path is None:
        return []
    paths = sysconfig.get_paths()
    installed = [paths[kind] for kind in ("purelib", "platlib", "stdlib", "platstdlib")]
    if any(Path(path).is_relative_to(folder) for folder in installed):
        return []
    return [top]
