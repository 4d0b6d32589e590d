"""The operator's policy as users meet it: refused by name before anything is written or run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ray_envs.errors import InvalidInput, InvalidPackages, RayEnvsError, ResolutionFailed, UvFailed
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId
from ray_envs.settings import Settings
from ray_envs.testing import FakeUv
from tests.local.conftest import tried
from tests.local.life_tools import managed, rows_of, spec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "https://packages.invalid/simple"
PROJECT = '[project]\nname = "x"\nversion = "1"\ndependencies = ["six"]\n'

#: A package that was only ever published as source.
SOURCE_ONLY = "docopt==0.6.2"


@pytest.fixture
def settings(tmp_path: Path, fake_uv: FakeUv) -> Settings:
    """A root where uv may resolve, and nothing is ever built."""
    made = tried(Settings(root=tmp_path / "root", uv_retries=0, tick_s=0.5))
    fake_uv.fail("sync", times=None)
    return made


def created(settings: Settings, given: dict[str, Any], **policy: Any) -> dict[str, Any]:
    """The status of a variant that was defined under a policy."""
    strict = settings.model_copy(update=policy)
    told: dict[str, Any] = managed(strict, lambda m: m.create_env(variant_id="v", spec=given))
    return told


def refused(settings: Settings, given: dict[str, Any], **policy: Any) -> RayEnvsError:
    """The error of a create that wrote nothing; a row only where uv had been asked."""
    strict = settings.model_copy(update=policy)

    async def act(manager: EnvManager) -> Any:
        with pytest.raises(RayEnvsError) as caught:
            await manager.create_env(variant_id="v", spec=given)
        status = await manager.get_env_status(variant_id="v")
        return caught.value, status["status"], await rows_of(manager, "v")

    error, status, rows = managed(strict, act)
    assert status == "NOT_EXISTS"
    assert Registry(strict).all() == []
    assert not (strict.root / "envs" / EnvId.parse("v").folder).exists()
    assert [row["status"] for row in rows] in ([], ["failed"])
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("requirement", "kind"),
    [
        (f"six @ git+https://host.invalid/six@{COMMIT}", "git"),
        ("six @ https://host.invalid/six-1.17.0-py2.py3-none-any.whl", "url"),
    ],
    ids=["git", "url"],
)
def test_repositories_and_files_are_refused_unless_the_operator_allows_them(
    settings: Settings, fake_uv: FakeUv, requirement: str, kind: str
) -> None:
    for given in (spec(requirement), spec(pyproject=PROJECT.replace('"six"', f'"{requirement}"'))):
        error = refused(settings, given)
        assert isinstance(error, InvalidPackages)
        assert f"comes from {kind}, which is not allowed" in error.message
        assert f"add {kind} to RAY_ENVS_ALLOWED_SOURCES (now: local)" in error.hint
    other = "url" if kind == "git" else "git"
    assert f"(now: {other})" in refused(settings, spec(requirement), allowed_sources=(other,)).hint
    assert fake_uv.calls() == []
    fake_uv.fail("lock", exit_code=2)  # it is uv's turn now, and there is no such host
    assert isinstance(refused(settings, spec(requirement), allowed_sources=(kind,)), UvFailed)
    assert len(fake_uv.calls("lock")) == 1


def test_a_source_of_a_project_is_refused_like_a_requirement(
    settings: Settings, fake_uv: FakeUv
) -> None:
    table = f'[tool.uv.sources]\nsix = {{ git = "https://host.invalid/six", rev = "{COMMIT}" }}\n'
    error = refused(settings, spec(pyproject=f"{PROJECT}\n{table}"))
    assert isinstance(error, InvalidInput)
    assert "six comes from git" in error.message
    assert error.where.endswith("tool.uv.sources.six")
    assert fake_uv.calls() == []


def test_an_index_that_a_project_names_must_be_an_allowed_one(
    settings: Settings, fake_uv: FakeUv
) -> None:
    named = f'{PROJECT}\n[[tool.uv.index]]\nname = "other"\nurl = "https://other.invalid/simple"\n'
    error = refused(settings, spec(pyproject=named), allowed_indexes=(INDEX,))
    assert isinstance(error, InvalidInput)
    assert error.message == (
        "the index https://other.invalid/simple is named, which is not allowed"
    )
    assert INDEX in error.hint
    assert "RAY_ENVS_ALLOWED_INDEXES" in error.hint
    assert fake_uv.calls() == []


def test_what_uv_took_from_another_index_is_refused_after_the_resolution(
    settings: Settings, fake_uv: FakeUv
) -> None:
    """The variables of uv's process can name one too: the lock has the last word."""
    error = refused(settings, spec("six"), allowed_indexes=(INDEX,))
    assert isinstance(error, InvalidPackages)
    assert error.where == "uv.lock"
    assert "comes from registry" in error.message
    assert f"use {INDEX}" in error.hint
    assert [call.command for call in fake_uv.calls()] == ["lock"]


