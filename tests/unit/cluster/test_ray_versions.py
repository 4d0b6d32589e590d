"""Which versions of Ray are refused, noted or called tried; where its private parts are named."""

from __future__ import annotations

import ast
import logging
import os
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import ray_envs
from ray_envs.cluster import ray_versions
from ray_envs.cluster.connecting import connect
from ray_envs.cluster.nodes import LocalNodes
from ray_envs.cluster.ray_versions import OLDEST, TESTED, check, described
from ray_envs.cluster.tokens import make_token_if_home_is_closed, use_token
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.errors import ManagerUnavailable, WrongEnvironment

ROOT = Path(ray_envs.__file__).parent
#: Names of Ray that may change with each version.
PRIVATE = ("ray._private", "ray._raylet", "ray.core.generated")
#: The modules that may name them. Ray loads the plugin by itself, and it may import little.
MAY = {"cluster/ray_versions.py", "plugin/environment_plugin.py", "worker/forked.py"}


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What a process logs that has not noted anything yet."""
    ray_versions._note_untried.cache_clear()
    ray_versions.note_no_tokens.cache_clear()
    caplog.set_level(logging.INFO, "ray_envs")
    return caplog


@pytest.mark.parametrize(
    "version",
    [*TESTED, "2.51", "2.51.0", "2.51.3", "2.53.0", "2.55.1.post1", "2.59.9", "2.60.0rc1"],
)
def test_versions_between_the_oldest_and_the_newest_tried_work_without_a_word(
    version: str, told: pytest.LogCaptureFixture
) -> None:
    check(version)
    assert told.messages == []


@pytest.mark.parametrize(
    "version", ["2.60.1", "2.61.0", "2.100.0", "3.0.0", "3.0.0.dev0", "2.61.0rc1", "odd", ""]
)
def test_a_newer_or_odd_version_is_noted_once_in_a_process(
    version: str, told: pytest.LogCaptureFixture
) -> None:
    check(version)
    check(version)
    (text,) = told.messages
    assert text == (
        f"ray_envs has not been tried with Ray {version}; the newest that it was tried with is "
        f"{TESTED[-1]}"
    )


@pytest.mark.parametrize("version", ["2.50.1", "2.50.9", "2.9.3", "2.5.1", "1.13.0", "0.8", "2.50"])
def test_an_older_version_is_refused_with_what_helps(
    version: str, told: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WrongEnvironment, match=f"Ray {version} is too old") as caught:
        check(version)
    assert f"ray>={OLDEST},<3" in caught.value.hint
    assert told.messages == []


def test_a_ray_that_is_too_old_is_refused_at_each_door(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.50.1")
    monkeypatch.setattr("ray_envs.cluster.nodes.version", lambda _: "2.50.1")
    for door in (lambda: connect("local"), LocalNodes(object).ray_version):
        with pytest.raises(WrongEnvironment, match=r"Ray 2\.50\.1 is too old"):
            door()


def test_a_ray_without_tokens_says_once_that_it_ignores_the_wish_for_one(
    monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_versions, "_token_loader", lambda: None)  # as before 2.52
    monkeypatch.setattr(ray_versions, "is_refused", lambda *_: False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert (ray_versions.has_tokens(), ray_versions.makes_tokens()) == (False, False)
    assert ray_versions.token_header() == {}
    make_token_if_home_is_closed()
    use_token("127.0.0.1:1")
    assert told.messages == []
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for _ in range(2):
        make_token_if_home_is_closed()
        use_token("127.0.0.1:1")
    (text,) = told.messages
    assert "this Ray has no tokens" in text
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setattr(ray_versions, "is_refused", lambda *_: True)
    with pytest.raises(ManagerUnavailable, match="wants a token, and this Ray has no tokens"):
        use_token("127.0.0.1:1")


def test_doctor_says_of_a_version_whether_it_was_tried() -> None:
    assert [described(each) for each in TESTED] == [f"{each} (tried)" for each in TESTED]
    for version in ("2.51.1", "2.60.1", "odd"):
        text = described(version)
        assert text.startswith(f"{version} (not one of the tried versions: ")
        assert all(each in text for each in TESTED)


def test_the_versions_that_were_tried_are_those_that_the_package_accepts() -> None:
    data = parsed_toml((ROOT.parent / "pyproject.toml").read_text(), where="pyproject.toml")
    (wanted,) = (each for each in data["project"]["dependencies"] if each.startswith("ray"))
    accepted = SpecifierSet(wanted.removeprefix("ray"))
    assert [each for each in TESTED if each not in accepted] == []
    assert Version(OLDEST) in accepted
    assert sorted(TESTED, key=Version) == list(TESTED)
    assert Version(TESTED[0]).release[:2] == Version(OLDEST).release


def test_only_one_module_and_the_plugin_name_private_parts_of_ray() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            if any(name.startswith(PRIVATE) for name in names):
                found.add(str(path.relative_to(ROOT)))
    assert found == MAY
