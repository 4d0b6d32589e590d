"""The nouns: what people write, what disks keep and what actors exchange.

Everything here is data with its own validation; nothing here decides, reads files or knows Ray.
`EnvSpec` is what a person writes and may name files; `Definition` is the same with the texts of
those files in it, so that it means the same on every machine.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ray_envs.errors import InvalidId

#: The only characters of an id. `_` may occur in one: folders encode it (see `EnvId.folder`).
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Long enough for people; three of them, encoded, stay below the 255 bytes of a file name.
MAX_ID_LENGTH = 64
_MAX_FOLDER_LENGTH = 240

#: The dependency group that holds the cluster's Ray: `uv add ray` fails on dynamic dependencies.
RAY_GROUP = "ray-envs"

#: Variables that decide what a worker imports; an environment sets them itself.
RESERVED_VARIABLES = ("PATH", "VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH")

#: Ray's own label of each node.
NODE_ID_LABEL = "ray.io/node-id"
#: What Ray takes for the key of a label, and what a label may be asked to be.
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([A-Za-z0-9.-]{{1,253}}/)?{_LABEL}")
_SELECTOR = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")

#: The workflow of variants that are addressed by one `variant_id`.
DEFAULT_WORKFLOW = "default"

#: The name of an environment; it names a folder too, and so is no path.
Key = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
#: More generations than any variant has.
_MAX_NUMBER = 10**6


class Model(BaseModel):
    """Frozen data that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def checked_id(value: str, *, kind: str) -> str:
    """`value`, if it may name a `kind` (a variant, a case, …).

    Raises:
        InvalidId: empty, too long, a path, a leading dash or dot, a space or another character.
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
    """The address of a variant: workflow, node (a workflow's node, not a machine), version."""

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
        """The id written as `node`, `workflow/node` or `workflow/node/version`.

        Raises:
            InvalidId: another number of parts, or a part that is not allowed.
        """
        parts = text.split("/")
        if len(parts) == 1:
            return cls(node_id=parts[0])
        if len(parts) in (2, 3):
            return cls(**dict(zip(("workflow_id", "node_id", "version_id"), parts, strict=False)))
        raise InvalidId(
            f"{text[:80]!r} names no variant",
            hint="write node, workflow/node or workflow/node/version",
        )

    @property
    def folder(self) -> str:
        """The folder name of this id; injective: `_` joins the parts, `%5F` stands inside one."""
        parts = [self.workflow_id, self.node_id]
        if self.version_id is not None:
            parts.append(self.version_id)
        return "_".join(part.replace("_", "%5F") for part in parts)

    def __str__(self) -> str:
        if self.version_id is not None:
            return f"{self.workflow_id}/{self.node_id}/{self.version_id}"
        if self.workflow_id == DEFAULT_WORKFLOW:
            return self.node_id
        return f"{self.workflow_id}/{self.node_id}"


class _EnvOptions(Model):
    """What a spec and a definition share: everything that is not a file."""

    #: Requirement strings (PEP 508), installed in addition to a project's own.
    packages: tuple[str, ...] = ()
    #: A version ("3.11", "3.11.7") or specifier (">=3.11") that must admit the cluster's Python.
    python: str | None = None
    #: Extras and dependency groups of the project that are installed too.
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    #: Variables of the worker process. Ray logs them in plain text: no secrets.
    env_vars: dict[str, str] = Field(default_factory=dict)
    #: uv ignores distributions uploaded later (RFC 3339 or a date).
    exclude_newer: str | None = None
    #: Accept that adding the cluster's Ray moves pins of the project's own uv.lock.
    allow_moved_pins: bool = False
    #: Install wheels only: nothing is built from source.
    only_binary: bool = False
    #: A package without a version takes the one that the cluster's own environment has.
    inherit_versions: bool = False
    #: Labels that a node must have, as in Ray's option of that name.
    label_selector: dict[str, str] = Field(default_factory=dict)
    #: The GPUs of a task that says nothing else: only nodes with so many get the environment.
    num_gpus: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    #: On how many of the nodes that fit it is prepared.
    nodes: Literal["all"] | Annotated[int, Field(ge=1)] = "all"

    @field_validator("label_selector")
    @classmethod
    def _label_selector(cls, value: dict[str, str]) -> dict[str, str]:
        for name, wanted in value.items():
            if name == NODE_ID_LABEL:
                raise ValueError(f"{name} is how ray_envs names the ready nodes")
            if not _LABEL_KEY.fullmatch(name) or not _SELECTOR.fullmatch(wanted):
                raise ValueError(
                    f"{name!r}: {wanted!r} is no selector: write value, !value, in(a,b) or !in(a,b)"
                )
        return value

    @field_validator("env_vars")
    @classmethod
    def _env_vars(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
            if name in RESERVED_VARIABLES:
                raise ValueError(f"{name} is set by ray_envs and cannot be given")
        return value


class EnvSpec(_EnvOptions):
    """What a person asks for: packages, a requirements file or a project folder, plus options.

    Example:
        >>> EnvSpec(packages=["scikit-learn==1.7.*"], python="3.11").packages
        ('scikit-learn==1.7.*',)
    """

    #: A folder with a pyproject.toml (and a uv.lock, honoured when there).
    project: str | None = None
    #: A requirements file: names, versions and markers, no options.
    requirements: str | None = None

    @model_validator(mode="after")
    def _check(self) -> EnvSpec:
        if self.project is not None and self.requirements is not None:
            raise ValueError("give either project or requirements, not both")
        if self.project is None and (self.extras or self.groups):
            raise ValueError("extras and groups are those of a project: give project too")
        return self


class Definition(_EnvOptions):
    """A spec with the texts of its files: complete in itself, the same on every machine."""

    pyproject: str | None = None
    uv_lock: str | None = None


class Target(Model):
    """What every environment of a cluster must match: its interpreter and its Ray."""

    #: Exact version, as in "3.11.7".
    python: str
    ray: str

    @property
    def python_minor(self) -> str:
        return ".".join(self.python.split(".")[:2])


class Platform(Model):
    """Where an environment is installed, as far as that decides which wheels it gets."""

    #: The variables of PEP 508 markers.
    markers: dict[str, str]
    #: Wheel tags, the most preferred first.
    tags: tuple[str, ...]
    #: Operating system, processor and C library, as in "linux-x86_64-glibc2.36".
    name: str


class Installed(Model):
    """One package that a lock installs on a platform."""

    name: str
    version: str
    #: What pins the content: a wheel's or source archive's sha256, or a commit.
    pin: str
    #: Whether uv has to build it from source here.
    is_built: bool = False


class Generation(Model):
    """One (lock, key) of a variant; numbered from 1, never changed once written."""

    number: int = Field(ge=1)
    #: What it was made from.
    definition: Definition
    #: The operation that made it: create, add, update, …
    made_by: str = "create"
    key: Key
    lock_sha256: str
    #: Equal for specs that resolve to the same lock without asking the index again.
    fingerprint: str
    target: Target
    platform: str
    created_at: datetime
    packages: dict[str, str]


class VariantRecord(Model):
    """What the registry keeps of one variant: its current generation, and which others it has."""

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
            raise ValueError("numbers are not those of generations")
        if self.current.number not in numbers:
            raise ValueError(f"generation {self.current.number} is not among its numbers")
        return self

    @property
    def definition(self) -> Definition:
        return self.current.definition


class EnvRecord(Model):
    """The file that says an environment is ready on a node; written last."""

    key: Key
    python: str
    ray: str
    platform: str
    packages: dict[str, str]
    lock_sha256: str
    uv: str
    #: How it came to be: from uv's cache alone, with wheels of another node, or with files from
    #: the package index.
    how: Literal["linked", "fetched", "built"]
    #: Whether every module came with byte-code.
    is_compiled: bool
    created_at: datetime
    duration_s: float


class BuildRequest(Model):
    """Everything a node needs to build one environment."""

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


class Phase(str, Enum):
    """What one node is doing about one environment."""

    WAITING = "waiting"
    LINKING = "linking"
    #: Its wheels come from another node.
    FETCHING = "fetching"
    DOWNLOADING = "downloading"
    COMPILING = "compiling"
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    #: Not an environment: its wheels are in uv's cache, for other nodes.
    CACHED = "cached"

    @property
    def is_final(self) -> bool:
        return self in (Phase.READY, Phase.FAILED, Phase.CACHED)


class NodeEnvState(Model):
    """One environment on one node, as its agent last told."""

    key: str
    phase: Phase
    #: The last line of progress, for people.
    progress: str = ""
    error: dict[str, str] | None = None
    #: The attempt of the wish that this state answers.
    attempt: int = 0
    duration_s: float = 0.0
    how: str = ""


class Status(str, Enum):
    """What a variant is, over all wanted nodes."""

    NOT_EXISTS = "NOT_EXISTS"
    CREATING = "CREATING"
    ACTIVE = "ACTIVE"
    UPDATING = "UPDATING"
    ERROR = "ERROR"
    DELETING = "DELETING"