@pytest.mark.parametrize("by", ["settings", "spec"])
def test_a_package_without_a_wheel_is_refused_where_only_wheels_are_allowed(
    settings: Settings, by: str
) -> None:
    policy = {"only_binary": True} if by == "settings" else {}
    error = refused(settings, spec(SOURCE_ONLY, only_binary=by == "spec"), **policy)
    assert isinstance(error, ResolutionFailed)
    assert "docopt" in error.detail
    assert "RAY_ENVS_ONLY_BINARY" in error.hint


def test_a_package_without_a_wheel_is_taken_elsewhere(settings: Settings) -> None:
    told = created(settings, spec(SOURCE_ONLY))
    assert told["packages"]["docopt"] == "0.6.2"


def test_the_operator_s_cut_off_is_that_of_specs_that_give_none(settings: Settings) -> None:
    created(settings, spec("six"), exclude_newer="2099-01-01")
    (record,) = Registry(settings).all()
    assert record.definition.exclude_newer == "2099-01-01"
    assert 'exclude-newer = "2099-01-0' in Registry(settings).lock_text(record.env_id, 1)[1]


def test_a_spec_may_be_stricter_than_the_operator_and_not_laxer(
    settings: Settings, fake_uv: FakeUv
) -> None:
    error = refused(settings, spec(exclude_newer="2099-01-02"), exclude_newer="2099-01-01")
    assert isinstance(error, InvalidInput)
    assert error.message == (
        "2099-01-02 is later than 2099-01-01, the latest cut-off that is allowed"
    )
    assert "RAY_ENVS_EXCLUDE_NEWER" in error.hint
    assert fake_uv.calls() == []
    told = created(settings, spec(exclude_newer="2098-12-31"), exclude_newer="2099-01-01")
    assert told["generation"] == 1
    (record,) = Registry(settings).all()
    assert record.definition.exclude_newer == "2098-12-31"


def test_a_cut_off_is_real_what_came_later_does_not_exist(settings: Settings) -> None:
    error = refused(settings, spec("six", exclude_newer="2020-01-01"))
    assert isinstance(error, ResolutionFailed)
    assert "ray" in error.detail


def test_a_package_without_a_version_inherits_that_of_the_cluster_where_it_is_asked_for(
    settings: Settings,
) -> None:
    here = version("packaging")
    created(settings, spec("packaging", "zipp", "six>=1.16", inherit_versions=True))
    (record,) = Registry(settings).all()
    assert record.definition.packages == (f"packaging=={here}", "six>=1.16", "zipp")
    assert record.current.packages["packaging"] == here


def test_without_being_asked_for_nothing_is_inherited(settings: Settings) -> None:
    created(settings, spec("packaging"))
    (record,) = Registry(settings).all()
    assert record.definition.packages == ("packaging",)


def test_what_is_added_later_meets_the_same_policy(settings: Settings, fake_uv: FakeUv) -> None:
    async def act(manager: EnvManager) -> Any:
        await manager.create_env(variant_id="v", spec=spec("six"))
        calls = len(fake_uv.calls("lock"))
        with pytest.raises(InvalidPackages, match="comes from git, which is not allowed"):
            await manager.add_deps(
                variant_id="v", packages=[f"zipp @ git+https://host.invalid/zipp@{COMMIT}"]
            )
        assert len(fake_uv.calls("lock")) == calls
        return await manager.list_generations(variant_id="v")

    assert [row["generation"] for row in managed(settings, act)] == [1]
