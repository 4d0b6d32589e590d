"""The cases and items of a batch are made as they are needed, each once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from ray_envs.batch_models import CaseSpec, ItemResult, RunDefaults
from ray_envs.client.cases import Cases, Given
from ray_envs.client.items import Item
from ray_envs.client.waiting import Waiting
from ray_envs.errors import InvalidInput


def all_of(cases: Cases, reader: str) -> list[str]:
    return [case.id for _, case in iter(lambda: cases.next(reader), None)]


def test_each_reader_gets_every_case_in_its_order() -> None:
    cases = Cases([[1], {"x": 2}, CaseSpec(id="mine", args=(3,))], ["a", "b"])
    assert (cases.count, cases.left("a")) == (3, 3)
    assert all_of(cases, "a") == all_of(cases, "b") == ["case-0", "case-1", "mine"]
    assert (cases.left("a"), cases.next("a")) == (0, None)


def test_a_generator_is_read_as_far_as_the_fastest_and_forgotten_behind_the_slowest() -> None:
    read: list[int] = []

    def endless() -> Iterator[list[int]]:
        for number in itertools.count():
            read.append(number)
            yield [number]

    cases = Cases(endless(), ["fast", "slow"])
    for number in range(1000):
        found = cases.next("fast")
        assert found is not None
        assert (found[0], found[1].args) == (number, (number,))
    assert len(read) == 1000
    assert cases.left("slow") > 1000
    for _ in range(990):
        cases.next("slow")
    assert len(cases._kept) == 10
    assert cases.count == 1000


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "nothing to run"),
        (iter([]), "nothing to run"),
        (["ab"], "case 0 is the string 'ab'"),
        ([[1], 5], "case 1 is 5"),
        ([CaseSpec(id="x"), CaseSpec(id="x")], "two cases have the id 'x'"),
        ([CaseSpec(id="case-1"), [1]], "two cases have the id 'case-1'"),
        ([[1], CaseSpec(id="case-0")], "two cases have the id 'case-0'"),
    ],
)
def test_wrong_cases_are_refused_before_anything_starts(given: Iterable[Given], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        Cases(given, ["a"])


def test_ids_that_only_look_made_are_no_matter() -> None:
    ids = ["case-01", "case-9", "case-x"]
    assert all_of(Cases([[0], *(CaseSpec(id=i) for i in ids)], ["a"]), "a") == ["case-0", *ids]


def test_a_wrong_case_of_a_generator_is_refused_when_it_comes() -> None:
    cases = Cases(iter([[1], "ab"]), ["a"])
    cases.next("a")
    with pytest.raises(InvalidInput, match="case 1 is the string"):
        cases.next("a")


# -- items


def waiting(
    given: Iterable[Given], keys: dict[str, str | None], known: tuple[str, ...] = ()
) -> Waiting:
    def make(name: str, number: int, case: CaseSpec) -> Item | ItemResult:
        if keys[name] is None or case.id in known:
            return ItemResult(variant_id=name, case_id=case.id, ok=keys[name] is not None)
        item = Item(name, case, RunDefaults(), None, number=number)
        item.environment = {"key": keys[name]}
        return item

    return Waiting(Cases(given, list(keys)), make, keys)


def drained(queue: Waiting, count: int = 1) -> list[tuple[str, str]]:
    found = []
    while queue:
        for first in queue.firsts():
            found += [(item.variant_id, item.case.id) for item in queue.take(first, count)]
    return found


@pytest.mark.parametrize("count", [1, 3, 100])
def test_every_item_is_there_once(count: int) -> None:
    queue = waiting([[n] for n in range(10)], {"a": "k", "b": "l"})
    assert queue.left() == {"k": 10, "l": 10}
    found = drained(queue, count)
    assert sorted(found) == sorted((v, f"case-{n}") for v, n in itertools.product("ab", range(10)))
    assert (queue.total, queue.left()) == (20, {"k": 0, "l": 0})


def test_what_needs_no_run_is_a_result_and_hinders_nothing() -> None:
    known = ("case-0", "case-2")
    queue = waiting([[n] for n in range(4)], {"a": "k", "gone": None}, known)
    assert drained(queue) == [("a", "case-1"), ("a", "case-3")]
    assert sorted((r.variant_id, r.case_id) for r in queue.results) == [
        ("a", "case-0"), ("a", "case-2"), *(("gone", f"case-{n}") for n in range(4)),
    ]  # fmt: skip


def test_a_variant_that_cannot_run_does_not_read_a_generator_ahead() -> None:
    queue = waiting(([n] for n in itertools.count()), {"a": "k", "gone": None})
    for _ in range(20):
        (first,) = queue.firsts()
        queue.take(first, 5)
    assert 90 <= len(queue.results) <= 101


def test_items_that_are_put_back_come_first_and_alone_if_they_are_suspect() -> None:
    queue = waiting([[n] for n in range(6)], {"a": "k"})
    (first,) = queue.firsts()
    lane = queue.take(first, 4)
    for item in lane[1:]:
        item.is_suspect = True
    queue.put_back(lane[1:])
    taken: list[list[Any]] = []
    while queue:
        taken += [[i.case.id for i in queue.take(f, 4)] for f in queue.firsts()]
    assert taken == [["case-1"], ["case-2"], ["case-3"], ["case-4", "case-5"]]
