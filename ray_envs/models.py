"""Data of environments: ids, generations, records and states.

Disks keep it and actors exchange it. Each model validates itself; nothing here
decides anything, reads files or uses Ray.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_envs.errors import InvalidId
from ray_envs.specs import Definition, LocalWheel
from ray_envs.validation import Model

#: The form of an id. It may contain `_`, which the names of folders encode (`EnvId.folder`).
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_ID_LENGTH = 64
#: A file name has at most 255 bytes.
_MAX_FOLDER_LENGTH = 240

#: The dependency group for the cluster's Ray: `uv add ray` fails on dynamic dependencies.
RAY_GROUP = "ray-envs"

#: The workflow of a variant whose id names none.
DEFAULT_WORKFLOW = "default"

#: The name of an environment and of its folder; never a path.
Key = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
#: The highest number of a generation; more than any variant reaches.
_MAX_NUMBER = 10**6


def checked_id(value: str, *, kind: str) -> str:
    """Return `value` if it is a valid id of a `kind` ("variant", "case", …).

    Raises `InvalidId`: it is empty, too long, starts with a dash or dot, or has other characters.
    """
    shown = value if len(value) <= 40 else value[:37] + "…"
    if not value:
        raise InvalidId(f"the {kind} id is empty", hint="use letters, digits and . _ -")
    if len(value) > MAX_ID_LENGTH:
        raise InvalidId(
            f"the {kind} id {shown!r} has {len(value)} characters",
            hint=f"use at most {MAX_ID_LENGTH}",
        )
    if not _ID.fullmatch(value):
        raise InvalidId(
            f"the {kind} id {shown!r} is not allowed",
            hint="use letters, digits and . _ - and begin with a letter or a digit",
        )
    return value


class EnvId(Model):
    """The id of a variant: workflow, node (of the workflow, not a machine) and version."""

    workflow_id: str = DEFAULT_WORKFLOW
    node_id: str
    version_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> EnvId:
        checked_id(self.workflow_id, kind="workflow")
        checked_id(self.node_id, kind="variant")
        if self.version_id is not None:
            checked_id(self.version_id, kind="version")
        if len(self.folder) > _MAX_FOLDER_LENGTH:
            raise InvalidId(
                f"the ids of {self} are together too long for a folder name",
                hint="shorten them, or use fewer underscores",
            )
        return self

    @classmethod
    def parse(cls, text: str) -> EnvId:
        """Return the id written as `node`, `workflow/node` or `workflow/node/version`.

        Raises `InvalidId`: it is no text, has more parts, or a part is not allowed.
        """
        hint = "write node, workflow/node or workflow/node/version"
        if not isinstance(text, str):  # programs of people without a type checker call this
            raise InvalidId(f"{text!r:.80} is not the id of a variant: it is no text", hint=hint)
        parts = text.split("/")
        if len(parts) == 1:
            return cls(node_id=text)
        if len(parts) <= 3:
            return cls(**dict(zip(("workflow_id", "node_id", "version_id"), parts, strict=False)))
        raise InvalidId(f"{text[:80]!r} is not the id of a variant", hint=hint)

    @property
    def folder(self) -> str:
        """The name of the variant's folder: parts joined by `_`, with `%5F` for `_` in a part.

        Two different ids never have the same folder.
        """
        parts = (self.workflow_id, self.node_id, self.version_id)
        return "_".join(part.replace("_", "%5F") for part in parts if part is not None)

    def __str__(self) -> str:
        if self.version_id is not None:
            return f"{self.workflow_id}/{self.node_id}/{self.version_id}"
        if self.workflow_id == DEFAULT_WORKFLOW:
            return self.node_id
        return f"{self.workflow_id}/{self.node_id}"


class Target(Model):
    """The exact versions of a cluster's Python and Ray, which each of its environments has."""

    python: str
    ray: str

    @property
    def python_minor(self) -> str:
        return ".".join(self.python.split(".")[:2])


class Platform(Model):
    """What decides which wheels a machine can install."""

    #: The variables of PEP 508 markers.
    markers: dict[str, str]
    #: Wheel tags, best first.
    tags: tuple[str, ...]
    #: Operating system, processor and C library, as in "linux-x86_64-glibc2.36".
    name: str


class Installed(Model):
    """One package that a lock installs on a platform."""

    name: str
    version: str
    #: What identifies its content: the sha256 of a wheel or source archive, or a commit.
    pin: str
    #: Whether uv must build it from source on this platform.
    is_built: bool = False


class Generation(Model):
    """One lock of a variant and the key of its environment. Never changed once written."""

    number: int = Field(ge=1)
    definition: Definition
    #: The operation that made it: create, add, update, …
    made_by: str = "create"
    key: Key
    lock_sha256: str
    #: A definition with an equal fingerprint reuses this lock, without a resolution.
    fingerprint: str
    target: Target
    platform: str
    created_at: datetime
    packages: dict[str, str]


class VariantRecord(Model):
    """One variant: its current generation and the numbers of the others."""

    env_id: EnvId
    current: Generation
    #: All and only the generations that have ever been the current one, oldest first.
    numbers: tuple[int, ...]
    #: Its environments are never collected.
    is_pinned: bool = False
    created_at: datetime
    updated_at: datetime

    @model_validator(mode="after")
    def _check(self) -> VariantRecord:
        numbers = self.numbers
        if len(set(numbers)) != len(numbers) or not all(0 < n <= _MAX_NUMBER for n in numbers):
            raise ValueError("its numbers are not those of generations")
        if self.current.number not in numbers:
            raise ValueError(f"generation {self.current.number} is not among its numbers")
        return self

    @property
    def definition(self) -> Definition:
        return self.current.definition


class EnvRecord(Model):
    """The file that makes an environment ready on a node. It is written last."""

    key: Key
    python: str
    ray: str
    platform: str
    packages: dict[str, str]
    lock_sha256: str
    uv: str
    #: Where its wheels came from: uv's cache only, another node, or the package index.
    how: Literal["linked", "fetched", "built"]
    #: Whether every module has byte-code.
    is_compiled: bool
    created_at: datetime
    duration_s: float


class BuildRequest(Model):
    """What a node needs to build one environment."""

    key: Key
    pyproject: str
    uv_lock: str
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    exclude_newer: str | None = None
    only_binary: bool = False
    target: Target
    platform: str
    lock_sha256: str
    packages: dict[str, str]
    #: Local packages: their content is under the root of the head, and of nodes that have them.
    wheels: tuple[LocalWheel, ...] = ()


class Phase(str, Enum):
    """What one node is doing for one environment."""

    WAITING = "waiting"
    LINKING = "linking"
    #: Its wheels come from another node.
    FETCHING = "fetching"
    DOWNLOADING = "downloading"
    COMPILING = "compiling"
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    #: Only its wheels are here, in uv's cache, for other nodes.
    CACHED = "cached"

    @property
    def is_final(self) -> bool:
        return self in (Phase.READY, Phase.FAILED, Phase.CACHED)


class NodeEnvState(Model):
    """One environment on one node, as its agent last reported."""

    key: str
    phase: Phase
    #: The last line of progress, for people.
    progress: str = ""
    error: dict[str, str] | None = None
    #: The attempt of the request that this state answers.
    attempt: int = 0
    duration_s: float = 0.0
    how: str = ""


class Status(str, Enum):
    """The state of a variant over all nodes that shall have it."""

    NOT_EXISTS = "NOT_EXISTS"
    CREATING = "CREATING"
    ACTIVE = "ACTIVE"
    UPDATING = "UPDATING"
    ERROR = "ERROR"
    DELETING = "DELETING"
