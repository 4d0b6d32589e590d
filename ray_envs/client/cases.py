"""The cases of a batch: checked, numbered, and read as far as the fastest variant has come.

A case is made when a variant comes to it, and forgotten when all have passed it: a generator may
give a million. One that is given in a list is checked before anything starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ray_envs.batch_models import CaseSpec
from ray_envs.errors import InvalidInput

#: Positional arguments, keyword arguments, or both with an id.
Given = Sequence[Any] | Mapping[str, Any] | CaseSpec
#: So many more items are taken to wait when nobody knows where a generator ends.
_MANY = 1000


class Cases:
    """The cases for `readers`, the ids of the variants, each of which gets all in their order.

    Raises `InvalidInput`: one is no case, two have one id, or there is none. Of a generator only
    the first is read here.
    """

    def __init__(self, given: Iterable[Given], readers: Sequence[str]) -> None:
        #: How many there are, or, as long as a generator goes on, have been read.
        self.count = 0
        self.is_counted = isinstance(given, Sequence)
        if isinstance(given, Sequence):
            given = tuple(given)
            self.count = sum(1 for _ in _checked(given))
        self._source = _checked(given)
        self._kept: deque[CaseSpec] = deque()
        #: The number of the first one that is kept; of the next one of each reader; of those read.
        self._first, self._at, self._read = 0, dict.fromkeys(readers, 0), 0
        first = next(self._source, None)
        if first is None or not readers:
            raise InvalidInput("there is nothing to run", hint="give at least one variant and case")
        self._source = chain([first], self._source)

    def next(self, reader: str) -> tuple[int, CaseSpec] | None:
        """Return the next case of a reader, with its number; None after the last.

        Raises `InvalidInput`: a generator gave something else.
        """
        number = self._at[reader]
        if number == self._read and not self._read_one():
            return None
        case = self._kept[number - self._first]
        self._at[reader] = number + 1
        if number == self._first and min(self._at.values()) > number:
            self._kept.popleft()
            self._first += 1
        return number, case

    def _read_one(self) -> bool:
        case = next(self._source, None)
        if case is None:
            self.is_counted = True
            return False
        self._kept.append(case)
        self._read += 1
        self.count = max(self.count, self._read)
        return True

    def left(self, reader: str) -> int:
        """Return how many cases a reader has before it; a guess as long as nobody knows."""
        return self.count - self._at[reader] + (0 if self.is_counted else _MANY)

    def is_behind(self, reader: str) -> bool:
        """Whether another reader is ahead of this one."""
        return self._at[reader] < self._read


def _checked(given: Iterable[Given]) -> Iterator[CaseSpec]:
    #: The ids that were given, and the numbers of their cases. The others are made from numbers.
    ids: set[str] = set()
    numbers: set[int] = set()
    for number, each in enumerate(given):
        case = _case(each, number)
        if isinstance(each, CaseSpec):
            made = _number_in(case.id)
            is_twice = case.id in ids or (made < number and made not in numbers)
            ids.add(case.id)
            numbers.add(number)
        else:
            is_twice = case.id in ids
        if is_twice:
            raise InvalidInput(f"two cases have the id {case.id!r}", hint="give each its own")
        yield case


def _number_in(case_id: str) -> float:
    """Return the number of the case that would get this id; infinity if none would."""
    digits = case_id.removeprefix("case-")
    is_made = digits.isdecimal() and f"case-{int(digits)}" == case_id
    return int(digits) if is_made else float("inf")


def _case(case: Given, number: int) -> CaseSpec:
    if isinstance(case, CaseSpec):
        return case
    if isinstance(case, Mapping):
        return CaseSpec(id=f"case-{number}", kwargs=dict(case))
    if isinstance(case, str):
        raise InvalidInput(f"case {number} is the string {case!r}", hint="give a list of arguments")
    if not isinstance(case, Iterable):
        raise InvalidInput(f"case {number} is {case!r}", hint="give a list of arguments")
    return CaseSpec(id=f"case-{number}", args=tuple(case))
