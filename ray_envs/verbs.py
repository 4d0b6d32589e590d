"""The verbs of the EnvManager, each declared once: its request, changes, time and errors.

Every process uses this table. The manager checks what it is called with against the request, the
provider and the command line take defaults and limits from it, and a test compares the README.
A new verb needs a request and a row of `VERBS` here, and a method of `EnvManager`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from ray_envs import errors as e
from ray_envs.models import EnvId
from ray_envs.settings import Settings
from ray_envs.validation import Model, validated

RequestT = TypeVar("RequestT", bound="Request")

#: How long one long-poll for events lasts at most, in seconds.
MAX_POLL_S = 60.0
#: How long a verb that only reads may take, in seconds.
READING_S = 60.0


def _listed(value: Any) -> Any:
    """`value` as a list: one text is a list of one, and any iterable of texts is accepted."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        return list(value)
    return value


#: "node", "workflow/node" or "workflow/node/version"; written out in full in a request.
VariantId = Annotated[
    str,
    AfterValidator(lambda text: str(EnvId.parse(text))),
    Field(description="node, workflow/node or workflow/node/version"),
]
#: From none to a year.
Seconds = Annotated[float, Field(ge=0, le=366 * 86400, allow_inf_nan=False)]
Hours = Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Texts = Annotated[list[str], BeforeValidator(_listed)]
Variants = Annotated[list[VariantId], BeforeValidator(_listed)]
Packages = Annotated[
    Texts, Field(description="Requirements: a list, or the text of a requirements file.")
]
DryRun = Annotated[bool, Field(description="Only show what would be done.")]
JobId = Annotated[
    Name | None,
    Field(description="The job of Ray that will run there. It is promised the environment."),
]
OperationId = Annotated[
    Name | None,
    Field(
        description="Any unique text. A request that is repeated with the same one, because its "
        "answer was lost, is not carried out again."
    ),
]
Replace = Annotated[bool, Field(description="If the variant exists, make a new generation of it.")]
Wait = Annotated[
    Seconds,
    Field(
        description="Seconds to wait until it is ready on every eligible node. If the build fails "
        "within that time, the definition is again what it was before."
    ),
]


class Request(Model):
    """The arguments of a verb. All are plain data, so that any worker can send them."""

    model_config = ConfigDict(strict=True, defer_build=True)


class OfVariant(Request):
    variant_id: VariantId

    @property
    def env_id(self) -> EnvId:
        return EnvId.parse(self.variant_id)


class ChangeOfVariant(OfVariant):
    dry_run: DryRun = False


# -- reading -------------------------------------------------------------------------------------


class Describe(Request):
    """Return the manager's root, interpreter and Ray version, and every node that it knows."""


class GetEnvStatus(OfVariant):
    """Return what is known of a variant. NOT_EXISTS if it is not defined. Never counts as use."""


class ListEnvs(Request):
    """Return a row for each variant: ids, key, generation, status, number of ready nodes."""


class GetEnvironment(OfVariant):
    """Return the interpreter, environment variables and ready nodes of a variant."""

    job_id: JobId = None


class GetOptions(OfVariant):
    """Return the dict for `.options(**…)` of a task or actor that shall run in a variant.

    For workers that have no ray_envs. `RayEnvironmentProvider.options` does the same.
    """

    job_id: JobId = None
    options: dict[str, Any] | None = Field(
        None, description="Other options (`num_cpus`, `runtime_env`, …), which are merged."
    )


class ListDeps(OfVariant):
    """Return the declared `dependencies` of a variant and its `locked_versions`."""


class ListGenerations(OfVariant):
    """Return every generation of a variant, oldest first, with the packages that it changed."""


class DiffEnv(OfVariant):
    """Return the packages that differ between two generations of a variant."""

    from_: Count
    to: Count | None = Field(None, description="A generation. Default: the current one.")


class ExportEnv(OfVariant):
    """Return a generation as `files`, texts by name, for other tools or for `import_env`.

    "project" gives `pyproject.toml` and `uv.lock` byte for byte, and `options.json`;
    "requirements" gives a requirements file with hashes; "pylock" gives a `pylock.toml`.
    """

    format: str = Field("project", description="project, requirements or pylock")
    generation: Count | None = Field(None, description="Default: the current one.")


class Explain(OfVariant):
    """Return the state of a variant on each node with its reason, its users, and what gc does."""


