"""The words: errors travel, ids never collide, settings and models say what is wrong with them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_envs import verbs
from ray_envs.batch_models import BatchSpec, RunDefaults, VariantSpec, split_entrypoint
from ray_envs.errors import InvalidId, InvalidInput, RayEnvsError, all_errors, from_dict
from ray_envs.models import MAX_ID_LENGTH, EnvId, Phase, Target
from ray_envs.settings import Settings, cut_off
from ray_envs.specs import EnvSpec
from ray_envs.validation import nearest_hint, validated

# -- errors

FIELDS = ("hint", "detail", "variant_id", "key", "node_id", "where")
some_fields = st.dictionaries(st.sampled_from(FIELDS), st.text(min_size=1))


@given(st.sampled_from(all_errors()), st.text(), some_fields)
def test_every_error_survives_pickling_and_plain_data(
    cls: type[RayEnvsError], message: str, fields: dict[str, str]
) -> None:
    error = cls(message, **fields)
    for back in (pickle.loads(pickle.dumps(error)), from_dict(error.to_dict())):
        assert type(back) is cls
        assert str(back) == str(error)
        assert {name: getattr(back, name) for name in FIELDS} == {
            **dict.fromkeys(FIELDS, ""),
            **fields,
        }
        assert (back.message, back.args) == (message, (message,))


def test_no_two_errors_share_an_exit_code() -> None:
    codes = [cls.exit_code for cls in all_errors()]
    assert len(set(codes)) == len(codes)
    # 0 is success, 1 and 2 are what Python and click use themselves.
    assert all(3 <= code <= 125 for code in codes)


def test_every_error_says_what_it_means_and_whether_to_try_again() -> None:
    assert all(cls.__doc__ and isinstance(cls.retryable, bool) for cls in all_errors())
    assert not RayEnvsError.retryable


def test_an_error_of_a_newer_version_is_still_an_error() -> None:
    error = from_dict({"type": "FromTheFuture", "message": "m", "hint": "h", "more": "x"})
    assert type(error) is RayEnvsError
    assert str(error) == "m\nhint: h"


def test_an_error_says_where_what_and_what_to_do() -> None:
    error = InvalidInput("is wrong", where="a.toml", detail="uv said\n", hint="mend it")
    assert str(error) == "a.toml: is wrong\nuv said\nhint: mend it"


def test_what_an_error_knows_already_is_kept_when_more_is_added() -> None:
    error = InvalidInput("m", key="k").about(key="other", node_id="n")
    assert (type(error), error.key, error.node_id) == (InvalidInput, "k", "n")


# -- ids

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
triples = st.tuples(ids, ids, st.none() | ids)
# Few letters and many underscores: where joined names would meet.
CLASHING = ["a", "A", "a_", "a_a", "a__", "a__a", "a_a_a", "a5F", "a-", "a.a"]
CLASHING_TRIPLES = list(itertools.product(CLASHING, CLASHING, [None, *CLASHING]))


def env_id(triple: tuple[str, str, str | None]) -> EnvId:
    workflow, node, version = triple
    return EnvId(workflow_id=workflow, node_id=node, version_id=version)


@given(triples)
def test_two_ids_never_share_a_folder(triple: tuple[str, str, str | None]) -> None:
    some = {triple, *CLASHING_TRIPLES}
    # The same letters, cut elsewhere.
    workflow, node, version = triple
    some |= {(f"{workflow}_{node}", version, None)} if version else set()
    some |= {(workflow, f"{node}_{version}", None), (workflow, node, None)} if version else set()
    assert len({env_id(each).folder for each in some}) == len(some)


@given(st.from_regex(r"[ab_]{1,6}", fullmatch=True), st.data())
def test_cutting_one_text_in_two_ways_gives_two_folders(text: str, data: st.DataObject) -> None:
    text = f"a{text}_a{text}_a"
    cuts = [i for i in range(1, len(text) - 1) if text[i] == "_" and text[i + 1] != "_"]
    one, two = (data.draw(st.sampled_from(cuts)) for _ in range(2))
    folders = [env_id((text[:cut], text[cut + 1 :], None)).folder for cut in (one, two)]
    assert (folders[0] == folders[1]) == (one == two)


@given(triples)
def test_a_folder_is_one_plain_name_and_the_id_reads_back(
    triple: tuple[str, str, str | None],
) -> None:
    given_id = env_id(triple)
    assert Path(given_id.folder).name == given_id.folder
    assert len(given_id.folder.encode()) <= 240
    assert EnvId.parse(str(given_id)) == given_id
    assert EnvId.model_validate(given_id.model_dump()) == given_id


def test_an_id_is_written_as_short_as_it_can_be() -> None:
    assert str(EnvId(node_id="a")) == "a"
    assert str(EnvId(workflow_id="w", node_id="a")) == "w/a"
    assert str(EnvId(node_id="a", version_id="1")) == "default/a/1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("a/", "empty"),
        ("..", "not allowed"),
        ("-a", "not allowed"),
        ("_a", "not allowed"),
        ("a b", "not allowed"),
        ("a\n", "not allowed"),
        ("ä", "not allowed"),
        ("a\x00", "not allowed"),
        ("a/b/c/d", "is not the id of a variant"),
        ("a" * (MAX_ID_LENGTH + 1), "65 characters"),
        ("/".join(["a" + "_" * 60] * 3), "too long"),
    ],
)
def test_an_id_that_could_leave_or_break_a_folder_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidId, match=said) as caught:
        EnvId.parse(text)
    assert caught.value.hint
    assert len(str(caught.value)) < 400


# -- models


@pytest.mark.parametrize(
    ("model", "data", "said", "hint"),
    [
        (EnvSpec, {"package": ["a"]}, "unknown key 'package'", "did you mean 'packages'?"),
        (Target, {"python": "3", "ray": "2", "rya": 1}, "'rya'", "did you mean 'ray'?"),
        (Target, {"python": "3", "ray": "2", "qqq": 1}, "'qqq'", "known keys: python, ray"),
        (Target, {"pyhton": "3"}, "unknown key 'pyhton'", "did you mean 'python'?"),
        (Target, {"python": "3"}, "ray is missing", ""),
        (EnvSpec, {"packages": [1]}, "packages[0]: ", ""),
        (EnvSpec, {"project": "a", "requirements": "b"}, "either project", ""),
        (EnvSpec, {"script": "a", "pylock": "b"}, "only one", ""),
        (EnvSpec, {"script": "a", "requirements": "b"}, "only one", ""),
        (EnvSpec, {"pylock": "a", "groups": ["b"]}, "give project too", ""),
        (EnvSpec, {"extras": ["a"]}, "give project too", ""),
        (EnvSpec, {"env_vars": {"A B": ""}}, "'A B' is not the name", ""),
        (EnvSpec, {"env_vars": {"PATH": ""}}, "PATH is set by ray_envs", ""),
    ],
)
def test_wrong_data_is_one_clear_error(
    model: type[Any], data: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        validated(model, data, where="spec.toml")
    assert said in caught.value.message
    assert (caught.value.hint, caught.value.where) == (hint, "spec.toml")


@pytest.mark.parametrize(
    ("model", "data", "said", "hint"),
    [
        (EnvSpec, {"package": ["a"]}, "unknown key 'package'", "did you mean 'packages'?"),
        (EnvSpec, {"packages": 3}, "packages: Input should be a list", ""),
        (EnvSpec, {"env_vars": {"A": 1}}, "env_vars.A: ", ""),
        (EnvSpec, {"extras": ["a"]}, "give project too", ""),
        (EnvSpec, {"num_gpus": 1.5}, "num_gpus: 1.5: Ray gives", ""),
        (Target, {"python": "3"}, "ray is missing", ""),
        (Settings, {"root": "relative"}, "root: relative is not an absolute path", ""),
        (Settings, {"rot": "/r"}, "unknown key 'rot'", "did you mean 'root'?"),
        (verbs.AddDeps, {"variant_id": 3, "packages": []}, "variant_id: ", ""),
        (verbs.AddDeps, {"variant_id": "v"}, "packages is missing", ""),
        (verbs.ListEnvs, {"a": 1}, "unknown key 'a'", "there are no keys here"),
        (VariantSpec, {"id": "a", "retries": -1}, "retries: ", ""),
        (BatchSpec, {"variants": [{"id": "a", "packages": [1]}]}, "name is missing", ""),
    ],
)
def test_building_a_model_in_a_program_raises_the_same_error(
    model: Any, data: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        model(**data)
    assert said in caught.value.message
    assert (caught.value.where, caught.value.hint) == (model.__name__, hint)


def test_a_field_that_is_given_without_its_name_is_refused() -> None:
    model: Any = EnvSpec
    with pytest.raises(InvalidInput, match="without a name") as caught:
        model(["six"])
    assert "EnvSpec(packages=" in caught.value.hint


def test_a_model_is_copied_pickled_and_read_as_before() -> None:
    spec = EnvSpec(packages=["six"], env_vars={"A": "b"})
    for other in (
        copy.deepcopy(spec),
        pickle.loads(pickle.dumps(spec)),
        spec.model_copy(),
        EnvSpec.model_validate(spec.model_dump()),
        EnvSpec.model_validate_json(spec.model_dump_json()),
    ):
        assert (other, type(other)) == (spec, EnvSpec)
    with pytest.raises(ValidationError):
        EnvSpec.model_validate({"packages": 3})


def test_the_data_inside_a_model_is_named_by_its_whole_path() -> None:
    model: Any = BatchSpec
    with pytest.raises(InvalidInput) as caught:
        model(name="b", entrypoint="m:f", cases=(), variants=[{"id": "a", "packages": [1]}])
    assert caught.value.message.startswith("variants[0].packages[0]: ")


def test_a_nested_key_is_compared_with_the_keys_of_its_own_table() -> None:
    data = {"name": "b", "entrypoint": "m:f", "cases": [], "variants": [{"id": "a", "retrys": 1}]}
    with pytest.raises(InvalidInput) as caught:
        validated(BatchSpec, data, where="batch.toml")
    assert caught.value.hint == "did you mean 'retries'?"
    assert "retrys" in caught.value.message


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["num_cpus", "num_gpus", "memory", "retries", "timeout_s"])
def test_resources_and_limits_are_finite(name: str, value: float) -> None:
    for model, data in ((RunDefaults, {}), (VariantSpec, {"id": "a"})):
        with pytest.raises(InvalidInput) as caught:
            validated(model, {**data, name: value}, where="batch.toml")
        assert caught.value.message.startswith(f"{name}: ")


@pytest.mark.parametrize("entrypoint", ["digits:evaluate", "a.b.c:run", "_x:_y", "naïve:übung"])
def test_an_entrypoint_is_a_module_and_a_function(entrypoint: str) -> None:
    assert ":".join(split_entrypoint(entrypoint, where="x")) == entrypoint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("./digits.py:evaluate", "write digits:evaluate"),
        ("a.b.run", "write a.b:run"),
        ("class:run", 'write "accuracy:evaluate" for the function evaluate in accuracy.py'),
    ],
)
def test_another_form_of_entrypoint_is_refused_with_the_one_that_was_meant(
    text: str, hint: str
) -> None:
    with pytest.raises(InvalidInput, match="is not of the form module:function") as caught:
        split_entrypoint(text, where="batch.toml")
    assert (caught.value.hint, caught.value.where) == (hint, "batch.toml")


def test_a_wrong_id_inside_data_stays_an_invalid_id() -> None:
    with pytest.raises(InvalidId):
        validated(EnvId, {"node_id": "../x"}, where="call")


def test_models_are_frozen() -> None:
    spec = EnvSpec(packages=("six",))
    with pytest.raises(ValidationError):
        spec.packages = ()  # type: ignore[misc]  # what mypy says is what is tested


def test_a_variant_carries_its_spec() -> None:
    variant = VariantSpec(id="a", packages=("six",), num_cpus=2)
    assert variant.env_spec() == EnvSpec(packages=("six",))


def test_a_target_knows_its_minor_python_and_phases_their_end() -> None:
    assert Target(python="3.11.7", ray="2.60.0").python_minor == "3.11"
    assert {phase for phase in Phase if phase.is_final} == {Phase.READY, Phase.FAILED, Phase.CACHED}


def test_a_hint_names_the_nearest_or_all() -> None:
    assert nearest_hint("chek", ["check", "more"]) == "did you mean 'check'?"
    assert nearest_hint("zzz", ["b", "a"]) == "known keys: a, b"


# -- settings


def moment(value: datetime) -> str:
    """RFC 3339, as people and TOML write it."""
    return value.isoformat() + "Z"


positive = st.floats(min_value=0.001, max_value=1e9)
some_settings = st.builds(
    Settings,
    root=st.from_regex(r"/[a-z0-9._-]{1,9}(/[a-z0-9_]{1,9}){0,2}", fullmatch=True).map(Path),
    uv_lock_timeout_s=positive,
    tick_s=positive,
    uv_retries=st.integers(0, 99),
    build_niceness=st.integers(0, 19),
    min_free_bytes=st.integers(0, 2**60),
    allowed_indexes=st.lists(
        st.from_regex(r"https?://[A-Za-z0-9.:\[\]-]{1,9}(/[^\s,?#]{0,9})?", fullmatch=True)
    ).map(tuple),
    allowed_sources=st.lists(st.sampled_from(["local", "git", "url"])).map(tuple),
    only_binary=st.booleans(),
    exclude_newer=st.none() | st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1)).map(moment),
    malware_check=st.booleans(),
    idle_hours=st.floats(min_value=0),
    max_bytes=st.none() | st.integers(1, 2**60),
    max_inodes=st.none() | st.integers(1, 2**60),
    keep_generations=st.integers(1, 99),
    gc_interval_s=st.floats(min_value=0),
    history_days=positive,
)


@given(some_settings)
def test_settings_come_back_from_the_environment_they_make(made: Settings) -> None:
    assert Settings.from_environment(made.to_environment()) == made


def test_every_setting_has_its_variable() -> None:
    names = {f"RAY_ENVS_{name.upper()}" for name in Settings.model_fields}
    assert set(Settings().to_environment()) == names


def test_what_is_given_wins_over_the_environment_and_none_is_not_given() -> None:
    environ = {"RAY_ENVS_UV_RETRIES": "5", "OTHER": "x"}
    assert Settings.from_environment(environ, uv_retries=7).uv_retries == 7
    assert Settings.from_environment(environ, uv_retries=None).uv_retries == 5


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RAY_ENVS_UV_RETRYS", "1", "RAY_ENVS_UV_RETRYS"),
        ("RAY_ENVS_UV_RETRIES", "many", "uv_retries"),
        ("RAY_ENVS_UV_RETRIES", "-1", "uv_retries"),
        ("RAY_ENVS_ROOT", "relative", "absolute"),
        ("RAY_ENVS_ROOT", "/a b", "' '"),
        ("RAY_ENVS_ROOT", "/a;b$", "'$;'"),
        ("RAY_ENVS_ALLOWED_INDEXES", "https://h,h.example", "number 2 is not the plain URL"),
        ("RAY_ENVS_ALLOWED_INDEXES", "https://me:pw@h/s", "without credentials"),
        ("RAY_ENVS_ALLOWED_INDEXES", "file:///srv", "number 1"),
        ("RAY_ENVS_ALLOWED_SOURCES", "git,hg", "'git' or 'url'"),
        ("RAY_ENVS_ALLOWED_SOURCES", "path", "path is not a kind of source: write local"),
        ("RAY_ENVS_ALLOWED_SOURCES", "url, editable", "editable is not a kind of source"),
        ("RAY_ENVS_ONLY_BINARY", "perhaps", "only_binary"),
        ("RAY_ENVS_EXCLUDE_NEWER", "3 days", "write it like 2026-01-31"),
        ("RAY_ENVS_EXCLUDE_NEWER", "2026-02-30", "'2026-02-30' is not a date"),
        ("RAY_ENVS_EXCLUDE_NEWER", "2026-01-01T00:00:00", "is not a date"),
        ("RAY_ENVS_EXCLUDE_NEWER", "9999-12-31", "is not a date"),
        ("RAY_ENVS_KEEP_GENERATIONS", "0", "keep_generations"),
        ("RAY_ENVS_MAX_BYTES", "0", "max_bytes"),
        ("RAY_ENVS_IDLE_HOURS", "nan", "idle_hours"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Settings.from_environment({name: value})
    assert said in caught.value.message
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("allowed_indexes", " https://h/s , http://[::1]:80 ", ("https://h/s", "http://[::1]:80")),
        ("allowed_indexes", "", ()),
        ("allowed_sources", "url,git,", ("url", "git")),
        ("only_binary", "1", True),
        ("malware_check", "false", False),
        ("max_bytes", "", None),
        ("max_bytes", "10", 10),
        ("exclude_newer", "", None),
        ("idle_hours", "inf", math.inf),
    ],
)
def test_a_setting_is_read_as_people_write_it(name: str, text: str, value: object) -> None:
    made = Settings.from_environment({f"RAY_ENVS_{name.upper()}": text})
    assert getattr(made, name) == value


@given(
    st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)), st.integers(-9, 9)
)
def test_a_cut_off_is_the_moment_that_it_names(value: datetime, hours: int) -> None:
    value = value.replace(tzinfo=timezone(timedelta(hours=hours)))
    assert cut_off(value.isoformat()) == value
    assert cut_off(value.isoformat(timespec="seconds")) == value.replace(microsecond=0)


def test_a_cut_off_that_is_a_date_is_its_end() -> None:
    assert cut_off("2026-01-31") == cut_off("2026-02-01T00:00:00Z")
    assert cut_off("2026-01-31t10:00:00.123456789z") == cut_off("2026-01-31T11:00:00.123456+01:00")


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(InvalidInput) as caught:
        Settings.from_environment({"RAY_ENVS_UV_RETRYS": "1"})
    assert caught.value.hint == "did you mean 'RAY_ENVS_UV_RETRIES'?"
