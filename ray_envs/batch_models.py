"""Data of batches: the batch file, and the result of each item (variant × case)."""

from __future__ import annotations

import keyword
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from ray_envs.errors import InvalidInput
from ray_envs.specs import Amount, EnvSpec, Gpus
from ray_envs.validation import Model

Isolation = Literal["worker", "process", "fresh"]


class ErrorInfo(Model):
    """Why an item failed."""

    type: str
    message: str
    traceback: str = ""


class ItemResult(Model):
    """How one item (variant × case) ended, and where it ran."""

    variant_id: str
    case_id: str
    ok: bool
    value: Any = None
    error: ErrorInfo | None = None
    key: str | None = None
    lock_sha256: str | None = None
    python: str | None = None
    ray: str | None = None
    node_id: str | None = None
    attempts: int = 0
    started_at: datetime | None = None
    duration_s: float = 0.0
    #: Hash of entrypoint, arguments and code. `--resume` compares it and the key.
    call_sha256: str | None = None
    #: Modules that are in the driver's folders and in the environment; the latter were imported.
    shadowed: tuple[str, ...] = ()


class RunDefaults(Model):
    """Resources and limits of an item, unless its variant gives others."""

    num_cpus: Amount = 1
    num_gpus: Gpus = 0
    #: Bytes of memory that Ray reserves for an item.
    memory: int | None = Field(default=None, gt=0)
    #: How often an item is started again after its worker or node died.
    retries: int = Field(default=3, ge=0)
    timeout_s: float = Field(default=3600, gt=0, allow_inf_nan=False)
    #: Where an item runs: in the warm worker of its variant; in a child process of that, so that
    #: nothing of it is left; or in a Ray worker that is started for it.
    isolation: Isolation = "worker"


class VariantSpec(EnvSpec):
    """A variant of a batch: a spec, and what differs from the defaults."""

    id: str
    num_cpus: Amount | None = None
    memory: int | None = Field(default=None, gt=0)
    retries: int | None = Field(default=None, ge=0)
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    isolation: Isolation | None = None

    def env_spec(self) -> EnvSpec:
        return EnvSpec(**{name: getattr(self, name) for name in EnvSpec.model_fields})


class CaseSpec(Model):
    """One set of arguments; every variant is called with it."""

    id: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = Field(default_factory=dict)


class BatchSpec(Model):
    """A batch file: variants × cases of one entrypoint."""

    name: str
    #: `module:function`, imported in the environment, never in the driver.
    entrypoint: str
    #: A folder, relative to the batch file, that is put on sys.path there.
    code: str | None = None
    #: Which key of a returned mapping the table shows; by default the first number.
    metric: str | None = None
    defaults: RunDefaults = RunDefaults()
    variants: tuple[VariantSpec, ...]
    cases: tuple[CaseSpec, ...]


def split_entrypoint(text: str, *, where: str) -> tuple[str, str]:
    """Return the module and the function of an entrypoint, `module:function`.

    Raises `InvalidInput`: it has another form.
    """
    module, colon, function = text.partition(":")
    if colon and is_name(function) and all(is_name(part) for part in module.split(".")):
        return module, function
    raise InvalidInput(
        f"entrypoint: {text!r} is not of the form module:function",
        where=where,
        hint=_entrypoint_hint(text),
    )


def _entrypoint_hint(text: str) -> str:
    """Return a hint with the entrypoint that a path, or a dot for the colon, probably means."""
    module, colon, function = text.partition(":")
    module = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    if not colon:
        module, _, function = module.rpartition(".")
    if is_name(function) and all(is_name(part) for part in module.split(".")):
        return f"write {module}:{function}"
    return 'write "accuracy:evaluate" for the function evaluate in accuracy.py'


def is_name(text: str) -> bool:
    """Return whether `text` can be the name of a Python module or function."""
    return text.isidentifier() and not keyword.iskeyword(text)
