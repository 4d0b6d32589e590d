"""Every error that ray_envs raises on purpose, with its exit code and how it travels.

An error is fields, not text to parse: what happened (`message`), what to do (`hint`), what uv or
the system said (`detail`), and to what it happened (`variant_id`, `key`, `node_id`, `where`). It
survives pickling and, as plain data, the boundary of an actor (`to_dict`, `from_dict`): a caller
in an environment without ray_envs must be able to read it.
"""

from __future__ import annotations

from typing import Any, ClassVar

_FIELDS = ("hint", "detail", "variant_id", "key", "node_id", "where")


class RayEnvsError(Exception):
    """Something that ray_envs refuses or could not do.

    Args:
        message: what happened, to what, in one line.
        hint: the command, setting or change that mends it.
        detail: the last words of uv or of the operating system, credentials redacted.
        variant_id: the variant that is concerned, if one is.
        key: the environment key that is concerned, if one is.
        node_id: the Ray node it happened on, if it did on one.
        where: the file, table or option that holds the wrong input.
    """

    #: The exit code of `ray-envs` for this error; no two classes share one.
    exit_code: ClassVar[int] = 70
    #: Whether the same call may succeed later without any change.
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
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail
        self.variant_id = variant_id
        self.key = key
        self.node_id = node_id
        self.where = where

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
        """The same error with those of `fields` set that it did not know yet."""
        data = self.to_dict()
        return from_dict({**data, **{k: v for k, v in fields.items() if not data.get(k)}})

    def to_dict(self) -> dict[str, str]:
        """The error as plain data: its class name as `type`, then its fields."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            **{name: getattr(self, name) for name in _FIELDS if getattr(self, name)},
        }


class RayEnvsWarning(UserWarning):
    """What is not as it should be, and keeps nothing from going on."""


class InvalidInput(RayEnvsError):
    """A file, option or value that cannot be accepted."""

    exit_code = 3


class InvalidId(RayEnvsError):
    """A workflow, node, version, variant or case id that is not allowed."""

    exit_code = 4


class InvalidPackages(RayEnvsError):
    """A requirement that cannot be accepted: an option, a local path, a malformed string."""

    exit_code = 5


class NotFound(RayEnvsError):
    """No variant of that name is defined."""

    exit_code = 6


class AlreadyExists(RayEnvsError):
    """The variant exists with a different spec, and replacing it was not asked for."""

    exit_code = 7


class ResolutionFailed(RayEnvsError):
    """uv found no set of packages that satisfies the spec; `detail` holds its explanation."""

    exit_code = 8


class LockTimeout(RayEnvsError):
    """Another process kept a lock for longer than we wait."""

    exit_code = 9
    retryable = True


class UvFailed(RayEnvsError):
    """uv could not do its work: network, index, a wheel that does not build."""

    exit_code = 10
    retryable = True


class StorageFailed(RayEnvsError):
    """The root could not be read or written: permissions, a full disk, a damaged record."""

    exit_code = 11


class EnvironmentInUse(RayEnvsError):
    """A running process holds the environment."""

    exit_code = 12
    retryable = True


class NoEligibleNode(RayEnvsError):
    """No live node can run the variant."""

    exit_code = 13
    retryable = True


class ManagerUnavailable(RayEnvsError):
    """The EnvManager actor could not be found, started or reached."""

    exit_code = 14
    retryable = True


class WrongEnvironment(RayEnvsError):
    """A process is in another environment than it needs: the payload, or the agent, did not run."""

    exit_code = 15


class EnvironmentNotReady(RayEnvsError):
    """The environment was not prepared within the time that the caller gave."""

    exit_code = 16
    retryable = True


def all_errors() -> list[type[RayEnvsError]]:
    """`RayEnvsError` and every class derived from it."""
    found: list[type[RayEnvsError]] = [RayEnvsError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def from_dict(data: dict[str, str]) -> RayEnvsError:
    """The error that `to_dict` described; an unknown type becomes a plain `RayEnvsError`."""
    classes = {cls.__name__: cls for cls in all_errors()}
    fields = {name: data[name] for name in _FIELDS if data.get(name)}
    return classes.get(data.get("type", ""), RayEnvsError)(data.get("message", ""), **fields)
