"""Values and errors of items as plain data."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.worker import outcome

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(JSON)
def test_a_json_value_stays_what_it_is(value: Any) -> None:
    assert outcome.as_json(value) == value


@pytest.mark.parametrize(
    ("value", "plain"), [((1, (2,)), [1, [2]]), ({1: 2}, {"1": 2}), ({None: True}, {"null": True})]
)
def test_a_value_becomes_what_a_file_will_hold(value: Any, plain: Any) -> None:
    assert outcome.as_json(value) == plain


class _NumpyScalar:
    """Stands for numpy.float64: a test of ours does not install numpy."""

    ndim = 0

    def item(self) -> float:
        return 0.5


_NumpyScalar.__module__ = "numpy"


def test_a_numpy_number_is_a_number() -> None:
    assert outcome.as_json({"accuracy": [_NumpyScalar()]}) == {"accuracy": [0.5]}


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"x", object(), float("nan"), [float("inf")], {(1, 2): 3}, 1j, lambda: None],
    ids=["set", "bytes", "object", "nan", "inf", "tuple key", "complex", "function"],
)
def test_a_value_that_is_not_json_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="not JSON"):
        outcome.as_json(value)


def test_a_circle_and_a_very_deep_value_are_not_json() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="not JSON"):
        outcome.as_json(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TypeError, match="not JSON"):
        outcome.as_json(deep)


def test_the_message_of_a_huge_value_is_short() -> None:
    with pytest.raises(TypeError) as caught:
        outcome.as_json({str(n) for n in range(100_000)})
    assert len(str(caught.value)) < 300


# -- errors ----------------------------------------------------------------------------------------


def described(function: Any) -> dict[str, str]:
    try:
        function()
    except BaseException as exc:
        result: dict[str, str] = outcome.described(exc)
        return result
    raise AssertionError("it did not raise")


def test_an_error_is_its_type_message_and_the_frames_of_the_payload() -> None:
    def fail() -> None:
        raise ValueError("because")

    told = described(fail)
    assert (told["type"], told["message"]) == ("ValueError", "because")
    assert "in fail" in told["traceback"]
    assert told["traceback"].endswith("ValueError: because\n")


def test_the_type_of_an_error_has_its_module() -> None:
    def fail() -> None:
        json.loads("{")

    assert described(fail)["type"] == "json.decoder.JSONDecodeError"


def test_an_error_without_words_can_be_described() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def fail() -> None:
        raise Mute

    assert described(fail)["type"].endswith("Mute")


def test_a_huge_error_is_cut_and_keeps_its_end() -> None:
    def fail() -> None:
        raise ValueError("x" * 1_000_000 + "the end")

    told = described(fail)
    assert told["traceback"].endswith("the end\n")
    assert len(told["traceback"]) <= 20_000
    assert len(told["message"]) <= 20_000


def test_a_cause_is_told_too() -> None:
    def fail() -> None:
        raise ValueError("second") from KeyError("first")

    told = described(fail)
    assert "KeyError: 'first'" in told["traceback"]
    assert "direct cause" in told["traceback"]