class Events(Request):
    """Return `events` after number `since` in order, and `next`, the `since` of the next call.

    Answers as soon as there is an event, or after `timeout_s` seconds.
    """

    since: Annotated[int, Field(ge=-1, le=2**62)] = Field(
        0, description="-1 returns no event, and the number after which the new ones come."
    )
    kinds: Texts = Field([], description="Only events of these kinds; by default of all.")
    variant_id: VariantId | None = None
    limit: Count = 1000
    timeout_s: Seconds = Field(0, description=f"At most {MAX_POLL_S:g} s are waited.")


class _Operations(Request):
    variant_id: VariantId | None = None
    operation: Name | None = None
    status: Name | None = None


class GetOperations(_Operations):
    """Return the operations that match, newest first, as `rows`, and their number as `total`."""

    limit: Count = 100
    offset: Count = Field(0, description="Skip the newest N.")


class DeleteOperations(_Operations):
    """Delete the operations that have ended and match. At least one filter must be given."""

    before: Name | None = Field(None, description="Only those that started before this time.")


# -- changing ------------------------------------------------------------------------------------


class _Definition(ChangeOfVariant):
    replace: Replace = False
    wait_s: Wait = 0
    wheels: dict[str, bytes] = Field({}, description="Its local packages' contents, by sha256.")


class CreateEnv(_Definition):
    """Define a variant and want it on every node. Returns its status.

    An equal spec changes nothing. A different one needs `replace`: it becomes a new generation,
    which is prepared on every node before it replaces the current one.
    """

    spec: dict[str, Any] = Field(description="The fields of `specs.Definition`: texts, not paths.")


class ImportEnv(_Definition):
    """Define a variant from an export: the same lock, byte for byte, and the same key."""

    pyproject: str
    uv_lock: str
    options: dict[str, Any] | None = Field(None, description="The content of `options.json`.")


class _Edit(ChangeOfVariant):
    operation_id: OperationId = None


class AddDeps(_Edit):
    """Add packages to a variant, as a new generation. Other pins stay where they can.

    Returns the status, `diff`, `operation_id`, `stdout`, `stderr`, `exit_code`, `duration_s`.
    """

    packages: Packages


class UpdateDeps(_Edit):
    """Upgrade the named packages, or all, within what is declared. Answers like `add_deps`."""

    packages: Packages = Field([])


class RemoveDeps(_Edit):
    """Remove declared packages and what only they needed. Answers like `add_deps`."""

    packages: Packages


class RollbackEnv(_Edit):
    """Make the previous generation of a variant, or generation `to`, the current one."""

    to: Count | None = Field(None, description="A generation. Default: the previous one.")


class DeleteEnv(ChangeOfVariant):
    """Delete the definition of a variant. Its history stays; a variant that is unknown is no error.

    Its environment is deleted by a later collection, when it is not used any more.
    """

    force: bool = Field(
        False, description="Also while it is in use. Running tasks keep their environment."
    )
    job_id: JobId = Field(None, description="The caller's job. Its own leases do not count as use.")


class PinEnv(OfVariant):
    """Keep every environment of a variant from being collected, or allow it again."""

    is_pinned: bool = True


class SyncEnv(ChangeOfVariant):
    """Make every node match the variant's lock: check each file, repair, build, lock if stale.

    Returns `status`, `nodes`, `checks`, `stdout`, `stderr`, `exit_code`, `duration_s`.
    """


class Cleanup(Request):
    """Delete unused environments on every node.

    Returns `deleted` and `kept`, each environment with its reason, and `freed_bytes`.
    """

    idle_hours: Hours | None = Field(
        None, description="Hours without use. Default: RAY_ENVS_IDLE_HOURS."
    )
    dry_run: DryRun = False
    include_current: bool = Field(
        False, description="Also those of current generations. They are built again on demand."
    )


class Prepare(Request):
    """Want variants on every node, and retry where they failed. `watch` tells how it goes.

    A variant that was locked for another Ray or Python gets a new generation.
    """

    variant_ids: Variants


class Watch(Request):
    """Return the status of variants as soon as it is newer than `seen`, or after `timeout_s`."""

    variant_ids: Variants
    seen: Annotated[int, Field(ge=-1, le=2**62)]
    timeout_s: Seconds = 10


class Doctor(Request):
    """Examine every node and environment; with `repair`, repair what is damaged.

    Returns `is_healthy`, `nodes`, `environments`, `definitions` that cannot be read, `history`.
    """

    repair: bool = Field(False, description="Repair damaged environments and build missing ones.")
    variant_id: VariantId | None = None


