"""The items of a batch that wait for their start. Each is made when its variant comes to it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

from ray_envs.batch_models import CaseSpec, ItemResult
from ray_envs.client.cases import Cases
from ray_envs.client.items import Item

#: How many items that need no run are made in a row: the others must not wait for them.
_IN_A_ROW = 1000


class Waiting:
    """The items of `cases` in each variant, in their order.

    Args:
        cases: for the variants.
        make: returns the item of a variant and a numbered case; or its result, if it needs no run.
        keys: the key of each variant's environment; None where none of its items can run.
    """

    def __init__(
        self,
        cases: Cases,
        make: Callable[[str, int, CaseSpec], Item | ItemResult],
        keys: Mapping[str, str | None],
    ) -> None:
        self._cases = cases
        self._make = make
        self._keys = keys
        self._by_variant: dict[str, deque[Item]] = {name: deque() for name in keys}
        self._over: set[str] = set()
        self._runs = any(keys.values())
        #: Results of items that need no run.
        self.results: deque[ItemResult] = deque()

    def __bool__(self) -> bool:
        return len(self._over) < len(self._keys) or any(self._by_variant.values())

    @property
    def total(self) -> int:
        """How many items the batch has; of a generator, as far as it was read."""
        return self._cases.count * len(self._keys)

    def firsts(self) -> list[Item]:
        """Return the first item of each variant."""
        for name in self._keys:
            self._fill(name)
        return [items[0] for items in self._by_variant.values() if items]

    def left(self) -> Counter[str]:
        """Return how many items wait for each environment, by its key."""
        left: Counter[str] = Counter()
        for name, key in self._keys.items():
            if key is not None:
                more = 0 if name in self._over else self._cases.left(name)
                left[key] += len(self._by_variant[name]) + more
        return left

    def take(self, item: Item, count: int) -> list[Item]:
        """Remove and return a first item, with up to `count` - 1 more that may share its task."""
        items = self._by_variant[item.variant_id]
        taken = [items.popleft()]
        while item.may_share and len(taken) < count:
            self._fill(item.variant_id)
            if not items or not items[0].may_share:
                break
            taken.append(items.popleft())
        return taken

    def put_back(self, items: Iterable[Item]) -> None:
        """Put items in front of the others."""
        for item in reversed(list(items)):
            self._by_variant[item.variant_id].appendleft(item)

    def _fill(self, name: str) -> None:
        """Make the next item of a variant, if none is there."""
        items = self._by_variant[name]
        for _ in range(_IN_A_ROW):
            # One without an environment does not read a generator ahead of those that run.
            if items or name in self._over or not self._is_due(name):
                return
            following = self._cases.next(name)
            if following is None:
                self._over.add(name)
                return
            made = self._make(name, *following)
            if isinstance(made, Item):
                items.append(made)
            else:
                self.results.append(made)

    def _is_due(self, name: str) -> bool:
        return (
            self._keys[name] is not None
            or not self._runs
            or self._cases.is_counted
            or self._cases.is_behind(name)
        )
