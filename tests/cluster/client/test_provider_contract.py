"""One contract, three providers: in memory, through the local door, and on a real Ray.

What a client of `EnvironmentProvider` may rely on, whichever it was given. WTB, a known client,
duck-types it: what it reads and in which order is in `test_what_wtb_does…`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs import (
    EnvironmentProvider,
    EnvSpec,
    InMemoryEnvironmentProvider,
    RayEnvironmentProvider,
    Settings,
)
from ray_envs.errors import (
    AlreadyExists,
    EnvironmentNotReady,
    InvalidId,
    InvalidInput,
    InvalidPackages,
    NotFound,
    RayEnvsError,
    ResolutionFailed,
)

pytestmark = pytest.mark.timeout(90)

OLD_SIX = EnvSpec(packages=("six==1.16.0",))
NEW_SIX = EnvSpec(packages=("six==1.17.0",))
TABLES = EnvSpec(packages=("tabulate==0.9.0",))
KEPT = {"kept/old-six": OLD_SIX, "kept/new-six": NEW_SIX, "kept/tables": TABLES}
OLD = {"packages": list(OLD_SIX.packages)}
NEW = {"packages": list(NEW_SIX.packages)}

Make = Callable[..., EnvironmentProvider]


@pytest.fixture(scope="module")
def local_settings(other_root: Callable[[str], Settings]) -> Settings:
    settings = other_root("local")
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        for name, spec in KEPT.items():
            envs.create(name, spec)
    return settings


@pytest.fixture(params=["memory", "local", "ray"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes providers of one kind; what they define is deleted after the test."""
    made: list[EnvironmentProvider] = []

    def maker(**options: Any) -> EnvironmentProvider:
        provider: EnvironmentProvider
        if request.param == "memory":
            provider = InMemoryEnvironmentProvider(**options)
            for name, spec in KEPT.items():
                provider.create(name, spec)
        elif request.param == "local":
            settings = request.getfixturevalue("local_settings")
            provider = RayEnvironmentProvider.without_cluster(settings, **options)
        else:
            request.getfixturevalue("cluster")
            provider = RayEnvironmentProvider.connect(**options)
        made.append(provider)
        return provider

    yield maker
    cleaner = maker()  # a test may have closed its own
    for status in cleaner.list_variants():
        if status["variant_id"] not in KEPT:
            cleaner.delete(status["variant_id"], force=True)
    for provider in made:
        provider.close()


@pytest.fixture
def envs(make: Make) -> EnvironmentProvider:
    return make()


def cannot_be_resolved(envs: EnvironmentProvider, variant_id: str) -> dict[str, Any]:
    """A config that makes the next creation of `variant_id` fail with ResolutionFailed."""
    if isinstance(envs, InMemoryEnvironmentProvider):
        envs.fail(variant_id, ResolutionFailed("no six 99", detail="uv says no", hint="use 1.17"))
    return {"packages": ["six==99"]}


def unknown_to(envs: EnvironmentProvider, before: list[str]) -> list[str]:
    """What `envs` lists now and did not list before."""
    return sorted(set(envs.list_environments()) - set(before))


# -- what is handed out ----------------------------------------------------------------------------