# -- the table -----------------------------------------------------------------------------------


class Takes(str, Enum):
    """What a verb waits for."""

    READING = "memory and local disks"
    LOCKING = "and other changes of the same variant"
    BUILDING = "and a resolution and builds"


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb of the handle."""

    name: str
    request: type[Request]
    takes: Takes = Takes.READING
    #: Whether definitions, environments or the history may be different afterwards.
    is_change: bool = False
    #: Besides `InvalidInput`, `InvalidId`, `StorageFailed` and `ManagerUnavailable`, of any verb.
    errors: tuple[type[e.RayEnvsError], ...] = ()

    def limit_s(self, settings: Settings, request: Request) -> float:
        """How long the verb may take, in seconds, after which its caller gives up."""
        asked_s = getattr(request, "wait_s", 0) + getattr(request, "timeout_s", 0)
        locking_s = 0 if self.takes is Takes.READING else settings.lock_timeout_s
        is_building = self.takes is Takes.BUILDING
        building_s = settings.uv_lock_timeout_s + settings.prepare_timeout_s if is_building else 0
        return float(READING_S + asked_s + locking_s + building_s)


_LOCK = (e.LockTimeout, e.ResolutionFailed, e.UvFailed)
_DEFINE = (e.AlreadyExists, e.InvalidPackages, *_LOCK)
_EDIT = (e.NotFound, e.InvalidPackages, *_LOCK)
_BUILDS = Takes.BUILDING

#: All verbs of `EnvManager`, by name.
VERBS = {
    verb.name: verb
    for verb in (
        Verb("create_env", CreateEnv, _BUILDS, True, _DEFINE),
        Verb("get_env_status", GetEnvStatus),
        Verb("list_envs", ListEnvs),
        Verb("add_deps", AddDeps, _BUILDS, True, _EDIT),
        Verb("update_deps", UpdateDeps, _BUILDS, True, _EDIT),
        Verb("remove_deps", RemoveDeps, _BUILDS, True, _EDIT),
        Verb("list_deps", ListDeps, errors=(e.NotFound,)),
        Verb("sync_env", SyncEnv, _BUILDS, True, (e.NotFound, *_LOCK)),
        Verb("rollback_env", RollbackEnv, _BUILDS, True, (e.NotFound, *_LOCK)),
        Verb("list_generations", ListGenerations, errors=(e.NotFound,)),
        Verb("diff_env", DiffEnv, errors=(e.NotFound,)),
        Verb("export_env", ExportEnv, errors=(e.NotFound, e.UvFailed)),
        Verb("import_env", ImportEnv, _BUILDS, True, _DEFINE),
        Verb("pin_env", PinEnv, Takes.LOCKING, True, (e.NotFound, e.LockTimeout)),
        Verb("delete_env", DeleteEnv, Takes.LOCKING, True, (e.EnvironmentInUse, e.LockTimeout)),
        Verb("cleanup", Cleanup, _BUILDS, True),
        Verb("get_operations", GetOperations),
        Verb("delete_operations", DeleteOperations, is_change=True, errors=(e.StorageFailed,)),
        Verb("events", Events),
        Verb("explain", Explain, errors=(e.NotFound,)),
        Verb("doctor", Doctor, _BUILDS, True),
        Verb("prepare", Prepare, is_change=True, errors=(e.NotFound,)),
        Verb("watch", Watch),
        Verb("get_environment", GetEnvironment, errors=(e.NotFound,)),
        Verb("get_options", GetOptions, errors=(e.NotFound, e.NoEligibleNode)),
        Verb("describe", Describe),
    )
}
VERB_OF = {verb.request: verb for verb in VERBS.values()}

#: Stands for "the default of the verb" in the signatures of the provider.
DEFAULT: Any = type("Default", (), {"__repr__": lambda _: "<the verb's default>"})()


def request_of(kind: type[RequestT], arguments: Mapping[str, Any]) -> RequestT:
    """A request from its arguments; those that are `DEFAULT` are left out.

    Raises:
        InvalidInput: an argument is unknown, missing or of a wrong type.
        InvalidId: a variant id is not allowed.
    """
    given = {name: value for name, value in arguments.items() if value is not DEFAULT}
    return validated(kind, given, where=VERB_OF[kind].name)
