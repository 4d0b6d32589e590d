"""Data of specs: what a user asks for, and the definition that it becomes.

A definition contains the texts of the files that its spec names: it means the same everywhere.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ray_envs.validation import Model

#: Variables that decide what a worker imports. ray_envs sets them, a spec cannot.
RESERVED_VARIABLES = ("PATH", "VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH")

#: The label that Ray gives each node.
NODE_ID_LABEL = "ray.io/node-id"
#: The keys and selectors of labels that Ray accepts.
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([A-Za-z0-9.-]{{1,253}}/)?{_LABEL}")
_SELECTOR = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")

#: The fields of `EnvSpec` that name a file or a folder. A spec has at most one of them.
SOURCES = ("project", "requirements", "script", "pylock")

#: The most bytes of all local packages of a definition. A guess, as for one of them.
_MOST_WHEEL_BYTES = 500 * 1024 * 1024

#: Ray counts resources in steps of this size, and refuses less.
_SMALLEST_AMOUNT = 0.0001


def _amount(value: float) -> float:
    if 0 < value < _SMALLEST_AMOUNT:
        raise ValueError(f"{value:g} is less than Ray's smallest amount, {_SMALLEST_AMOUNT}")
    return value


def _gpus(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError(f"{value:g}: Ray gives a part of one GPU, or whole ones")
    return _amount(value)


#: An amount of a resource in a runtime_env, as Ray takes it.
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_amount)]
Gpus = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_gpus)]


class _EnvOptions(Model):
    """The options that a spec and a definition share."""

    #: Requirement strings (PEP 508), installed in addition to a project's own.
    packages: tuple[str, ...] = ()
    #: A version ("3.11", "3.11.7") or specifier (">=3.11") that must admit the cluster's Python.
    python: str | None = None
    #: Extras and dependency groups of the project to install.
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    #: Environment variables of the workers. Ray logs them in plain text: no secrets.
    env_vars: dict[str, str] = Field(default_factory=dict)
    #: uv ignores files that were uploaded later (a date or an RFC 3339 time).
    exclude_newer: str | None = None
    #: Accept that the cluster's Ray changes pins of the project's own uv.lock.
    allow_moved_pins: bool = False
    #: Install wheels only: nothing is built from source.
    only_binary: bool = False
    #: A package without a version gets that of the cluster's own environment.
    inherit_versions: bool = False
    #: Labels that a node must have, as in Ray's option `label_selector`.
    label_selector: dict[str, str] = Field(default_factory=dict)
    #: The GPUs of each task, by default. Only nodes with so many get the environment.
    num_gpus: Gpus | None = None
    #: On how many of the eligible nodes it is prepared.
    nodes: Literal["all"] | Annotated[int, Field(ge=1)] = "all"

    @field_validator("label_selector")
    @classmethod
    def _label_selector(cls, value: dict[str, str]) -> dict[str, str]:
        for name, wanted in value.items():
            if name == NODE_ID_LABEL:
                raise ValueError(f"{name} is set by ray_envs and cannot be given")
            if not _LABEL_KEY.fullmatch(name) or not _SELECTOR.fullmatch(wanted):
                raise ValueError(
                    f"{name!r}: {wanted!r} is not a selector: "
                    "write value, !value, in(a,b) or !in(a,b)"
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
    """What a user asks for: packages, what one file or folder asks for, and options.

    Example:
        >>> EnvSpec(packages=["scikit-learn==1.7.*"], python="3.11").packages
        ('scikit-learn==1.7.*',)
    """

    #: A folder with a pyproject.toml. If it has a uv.lock too, its versions are kept.
    project: str | None = None
    #: A requirements file in pip's format, with its options, constraints and hashes. An index that
    #: it names gets its host as its name: that of https://a.b/simple is UV_INDEX_A_B_USERNAME.
    requirements: str | None = None
    #: Whether the project's own package is installed; by default, if it has a build system.
    install_project: bool | None = None
    #: A Python file with a `# /// script` block (PEP 723). The versions in its lock file, that of
    #: `uv lock --script`, are kept.
    script: str | None = None
    #: A lock file that tools exchange, pylock.toml or pylock.NAME.toml (PEP 751).
    pylock: str | None = None

    @model_validator(mode="after")
    def _check(self) -> EnvSpec:
        if sum(getattr(self, name) is not None for name in SOURCES) > 1:
            raise ValueError("give either project, requirements, script or pylock, only one")
        if self.project is None and (self.extras or self.groups):
            raise ValueError("extras and groups belong to a project: give project too")
        if self.project is None and self.install_project is not None:
            raise ValueError("install_project belongs to a project: give project too")
        return self


class LocalWheel(Model):
    """A wheel of local files, built or found where the spec was read; every node gets it."""

    #: The name of its package, in canonical form.
    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    version: str
    filename: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,200}\.whl$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    #: Bytes.
    size: int = Field(ge=0)
    #: Its content while it is sent; it is kept beside definitions, never in them.
    content: bytes | None = Field(default=None, exclude=True, repr=False)

    @property
    def path(self) -> str:
        """Where uv finds it, from the folder of any project below a root; see `local_wheels`."""
        return f"../../wheels/{self.sha256}/{self.filename}"


class Definition(_EnvOptions):
    """A spec that contains the texts of its files: it means the same on every machine."""

    pyproject: str | None = None
    uv_lock: str | None = None
    #: The local packages that `pyproject` names as sources.
    wheels: tuple[LocalWheel, ...] = ()

    @field_validator("wheels")
    @classmethod
    def _wheels(cls, value: tuple[LocalWheel, ...]) -> tuple[LocalWheel, ...]:
        for name in ("name", "filename", "sha256"):
            if len({getattr(wheel, name) for wheel in value}) < len(value):
                raise ValueError(f"two local packages have the same {name}")
        if sum(wheel.size for wheel in value) > _MOST_WHEEL_BYTES:
            raise ValueError(f"they have more than {_MOST_WHEEL_BYTES >> 20} MiB together")
        return value

    def contents(self) -> dict[str, bytes]:
        """The contents of the wheels, by sha256, where the spec was read."""
        return {w.sha256: w.content for w in self.wheels if w.content is not None}

    #: By canonical name: the files that may be installed, as "sha256:<hex>", or "git:<commit>".
    #: Empty if they are not checked. What only the cluster's Ray needs is never checked.
    hashes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