def test_creating_returns_what_clients_read_and_the_environment_is_ready(
    envs: EnvironmentProvider,
) -> None:
    created = envs.create_environment(
        "v1", {"workflow_id": "w", "node_id": "n", "version_id": "2", **OLD}
    )
    assert set(created) == {
        "variant_id", "type", "workflow_id", "node_id", "version_id", "env_path", "venv_path",
        "python_path", "python_version", "status", "key",
    }  # fmt: skip
    assert (created["variant_id"], created["workflow_id"], created["node_id"]) == ("v1", "w", "n")
    assert (created["version_id"], created["status"]) == ("2", "ACTIVE")
    assert created["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert all(type(value) is str for value in created.values())
    assert os.path.isfile(created["python_path"])
    assert os.path.isdir(created["env_path"])
    assert os.path.isdir(created["venv_path"])


def test_the_runtime_env_is_plain_text_with_an_existing_interpreter(
    envs: EnvironmentProvider,
) -> None:
    envs.create_environment("v1", {**OLD, "env_vars": {"MODE": "fast"}})
    runtime = envs.get_runtime_env("v1")
    assert runtime is not None
    assert set(runtime) == {
        "type", "env_path", "venv_path", "python_path", "env_vars", "py_executable",
    }  # fmt: skip
    env_vars = runtime.pop("env_vars")
    assert all(type(value) is str for value in runtime.values())
    assert all(type(value) is str for value in [*env_vars, *env_vars.values()])
    assert type(env_vars) is dict
    assert env_vars["MODE"] == "fast"
    assert runtime["py_executable"] == runtime["python_path"]
    assert os.path.isfile(runtime["py_executable"])
    assert json.loads(json.dumps(runtime)) == runtime


def test_an_unknown_variant_has_no_runtime_env(envs: EnvironmentProvider) -> None:
    assert envs.get_runtime_env("nobody") is None
    assert envs.status("nobody")["status"] == "NOT_EXISTS"


def test_using_an_unknown_variant_raises_not_found(envs: EnvironmentProvider) -> None:
    for use in (envs.options, envs.environment, envs.prepare):
        with pytest.raises(NotFound) as caught:
            use("nobody")
        assert caught.value.variant_id == "nobody"
        assert caught.value.hint


def test_equal_requirements_share_a_key_and_different_ones_do_not(
    envs: EnvironmentProvider,
) -> None:
    keys = [
        envs.create_environment(name, {"packages": packages})["key"]
        for name, packages in (
            ("a", ["six==1.16.0"]),
            ("b", ["Six == 1.16.0", "six==1.16.0"]),
            ("c", ["six==1.17.0"]),
        )
    ]
    assert keys[0] == keys[1] != keys[2]
    one, other = envs.options("a"), envs.options("b")
    assert one["runtime_env"] == other["runtime_env"]


def test_options_hold_the_environment_its_placement_and_what_the_caller_gave(
    envs: EnvironmentProvider,
) -> None:
    created = envs.create_environment("v1", OLD)
    options = envs.options(
        "v1",
        num_cpus=2,
        label_selector={"zone": "a"},
        runtime_env={"env_vars": {"MINE": "1"}, "working_dir": "."},
    )
    assert set(options) == {"runtime_env", "label_selector", "num_cpus"}
    runtime = options["runtime_env"]
    assert runtime["py_executable"] == created["python_path"]
    assert runtime["working_dir"] == "."
    assert runtime["env_vars"]["MINE"] == "1"
    assert runtime["env_vars"]["VIRTUAL_ENV"] == created["venv_path"]
    assert runtime["env_vars"]["PATH"].startswith(f"{created['venv_path']}/bin:")
    assert options["label_selector"]["zone"] == "a"
    if "ray_envs" not in runtime:  # the plugin of every node makes a worker wait elsewhere
        assert options["label_selector"]["ray.io/node-id"].startswith("in(")
        assert options["label_selector"]["ray.io/node-id"] != "in()"


@pytest.mark.parametrize(
    "given",
    [
        {"runtime_env": {"pip": ["six"]}},
        {"runtime_env": {"uv": ["six"]}},
        {"runtime_env": {"conda": "base"}},
        {"runtime_env": {"py_executable": "/usr/bin/python3"}},
        {"label_selector": {"ray.io/node-id": "abc"}},
        {"runtime_env": {"env_vars": {"VIRTUAL_ENV": "/mine"}}},
        {"runtime_env": {"env_vars": {"PYTHONPATH": "/mine"}}},
    ],
    ids=[
        "pip", "uv", "conda", "py_executable", "node-id", "VIRTUAL_ENV", "PYTHONPATH"
    ],
)  # fmt: skip
def test_options_that_contradict_the_environment_are_refused(
    envs: EnvironmentProvider, given: dict[str, Any]
) -> None:
    envs.create_environment("v1", OLD)
    with pytest.raises(InvalidInput) as caught:
        envs.options("v1", **given)
    assert caught.value.hint


# -- replacing -------------------------------------------------------------------------------------


def test_creating_an_existing_id_replaces_it(envs: EnvironmentProvider) -> None:
    before = envs.create_environment("v1", OLD)
    listed = envs.list_environments()
    after = envs.create_environment("v1", NEW)
    assert after["key"] != before["key"]
    assert after["status"] == "ACTIVE"
    assert envs.list_environments() == listed
    assert envs.status("v1")["generation"] == 2


def test_replacing_under_another_address_gives_the_first_one_up(envs: EnvironmentProvider) -> None:
    before = envs.list_environments()
    envs.create_environment("v1", {"workflow_id": "w", "node_id": "one", **OLD})
    envs.create_environment("v1", {"workflow_id": "w", "node_id": "two", **OLD})
    assert unknown_to(envs, before) == ["v1"]
    assert envs.status("w/one")["status"] == "NOT_EXISTS"


def test_a_creation_that_fails_keeps_the_old_record(envs: EnvironmentProvider) -> None:
    envs.create_environment("v1", OLD)
    before = (envs.get_runtime_env("v1"), envs.status("v1"), envs.list_environments())
    with pytest.raises(ResolutionFailed) as caught:
        envs.create_environment("v1", cannot_be_resolved(envs, "v1"))
    assert caught.value.detail
    assert caught.value.hint
    assert (envs.get_runtime_env("v1"), envs.status("v1"), envs.list_environments()) == before


def test_a_first_creation_that_fails_leaves_nothing(envs: EnvironmentProvider) -> None:
    before = envs.list_environments()
    with pytest.raises(ResolutionFailed):
        envs.create_environment("v1", cannot_be_resolved(envs, "v1"))
    assert envs.get_runtime_env("v1") is None
    assert envs.list_environments() == before


def test_an_equal_spec_changes_nothing(envs: EnvironmentProvider) -> None:
    first = envs.create("v1", OLD_SIX)
    envs.prepare("v1")
    again = envs.create("v1", {"packages": ["SIX==1.16.0"]}, replace=False)
    assert (again["generation"], again["key"]) == (first["generation"], first["key"])
    assert again["status"] == "ACTIVE"


def test_replacing_must_be_allowed_by_who_says_no(envs: EnvironmentProvider) -> None:
    first = envs.create("v1", OLD_SIX)
    with pytest.raises(AlreadyExists) as caught:
        envs.create("v1", NEW_SIX, replace=False)
    assert caught.value.variant_id == "v1"
    assert caught.value.hint
    assert envs.status("v1")["key"] == first["key"]
    assert envs.create("v1", NEW_SIX)["generation"] == first["generation"] + 1


# -- giving up -------------------------------------------------------------------------------------


def test_cleaning_up_forgets_the_variant_at_once(envs: EnvironmentProvider) -> None:
    before = envs.list_environments()
    envs.create_environment("v1", OLD)
    assert unknown_to(envs, before) == ["v1"]
    started = time.monotonic()
    envs.cleanup_environment("v1", timeout=5)
    assert time.monotonic() - started < 1
    assert envs.get_runtime_env("v1") is None
    assert envs.list_environments() == before
    envs.cleanup_environment("v1")


def test_cleaning_up_what_is_unknown_is_nothing(envs: EnvironmentProvider) -> None:
    before = envs.list_environments()
    envs.cleanup_environment("nobody")
    envs.delete("nobody")
    assert envs.list_environments() == before


def test_cleaning_up_an_id_whose_creation_failed_is_nothing(envs: EnvironmentProvider) -> None:
    with pytest.raises(ResolutionFailed):
        envs.create_environment("v1", cannot_be_resolved(envs, "v1"))
    with pytest.raises(InvalidPackages):
        envs.create_environment("v2", {"packages": ["-e ."]})
    envs.cleanup_environment("v1")
    envs.cleanup_environment("v2")


def test_cleaning_up_after_a_failure_does_not_hit_the_variant_of_that_name(
    envs: EnvironmentProvider,
) -> None:
    """`v1` failed under w/n; default/v1 is somebody else's."""
    envs.create("v1", OLD_SIX)
    config = {"workflow_id": "w", "node_id": "n", **cannot_be_resolved(envs, "w/n")}
    with pytest.raises(ResolutionFailed):
        envs.create_environment("v1", config)
    envs.cleanup_environment("v1")
    assert envs.status("default/v1")["status"] != "NOT_EXISTS"


def test_a_creation_whose_answer_was_lost_can_be_cleaned_up(
    envs: EnvironmentProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = envs.list_environments()
    create = envs._create

    def lose_the_answer(*args: Any, **kwargs: Any) -> Any:
        create(*args, **kwargs)
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(envs, "_create", lose_the_answer)
    with pytest.raises(ConnectionError):
        envs.create_environment("v1", {"workflow_id": "w", "node_id": "n", **OLD})
    envs.cleanup_environment("v1")
    assert envs.list_environments() == before
    assert envs.status("w/n")["status"] == "NOT_EXISTS"


def test_ids_that_only_clients_understand_are_theirs(envs: EnvironmentProvider) -> None:
    """With a node id, the variant id is any name; unknown ones are no error either."""
    name = "batch 7/actor:0/retry_1/" + "x" * 60
    before = envs.list_environments()
    assert envs.get_runtime_env(name) is None
    envs.cleanup_environment(name)
    envs.create_environment(name, {"node_id": "n", **OLD})
    assert unknown_to(envs, before) == [name]
    assert envs.get_runtime_env(name) is not None
    envs.cleanup_environment(name)
    envs.cleanup_environment(name)
    assert envs.get_runtime_env(name) is None
    assert envs.list_environments() == before


def test_two_ids_of_one_address_are_given_up_one_by_one(envs: EnvironmentProvider) -> None:
    """WTB makes one environment an actor, all with the ids of the same node."""
    before = envs.list_environments()
    for name in ("actor-0", "actor-1"):
        envs.create_environment(name, {"workflow_id": "w", "node_id": "n", **OLD})
    assert unknown_to(envs, before) == ["actor-0", "actor-1"]
    envs.cleanup_environment("actor-0")
    assert envs.get_runtime_env("actor-0") is None
    assert envs.get_runtime_env("actor-1") is not None
    envs.cleanup_environment("actor-1")
    assert envs.list_environments() == before


def test_deleting_forgets_and_may_be_repeated(envs: EnvironmentProvider) -> None:
    envs.create("w/n/1", OLD_SIX)
    envs.delete("w/n/1", force=True)
    envs.delete("w/n/1", force=True)
    assert envs.status("w/n/1")["status"] == "NOT_EXISTS"


# -- at once ---------------------------------------------------------------------------------------


def test_creations_of_different_ids_run_side_by_side(
    envs: EnvironmentProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_are_in = threading.Barrier(2)
    create = envs._create

    def meet(*args: Any, **kwargs: Any) -> Any:
        both_are_in.wait(20)
        return create(*args, **kwargs)

    monkeypatch.setattr(envs, "_create", meet)
    made: dict[str, Any] = {}
    threads = [
        threading.Thread(target=lambda n=name: made.update({n: envs.create_environment(n, OLD)}))
        for name in ("v1", "v2")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: created["status"] for name, created in made.items()} == {
        "v1": "ACTIVE",
        "v2": "ACTIVE",
    }


def test_create_and_cleanup_of_one_id_wait_for_each_other(
    envs: EnvironmentProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, delete = envs._create, envs._delete
    is_creating, may_go_on, is_deleting = (threading.Event() for _ in range(3))

    def slow(*args: Any, **kwargs: Any) -> Any:
        is_creating.set()
        assert may_go_on.wait(20)
        assert not is_deleting.is_set()
        return create(*args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> None:
        is_deleting.set()
        delete(*args, **kwargs)

    monkeypatch.setattr(envs, "_create", slow)
    monkeypatch.setattr(envs, "_delete", watched)
    creator = threading.Thread(target=envs.create_environment, args=("v1", OLD))
    creator.start()
    assert is_creating.wait(20)
    with pytest.raises(EnvironmentNotReady) as caught:
        envs.cleanup_environment("v1", timeout=0.1)
    assert caught.value.retryable
    cleaner = threading.Thread(target=envs.cleanup_environment, args=("v1",))
    cleaner.start()
    may_go_on.set()
    creator.join(60)
    cleaner.join(60)
    assert is_deleting.is_set()
    assert envs.get_runtime_env("v1") is None


def test_many_threads_on_one_id_end_in_one_of_their_wishes(envs: EnvironmentProvider) -> None:
    failures: list[BaseException] = []

    def change(config: dict[str, Any]) -> None:
        try:
            envs.create_environment("v1", config)
            envs.cleanup_environment("v1")
            envs.create_environment("v1", config)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=change, args=(c,)) for c in (OLD, NEW, OLD, NEW)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    kept = {envs.status(name)["key"] for name in ("kept/old-six", "kept/new-six")}
    assert envs.status("v1")["status"] == "ACTIVE"
    assert envs.status("v1")["key"] in kept


# -- where a spec comes from -----------------------------------------------------------------------


def test_a_spec_is_looked_up_by_variant_then_node_then_default(make: Make) -> None:
    envs = make(specs={"v1": OLD_SIX, "n": NEW_SIX, "default": TABLES})
    keys = {name: envs.status(name)["key"] for name in KEPT}
    config = {"workflow_id": "w", "packages": []}
    assert envs.create_environment("v1", {**config, "node_id": "n"})["key"] == keys["kept/old-six"]
    assert envs.create_environment("v2", {**config, "node_id": "n"})["key"] == keys["kept/new-six"]
    assert envs.create_environment("v3", {**config, "node_id": "m"})["key"] == keys["kept/tables"]
    own = envs.create_environment("v1", {**config, "node_id": "n", **NEW})
    assert own["key"] == keys["kept/new-six"]


def test_options_of_a_looked_up_spec_are_kept_and_the_config_wins(make: Make) -> None:
    spec = EnvSpec(packages=OLD_SIX.packages, env_vars={"A": "spec", "B": "spec"})
    envs = make(specs={"default": spec})
    envs.create_environment("v1", {"packages": []})
    envs.create_environment("v2", {"packages": [], "env_vars": {"A": "config"}})
    first, second = envs.get_runtime_env("v1"), envs.get_runtime_env("v2")
    assert first is not None
    assert second is not None
    assert (first["env_vars"]["A"], first["env_vars"]["B"]) == ("spec", "spec")
    assert second["env_vars"]["A"] == "config"


def test_base_packages_are_in_every_environment(make: Make) -> None:
    envs = make(base_packages=["six==1.16.0"])
    wanted = envs.status("kept/old-six")["key"]
    assert envs.create_environment("v1", {"packages": []})["key"] == wanted
    assert envs.create("v2", EnvSpec())["key"] == wanted


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant_id",
    ["", "..", "../x", "a b", "-x", ".x", "a/b/c/d", "x" * 300, "ä", "a\n", "/a", "a/"],
)
def test_ids_that_no_folder_can_have_are_refused(
    envs: EnvironmentProvider, variant_id: str
) -> None:
    before = envs.list_environments()
    for variant, config in (
        (variant_id, OLD),
        ("v1", {"node_id": variant_id, **OLD}),
        ("v1", {"workflow_id": variant_id, "node_id": "n", **OLD}),
    ):
        with pytest.raises(InvalidId) as caught:
            envs.create_environment(variant, config)
        assert caught.value.hint
        assert len(caught.value.message) < 200
    with pytest.raises(InvalidId):
        envs.create(variant_id, OLD_SIX)
    assert envs.list_environments() == before


@pytest.mark.parametrize(
    "package",
    ["-e .", "--index-url=https://x.org", "-r more.txt", "six==", "https://u:p@x.org/a.whl"],
)
def test_packages_that_are_no_requirements_are_refused(
    envs: EnvironmentProvider, package: str
) -> None:
    before = envs.list_environments()
    with pytest.raises(InvalidPackages) as caught:
        envs.create_environment("v1", {"packages": [package]})
    assert caught.value.hint
    assert "u:p" not in str(caught.value)
    assert envs.list_environments() == before


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"python_version": "3.8"}, "3.8"),
        ({"python_version": "banana"}, "banana"),
        ({"pakages": ["six"]}, "packages"),
        ({"packages": 3}, "packages"),
        ({"env_vars": {"PATH": "/x"}}, "PATH"),
        ({"env_vars": {"A": 1}}, "env_vars"),
        ({"extras": ["gpu"]}, "project"),
        ({"project": "/does/not/exist"}, "/does/not/exist"),
        ({"requirements": "/does/not/exist.txt"}, "/does/not/exist.txt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_that_cannot_be_meant_is_refused(
    envs: EnvironmentProvider, config: dict[str, Any], word: str
) -> None:
    before = envs.list_environments()
    with pytest.raises(InvalidInput) as caught:
        envs.create_environment("v1", {"packages": ["six==1.16.0"], **config})
    assert word in str(caught.value)
    assert "v1" in str(caught.value) or word.startswith("/")
    assert envs.list_environments() == before


def test_packages_may_be_one_text(envs: EnvironmentProvider) -> None:
    created = envs.create_environment("v1", {"packages": "# why\nsix==1.16.0\n\n"})
    assert created["key"] == envs.status("kept/old-six")["key"]


def test_the_clusters_own_python_version_is_accepted(envs: EnvironmentProvider) -> None:
    minor = ".".join(map(str, sys.version_info[:2]))
    assert envs.create_environment("v1", {**OLD, "python_version": minor})["status"] == "ACTIVE"


# -- the object ------------------------------------------------------------------------------------


def test_a_provider_is_true_even_when_it_knows_nothing(envs: EnvironmentProvider) -> None:
    assert envs


def test_a_provider_closes_at_the_end_of_a_block_and_once_more(make: Make) -> None:
    envs = make()
    with envs as same:
        assert same is envs
        assert isinstance(envs.list_variants(), list)
    envs.close()
    envs.close()


def test_preparing_tells_how_it_goes_and_ends_with_every_status(envs: EnvironmentProvider) -> None:
    envs.create("v1", OLD_SIX)
    envs.create("v2", NEW_SIX)
    told: list[set[str]] = []
    statuses = envs.prepare("v1", "v2", on_status=lambda news: told.append(set(news)))
    assert told
    assert all(names == {"v1", "v2"} for names in told)
    assert {name: status["status"] for name, status in statuses.items()} == {
        "v1": "ACTIVE",
        "v2": "ACTIVE",
    }
    assert all(node["phase"] == "ready" for s in statuses.values() for node in s["nodes"].values())
    assert envs.prepare() == {}


def test_a_status_is_plain_data(envs: EnvironmentProvider) -> None:
    envs.create_environment("v1", OLD)
    status = envs.status("v1")
    assert json.loads(json.dumps(status)) == status
    (row,) = [row for row in envs.list_variants() if row["variant_id"] == "v1"]
    assert {"workflow_id", "node_id", "status", "key", "generation"} < row.keys()
    assert {name: status[name] for name in row.keys() & status.keys()} == {
        name: row[name] for name in row.keys() & status.keys()
    }


def test_every_error_of_a_provider_is_one_of_ours(envs: EnvironmentProvider) -> None:
    for config in ({"packages": [3]}, {"packages": None, "python_version": 3.11}, {"groups": "x"}):
        with pytest.raises(RayEnvsError):
            envs.create_environment("v1", config)


def test_what_wtb_does_from_its_first_call_to_its_shutdown(make: Make) -> None:
    """Create, drop the answer, read the runtime_env, run with it, clean up; ids come back."""
    envs = make(base_packages=["six==1.16.0"])
    before = envs.list_environments()
    for _ in range(2):
        names = [f"wtb_variant-{i}" for i in range(2)]
        for i, name in enumerate(names):
            config = {"packages": [], "workflow_id": "wf", "node_id": f"node-{i}"}
            envs.create_environment(name, config)
            runtime = envs.get_runtime_env(name)
            assert runtime is not None
            assert runtime["venv_path"]
            assert os.path.isfile(runtime["py_executable"])
        for name in [*names, "never-created"]:
            envs.cleanup_environment(name, timeout=5.0)
        assert envs.list_environments() == before


# -- the two doors of the real one -----------------------------------------------------------------


def test_without_a_cluster_the_manager_of_that_root_is_used_where_one_lives(
    cluster: RayEnvironmentProvider, root: Path
) -> None:
    cluster.create("seen-by-both", OLD_SIX)
    with RayEnvironmentProvider.without_cluster(Settings(root=root)) as envs:
        assert envs.status("seen-by-both")["status"] in ("CREATING", "ACTIVE")
        envs.delete("seen-by-both", force=True)
    assert cluster.status("seen-by-both")["status"] == "NOT_EXISTS"


def test_a_definition_outlives_the_process_that_made_it(local_settings: Settings) -> None:
    with RayEnvironmentProvider.without_cluster(local_settings) as envs:
        created = envs.create_environment("stays", OLD)
    with RayEnvironmentProvider.without_cluster(local_settings) as envs:
        assert envs.get_runtime_env("stays") is not None
        assert envs.status("stays")["key"] == created["key"]
        envs.delete("stays", force=True)


def test_a_wait_that_is_too_short_is_an_error_of_ours_and_undoes_nothing_by_half(
    other_root: Callable[[str], Settings],
) -> None:
    """The time for a build is over before it ends: create fails as any create that fails."""
    settings = other_root("impatient").model_copy(update={"prepare_timeout_s": 0.001})
    with RayEnvironmentProvider.without_cluster(settings) as envs:
        with pytest.raises(EnvironmentNotReady) as caught:
            envs.create_environment("v1", OLD)
        assert caught.value.hint
        assert envs.get_runtime_env("v1") is None
        assert envs.list_environments() == []


_OTHER_DRIVER = """
import os, sys
import ray
mode = sys.argv[1]
if mode == "init-first":
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", num_cpus=2,
             runtime_env={"env_vars": {"OF_THE_JOB": "1"}})
from ray_envs import EnvSpec, RayEnvironmentProvider

with RayEnvironmentProvider.connect("local") as envs:
    envs.create("v1", EnvSpec(packages=["six==1.16.0"]))
    envs.prepare("v1")

    @ray.remote
    def where():
        import six
        return sys.prefix, six.__version__

    prefix, version = ray.get(where.options(**envs.options("v1")).remote(), timeout=60)
    assert prefix == envs.environment("v1")["venv_path"], prefix
    print("six", version)
print("connected", ray.is_initialized())
ray.shutdown()
"""


@pytest.mark.parametrize("mode", ["init-first", "embedded"])
def test_a_driver_in_a_folder_of_foreign_modules_gets_its_environment(
    other_root: Callable[[str], Settings], tmp_path: Path, mode: str
) -> None:
    """The manager is nobody's job: a `tomlkit.py` in the driver's folder is not its tomlkit."""
    settings = other_root(mode)
    (tmp_path / "tomlkit.py").write_text("raise ImportError('the manager took the driver folder')")
    (tmp_path / "uv.py").write_text("raise ImportError('the agent took the driver folder')")
    environ = {**os.environ, **settings.to_environment(), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", _OTHER_DRIVER, mode],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    is_still_connected = mode == "init-first"
    assert done.stdout.splitlines() == ["six 1.16.0", f"connected {is_still_connected}"]
