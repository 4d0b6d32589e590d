"""What a batch file says, and what is known of each item (variant × case) that ran.

Data and its validation only, shared by the client and the command line.
"""

from __future__ import annotations

import keyword
from datetime import datetime
from typing import Any

from pydantic import Field

from ray_envs.errors import InvalidInput
from ray_envs.models import EnvSpec, Model


class ErrorInfo(Model):
    """Why an item has no value."""

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
    #: Hash of entrypoint, arguments and code: what `--resume` compares besides the key.
    call_sha256: str | None = None
    #: Names of modules in the driver's folders that the environment has too; the environment's won.
    shadowed: tuple[str, ...] = ()


class RunDefaults(Model):
    """Resources and limits of an item, where its variant says nothing else."""

    num_cpus: float = Field(default=1, ge=0, allow_inf_nan=False)
    num_gpus: float = Field(default=0, ge=0, allow_inf_nan=False)
    #: Bytes of memory that Ray reserves for an item.
    memory: int | None = Field(default=None, gt=0)
    #: How often an item is started again after its worker or node was lost.
    retries: int = Field(default=3, ge=0)
    timeout_s: float = Field(default=3600, gt=0, allow_inf_nan=False)


class VariantSpec(EnvSpec):
    """A variant of a batch: an environment, plus what differs from the defaults."""

    id: str
    num_cpus: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    memory: int | None = Field(default=None, gt=0)
    retries: int | None = Field(default=None, ge=0)
    timeout_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def env_spec(self) -> EnvSpec:
        return EnvSpec(**{name: getattr(self, name) for name in EnvSpec.model_fields})


class CaseSpec(Model):
    """One set of arguments that every variant is called with."""

    id: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = Field(default_factory=dict)


class BatchSpec(Model):
    """A batch file: variants × cases of one entrypoint."""

    name: str
    #: `module:function`, imported inside the environment, never in the driver.
    entrypoint: str
    #: A folder put on sys.path there, relative to the batch file.
    code: str | None = None
    #: The key of a returned mapping that the table shows; the first number, where not given.
    metric: str | None = None
    defaults: RunDefaults = RunDefaults()
    variants: tuple[VariantSpec, ...]
    cases: tuple[CaseSpec, ...]


def split_entrypoint(text: str, *, where: str) -> tuple[str, str]:
    """The module and the function that an entrypoint, `module:function`, names.

    Raises:
        InvalidInput: it has another form.
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
    """The entrypoint that was probably meant: a file's path or a dot for the colon are likely."""
    module, colon, function = text.partition(":")
    module = module.removesuffix(".py").removeprefix("./").replace("/", ".")
    if not colon:
        module, _, function = module.rpartition(".")
    if is_name(function) and all(is_name(part) for part in module.split(".")):
        return f"write {module}:{function}"
    return 'as in "accuracy:evaluate" for the function evaluate in accuracy.py'


def is_name(text: str) -> bool:
    """Whether `text` may name a module, a function or another thing of Python."""
    return text.isidentifier() and not keyword.iskeyword(text)
