"""InMemoryEnvironmentProvider: a provider without uv, Ray or disk, for the tests of user programs.

The same contract tests run over it and over `RayEnvironmentProvider`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from ray_envs.client.environments import EnvironmentProvider
from ray_envs.client.statuses import Statuses, raise_status_error
from ray_envs.decisions import placement, requirements
from ray_envs.errors import AlreadyExists, RayEnvsError
from ray_envs.models import EnvId, Status
from ray_envs.node.interpreter import this_target
from ray_envs.specs import Definition
from ray_envs.verbs import CreateEnv, DeleteEnv


class InMemoryEnvironmentProvider(EnvironmentProvider):
    """A provider for tests: every environment is the interpreter of this process.

    It checks its input like the real provider. `fail` makes a variant fail like a real one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._target = this_target(version("ray"))
        self._defined_envs: dict[str, tuple[EnvId, Definition, int]] = {}
        self._failures: dict[str, RayEnvsError] = {}

    def fail(self, variant_id: str, error: RayEnvsError) -> None:
        """Make every later `create` of `variant_id` raise `error`."""
        self._failures[str(self._id(variant_id))] = error

    def close(self) -> None:
        """Do nothing: this provider holds no resources."""

    def list_variants(self) -> list[dict[str, Any]]:
        return [self._status(name) for name in sorted(self._defined_envs)]

    def _create(self, request: CreateEnv, definition: Definition) -> Any:
        name, env_id = request.variant_id, EnvId.parse(request.variant_id)
        packages = requirements.requirement_lines(definition.packages, where=f"variant {name}")
        requirements.check_python(definition.python, self._target, where=f"variant {name}")
        definition = definition.model_copy(update={"packages": packages})
        if name in self._failures:
            raise self._failures[name]
        with self._guard:
            before = self._defined_envs.get(name)
            if before is not None and before[1] == definition:
                return self._status(name)
            if before is not None and not request.replace:
                raise AlreadyExists(
                    f"variant {name} exists with another spec",
                    variant_id=name,
                    hint="give replace=True for a new generation, or another id",
                )
            if not request.dry_run:
                self._defined_envs[name] = (env_id, definition, before[2] + 1 if before else 1)
        return {**self._status(name), "dry_run": request.dry_run}

    def _status(self, name: str) -> dict[str, Any]:
        if name not in self._defined_envs:
            return {"variant_id": name, "status": Status.NOT_EXISTS.value, "nodes": {}}
        env_id, definition, number = self._defined_envs[name]
        text = definition.model_dump_json(include={"packages", "pyproject", "uv_lock"})
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return {
            "variant_id": name,
            "workflow_id": env_id.workflow_id,
            "node_id": env_id.node_id,
            "version_id": env_id.version_id,
            "status": Status.ACTIVE.value,
            "key": key,
            "generation": number,
            "lock_sha256": hashlib.sha256(key.encode()).hexdigest(),
            "env_path": sys.prefix,
            "venv_path": sys.prefix,
            "python_path": sys.executable,
            "python_version": self._target.python,
            "ray_version": self._target.ray,
            "nodes": {"local": {"key": key, "phase": "ready"}},
            "error": None,
        }

    def _statuses(self, ids: Iterable[EnvId], *, want: bool) -> Statuses:
        statuses = {str(env_id): self._status(str(env_id)) for env_id in ids}
        if want:
            for name, status in statuses.items():
                raise_status_error(name, status)
        return statuses

    def _next_statuses(self, ids: Iterable[EnvId]) -> Statuses:
        return self._statuses(ids, want=False)

    def _environment(self, env_id: EnvId) -> dict[str, Any]:
        status = self._status(str(env_id))
        raise_status_error(str(env_id), status)
        env_vars = self._defined_envs[str(env_id)][1].env_vars
        return {
            **status,
            "env_vars": dict(env_vars),
            "runtime_env": {
                **placement.runtime_env(status["venv_path"], env_vars),
                "py_executable": sys.executable,
            },
            "ready_nodes": ["local"],
            **placement.EVERYWHERE,
        }

    def _delete(self, request: DeleteEnv) -> dict[str, Any]:
        name, is_dry = request.variant_id, request.dry_run
        with self._guard:
            is_there = name in self._defined_envs
            if not is_dry:
                self._defined_envs.pop(name, None)
        return {"variant_id": name, "deleted": is_there and not is_dry, "dry_run": is_dry}
