"""Arguments of wrong types: each is refused by name, by every verb and every method of a provider.

A LocalConnection stands behind the provider: a real manager, no Ray.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs import EnvSpec, RayEnvironmentProvider, verbs
from ray_envs.client.in_memory import InMemoryEnvironmentProvider
from ray_envs.errors import InvalidId, InvalidInput, InvalidPackages
from ray_envs.settings import Settings

REFUSED = (InvalidInput, InvalidId, InvalidPackages)

#: Right for no argument of any verb or method.
WRONG = [
    object(),
    b"x",
    {1: 2},
    (None,),
    [["six"]],
    10**400,
    EnvSpec,
    {"a": {"b": {3: [None]}}, 4: 5},
]
NAMES = ["object", "bytes", "mapping", "tuple", "nested", "huge", "class", "deep"]

RIGHT: dict[str, Any] = {
    "variant_id": "v",
    "variant_ids": ["v"],
    "spec": {},
    "config": {"packages": ["six"]},
    "packages": ["six"],
    "pyproject": "",
    "uv_lock": "",
    "from_": 1,
    "seen": 0,
    "handler": print,
    "request": verbs.ListEnvs(),
}
#: Arguments that only have to be true or false, or that go to Ray as they are.
FREE = {"strict", "everywhere", "patient", "prepare", "given"}

FIELDS = [(verb, name) for verb in verbs.VERBS.values() for name in verb.request.model_fields]


@pytest.mark.parametrize("wrong", WRONG, ids=NAMES)
@pytest.mark.parametrize(("verb", "field"), FIELDS, ids=lambda each: getattr(each, "name", each))
def test_a_verb_refuses_a_value_of_a_wrong_type(verb: verbs.Verb, field: str, wrong: Any) -> None:
    right = {n: RIGHT[n] for n, f in verb.request.model_fields.items() if f.is_required()}
    with pytest.raises(REFUSED) as caught:
        verbs.request_of(verb.request, {**right, field: wrong})
    assert caught.value.where == verb.name or isinstance(caught.value, InvalidId)
    assert field in str(caught.value) or isinstance(caught.value, InvalidId)
    with pytest.raises(REFUSED):
        verb.request(**{**right, field: wrong})


@pytest.mark.parametrize("verb", verbs.VERBS.values(), ids=lambda verb: verb.name)
def test_a_verb_refuses_an_unknown_argument_and_a_missing_one(verb: verbs.Verb) -> None:
    required = [name for name, f in verb.request.model_fields.items() if f.is_required()]
    right = {name: RIGHT[name] for name in required}
    verbs.request_of(verb.request, right)
    with pytest.raises(InvalidInput, match="unknown key 'variant_idd'"):
        verbs.request_of(verb.request, {**right, "variant_idd": "v"})
    for name in required:
        with pytest.raises(InvalidInput, match=f"{name} is missing"):
            verbs.request_of(verb.request, {n: v for n, v in right.items() if n != name})


def arguments_of(cls: type) -> list[tuple[str, str]]:
    """The name of each public method, with each of its parameters that has a type of its own."""
    return [
        (name, parameter.name)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        for parameter in inspect.signature(method).parameters.values()
        if not name.startswith("_") and parameter.name not in {"self", *FREE}
    ]


def call(provider: Any, method: str, parameter: str, wrong: Any) -> Any:
    bound = getattr(provider, method)
    parameters = inspect.signature(bound).parameters
    named: dict[str, Any] = {
        name: RIGHT[name]
        for name, each in parameters.items()
        if each.default is each.empty and each.kind is not each.VAR_POSITIONAL and name in RIGHT
    }
    if parameters[parameter].kind is inspect.Parameter.VAR_POSITIONAL:
        return bound(wrong)
    if parameter == "timeout_s" and method == "prepare":
        return bound("v", timeout_s=wrong)
    if parameter == "on_status":
        return bound("v", on_status=wrong)
    return bound(**{**named, "limit" if parameter == "filters" else parameter: wrong})


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayEnvironmentProvider]:
    folder = tmp_path_factory.mktemp("wrong")
    with RayEnvironmentProvider.without_cluster(Settings(root=folder / "root")) as made:
        yield made
        assert made.list_variants() == []


@pytest.mark.parametrize(("method", "parameter"), arguments_of(RayEnvironmentProvider))
def test_a_method_refuses_values_of_wrong_types(
    provider: RayEnvironmentProvider, method: str, parameter: str
) -> None:
    is_function = parameter in ("handler", "on_status")
    is_optional = inspect.signature(getattr(provider, method)).parameters[parameter].default is None
    for wrong in [*WRONG, None] if parameter in RIGHT and not is_optional else WRONG:
        if is_function and wrong is EnvSpec:
            continue  # a class can be called
        with pytest.raises(REFUSED) as caught:
            call(provider, method, parameter, wrong)
        assert len(str(caught.value)) < 2_500


@pytest.mark.parametrize(
    ("method", "parameter"),
    [each for each in arguments_of(InMemoryEnvironmentProvider) if each[0].startswith("create")],
)
def test_the_provider_for_tests_refuses_the_same(method: str, parameter: str) -> None:
    for wrong in WRONG:
        with pytest.raises(REFUSED):
            call(InMemoryEnvironmentProvider(), method, parameter, wrong)


@pytest.mark.parametrize("limit", [float("nan"), -1])
def test_a_wait_that_would_never_end_is_refused(
    provider: RayEnvironmentProvider, limit: float
) -> None:
    with pytest.raises(InvalidInput, match="timeout"):
        provider.prepare("v", timeout_s=limit)
    with pytest.raises(InvalidInput, match="timeout"):
        provider.cleanup_environment("v", timeout=limit)


def test_a_folder_that_is_no_path_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be used here") as caught:
        InMemoryEnvironmentProvider().create("v", {"project": "p"}, base=str(tmp_path))  # type: ignore[arg-type]
    assert "pathlib.Path" in caught.value.hint
