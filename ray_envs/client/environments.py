"""EnvironmentProvider: variants, and the four methods that other batch runners call on a provider.

Such a runner gives any id, reads plain paths, and expects that creating an id again replaces it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray_envs.client.statuses import RUNS, raise_status_error
from ray_envs.client.variants import Variants
from ray_envs.errors import EnvironmentNotReady, InvalidId, NotFound, RayEnvsError
from ray_envs.models import EnvId
from ray_envs.specs import SOURCES
from ray_envs.validation import Model, check_is, validated
from ray_envs.verbs import Seconds

_CONFIG_IDS = ("workflow_id", "node_id", "version_id")


class _Limit(Model):
    timeout: Seconds | None = None


class EnvironmentProvider(Variants):
    """Environments by `variant_id`. Safe to use from several threads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        #: Ids whose create has failed for good: nothing of them exists.
        self._refused: set[str] = set()
        self._locks: dict[str, threading.Lock] = {}

    def create_environment(self, variant_id: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Create the environment of a variant and wait until it is ready.

        An existing one is replaced. If that fails, this raises and the old one stays.

        Args:
            variant_id: any name; unique for this provider.
            config: `workflow_id`, `node_id`, `version_id`, `packages`, `python_version`, and the
                fields of `EnvSpec`. Without ids, the variant id is the node id.

        Returns:
            `variant_id, type, workflow_id, node_id, version_id, env_path, venv_path, python_path,
            python_version, status, key`.
        """
        where = "config of create_environment()"
        check_is(config, Mapping, where=where, hint="give a dict, as in {'packages': […]}")
        rest = dict(config)
        ids = {name: rest.pop(name, None) for name in _CONFIG_IDS}
        env_id = self._config_id(variant_id, ids)
        if "python_version" in rest:
            rest["python"] = rest.pop("python_version")
        if not any(rest.get(name) for name in ("packages", *SOURCES)):
            names = (variant_id, ids["node_id"] or "", "default")
            spec = next((self._specs[name] for name in names if name in self._specs), None)
            if spec is not None:
                rest = {**spec.model_dump(exclude_defaults=True), **rest}
                rest["packages"] = spec.packages
        definition = self._defined(rest, base=None, where=f"variant {variant_id}")
        with self._one_at_a_time(variant_id):
            before = self._ids.get(variant_id)
            self._ids[variant_id] = env_id  # now: an answer that is lost can be cleaned up
            self._refused.discard(variant_id)
            try:
                status = self._created(
                    env_id, definition, replace=True, wait_s=self.prepare_timeout_s()
                )
            except RayEnvsError as exc:
                if not exc.retryable:  # surely not created
                    self._forget(variant_id, before)
                raise
            if before is not None and before != env_id:
                self._release(before)
        shown = (*_CONFIG_IDS, "env_path", "venv_path", "python_path", "python_version")
        return {
            "variant_id": variant_id,
            "type": "uv",
            **{name: status[name] for name in (*shown, "status", "key")},
        }

    def get_runtime_env(self, variant_id: str) -> dict[str, Any] | None:
        """The runtime_env of a variant without a placement, or None where it is unknown.

        It carries no placement, so it is given only when every live eligible node is ready.

        Raises:
            EnvironmentNotReady: some node is not; `options` needs only one.
        """
        env_id = self._known_id(variant_id)
        if env_id is None:
            return None
        try:
            environment = self._environment(env_id)
        except NotFound:
            return None
        if environment["status"] not in RUNS:
            raise_status_error(variant_id, environment)
            raise EnvironmentNotReady(
                f"variant {variant_id!r} is not ready on every node: {environment['status']}",
                variant_id=variant_id,
                hint="call prepare() first, or use options(), which names the ready nodes",
            )
        self.runtime_env(variant_id)  # some node may have no part in it
        return {
            "type": "uv",
            "env_path": environment["env_path"],
            "venv_path": environment["venv_path"],
            "python_path": environment["python_path"],
            "py_executable": environment["python_path"],
            "env_vars": dict(environment["runtime_env"]["env_vars"]),
        }

    def cleanup_environment(self, variant_id: str, timeout: float | None = None) -> None:
        """Give the environment of a variant up; nothing happens where it is unknown.

        Returns at once: files go when nothing wants or holds them any more.
        """
        limit = validated(_Limit, {"timeout": timeout}, where="cleanup_environment()")
        with self._one_at_a_time(variant_id, limit.timeout):
            env_id = self._known_id(variant_id)
            if env_id is not None:
                self._release(env_id, but=variant_id)
            self._ids.pop(variant_id, None)
            self._refused.discard(variant_id)

    def list_environments(self) -> list[str]:
        """The ids of all defined variants, as this provider's callers know them."""
        defined = {status["variant_id"] for status in self.list_variants()}
        ours = {name: str(env_id) for name, env_id in self._ids.items()}
        return sorted(
            {name for name, address in ours.items() if address in defined}
            | (defined - set(ours.values()))
        )

    def _known_id(self, variant_id: str) -> EnvId | None:
        """The address behind a caller's id; None where there can be nothing of that name."""
        if not isinstance(variant_id, str):
            return self._id(variant_id)  # which refuses it
        if variant_id in self._ids:
            return self._ids[variant_id]
        if variant_id in self._refused:
            return None
        try:
            return EnvId.parse(variant_id)
        except InvalidId:
            return None

    def _forget(self, variant_id: str, before: EnvId | None) -> None:
        """Take back that a caller's id has an address, after a create that surely failed."""
        if before is None:
            del self._ids[variant_id]
            self._refused.add(variant_id)
        else:
            self._ids[variant_id] = before

    def _release(self, env_id: EnvId, *, but: str = "") -> None:
        """Delete a definition, unless another id of our callers (than `but`) stands for it."""
        if not any(other == env_id for name, other in self._ids.items() if name != but):
            self._deleted(env_id, force=True)

    def _config_id(self, variant_id: str, ids: Mapping[str, str | None]) -> EnvId:
        if ids["node_id"] is None:
            return EnvId.parse(variant_id)
        given = {name: value for name, value in ids.items() if value is not None}
        return validated(EnvId, given, where=f"variant {variant_id}")

    @contextmanager
    def _one_at_a_time(self, variant_id: str, timeout: float | None = None) -> Iterator[None]:
        """Make the block the only one for a variant; waits for another one `timeout` seconds."""
        check_is(variant_id, str, where="variant_id", hint="give a text")
        with self._guard:
            lock = self._locks.setdefault(variant_id, threading.Lock())
        if not lock.acquire(timeout=-1 if timeout is None else timeout):
            raise EnvironmentNotReady(
                f"another thread is still busy with {variant_id!r}",
                variant_id=variant_id,
                hint="try again",
            )
        try:
            yield
        finally:
            lock.release()
