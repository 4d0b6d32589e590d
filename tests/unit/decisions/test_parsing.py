"""The limits of what people give us: one depth and one number of digits for every file."""

from __future__ import annotations

import json
import time

import pytest

from ray_envs.decisions.parsing import MAX_DEPTH, MAX_DIGITS, parsed_json, parsed_toml
from ray_envs.errors import InvalidInput


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = " + "[" * 200 + "]" * 200, "nested too deeply"),
        ("a = " + "[" * 90_000, "nested too deeply"),
        (".".join("a" * 200) + " = 1", "nested too deeply"),
        (".".join("a" * 100_000) + " = 1", "nested too deeply"),  # minutes in Python's parser
        ("[" + " . ".join("a" * 50_000) + "]", "nested too deeply"),
        ("[[" + ".".join(['"a b"'] * 50_000) + "]]", "nested too deeply"),
        ("a = {" + ".".join("a" * 50_000) + " = 1}", "nested too deeply"),
        ("a = " + "{b = " * 200 + "1" + "}" * 200, "nested too deeply"),
        ("a = " + "9" * (MAX_DIGITS + 10), "more than 1000 digits"),
        ("a = 0x" + "f" * 2_000, "more than 1000 digits"),
        ("a = " + "9" * 9_000, "not valid TOML"),
        ("a = [", "not valid TOML"),
    ],
    ids=lambda text: text[:12],
)
def test_a_toml_text_beyond_the_limits_is_refused_at_once(text: str, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput, match=says) as caught:
        parsed_toml(text, where="batch.toml")
    assert caught.value.where == "batch.toml"
    assert len(caught.value.message) < 500
    assert time.monotonic() - began < 5


def test_a_toml_text_within_the_limits_is_read() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    text = (
        f"a = {deep}\nb = {'9' * MAX_DIGITS}\n{'.'.join('c' * 100)} = 1\n"
        f'd = "{".".join("x" * 500)}"  # {".".join("y" * 500)}\n'
        f'e = """\n{"A sentence, of a text. " * 200}\n"""\n'
        f"f = [{', '.join(['1.5'] * 500)}]\n"
    )
    data = parsed_toml(text, where="batch.toml")
    assert len(data["d"]) == 999
    assert len(data["f"]) == 500


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ("9" * 9_000, "not valid JSON"),
        ("9" * 2_000, "more than 1000 digits"),
        ("[NaN]", "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
    ids=lambda text: str(text[:12]),
)
def test_a_json_text_beyond_the_limits_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parsed_json(text, where="options.json")


def test_a_json_text_within_the_limits_is_read() -> None:
    data = {"a": [1, 2.5, None, {"b": "9" * 5_000}], "n": 10**900}
    assert parsed_json(json.dumps(data), where="x") == data
