"""Every error that ray_envs raises on purpose, with its exit code.

The facts of an error are in its fields: no caller has to parse a text. Errors can be pickled. They
leave an actor as plain data (`to_dict`, `from_dict`): the caller may have no ray_envs.
"""

from __future__ import annotations

from typing import Any, ClassVar

#: The longest message, hint and place. They repeat what people wrote, which may have any length.
_MAX_TEXT = 2_000
_FIELDS = ("hint", "detail", "variant_id", "key", "node_id", "where")


def _shortened(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[: _MAX_TEXT // 2]} … {text[-_MAX_TEXT // 4 :]}"


class RayEnvsError(Exception):
    """Something that ray_envs refused or could not do.

    Args:
        message: what failed and why, in one line.
        hint: the command, setting or change that helps.
        detail: the last output of uv or of the operating system, credentials redacted.
        variant_id: the variant that is affected.
        key: the key of the environment that is affected.
        node_id: the Ray node on which it happened.
        where: the file, table or option with the wrong input.
    """

    #: The exit code of `ray-envs`, a different one for each class.
    exit_code: ClassVar[int] = 70
    #: Whether the same call may succeed later.
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        detail: str = "",
        variant_id: str = "",
        key: str = "",
        node_id: str = "",
        where: str = "",
    ) -> None:
        message = _shortened(message)
        super().__init__(message)
        self.message = message
        self.hint = _shortened(hint)
        self.detail = detail
        self.variant_id = variant_id
        self.key = key
        self.node_id = node_id
        self.where = _shortened(where)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.detail:
            lines.append(self.detail.rstrip())
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return (from_dict, (self.to_dict(),))

    def about(self, **fields: str) -> RayEnvsError:
        """Return this error with `fields` added; a field that is set already stays."""
        data = self.to_dict()
        return from_dict({**data, **{k: v for k, v in fields.items() if not data.get(k)}})

    def to_dict(self) -> dict[str, str]:
        """Return the name of the class as `type`, and the fields that are set."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            **{name: getattr(self, name) for name in _FIELDS if getattr(self, name)},
        }


class RayEnvsWarning(UserWarning):
    """Something is wrong, but the work goes on."""


class InvalidInput(RayEnvsError):
    """A file, option or value is wrong."""

    exit_code = 3


class InvalidId(RayEnvsError):
    """The id of a workflow, node, version, variant or case is not allowed."""

    exit_code = 4


class InvalidPackages(RayEnvsError):
    """A requirement is malformed, an option or a local path."""

    exit_code = 5


class NotFound(RayEnvsError):
    """The variant is not defined."""

    exit_code = 6


class AlreadyExists(RayEnvsError):
    """The variant is defined with a different spec, and `replace` is not set."""

    exit_code = 7


class ResolutionFailed(RayEnvsError):
    """uv found no set of packages that satisfies the spec; `detail` has its reasons."""

    exit_code = 8


class LockTimeout(RayEnvsError):
    """Another process kept a lock for longer than this one waits."""

    exit_code = 9
    retryable = True


class UvFailed(RayEnvsError):
    """uv failed: the network, the package index or the build of a wheel."""

    exit_code = 10
    retryable = True


class StorageFailed(RayEnvsError):
    """The root cannot be read or written: permissions, a full disk, a damaged file."""

    exit_code = 11


class EnvironmentInUse(RayEnvsError):
    """The environment is in use."""

    exit_code = 12
    retryable = True


class NoEligibleNode(RayEnvsError):
    """No live node can run the variant."""

    exit_code = 13
    retryable = True


class ManagerUnavailable(RayEnvsError):
    """The EnvManager actor cannot be found, started or reached."""

    exit_code = 14
    retryable = True


class WrongEnvironment(RayEnvsError):
    """A program, a worker or an agent refused to run because it is in the wrong environment."""

    exit_code = 15


class EnvironmentNotReady(RayEnvsError):
    """The environment was not ready within the given time."""

    exit_code = 16
    retryable = True


class WorkerCannotStart(RayEnvsError):
    """Ray's worker cannot start in the environment: an import fails; `detail` says which."""

    exit_code = 17


class ClusterLost(RayEnvsError):
    """The Ray cluster ended while a batch ran on it: its head or its last node is gone."""

    exit_code = 18


def all_errors() -> list[type[RayEnvsError]]:
    """Return `RayEnvsError` and every class derived from it."""
    found: list[type[RayEnvsError]] = [RayEnvsError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def from_dict(data: dict[str, str]) -> RayEnvsError:
    """Return the error that `to_dict` described; an unknown type becomes a `RayEnvsError`."""
    classes = {cls.__name__: cls for cls in all_errors()}
    fields = {name: data[name] for name in _FIELDS if data.get(name)}
    return classes.get(data.get("type", ""), RayEnvsError)(data.get("message", ""), **fields)
