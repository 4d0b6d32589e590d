"""The call of an item: checked before the payload runs."""

from __future__ import annotations

from typing import Any

import pytest

from ray_envs.worker.item import _check_call


def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"args": args, "kwargs": kwargs}


def test_a_call_that_fits_is_accepted() -> None:
    _check_call(lambda a, b=1, *c, **d: None, call(1, 2, 3, e=4))
    _check_call(print, call("anything", end=""))
    _check_call(dict, call(a=1))


@pytest.mark.parametrize("request_", [call(), call(1, 2), call(1, b=2), call(a=1, c=2)])
def test_a_call_that_does_not_fit_names_the_function_and_its_signature(request_: Any) -> None:
    def evaluate(a: int) -> None: ...

    with pytest.raises(TypeError, match=r"evaluate\(a"):
        _check_call(evaluate, request_)


def test_a_type_error_of_the_payload_itself_is_not_taken_for_a_wrong_call() -> None:
    def evaluate(a: int) -> None:
        raise TypeError("mine")

    _check_call(evaluate, call(1))
