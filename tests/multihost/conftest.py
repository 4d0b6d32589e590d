"""Hosts for the tests, where this machine can make them; and a look for what they leave behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.multihost.hosts import Hosts, left, why_not


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips, with what is missing, where no hosts can be made."""
    if reason := why_not():
        pytest.skip(f"no hosts on this machine: {reason}")


@pytest.fixture(scope="module")
def new_hosts(namespaces: None) -> Iterator[Callable[..., Hosts]]:
    """Makes `Hosts` that end with the module, at the latest; see there for the arguments."""
    made: list[Hosts] = []

    def make(*args: Any, **options: Any) -> Hosts:
        made.append(stack.enter_context(Hosts(*args, **options)))
        return made[-1]

    with ExitStack() as stack:
        yield make
    assert [left(hosts.tag) for hosts in made if left(hosts.tag)] == []


@pytest.fixture(scope="package")
def four(namespaces: None) -> Iterator[Hosts]:
    """A head and three workers with the plugin; only the head has a route to the index.

    The files share them, in their order: who only looks, then who makes faults.
    """
    with Hosts(4) as made:
        made.start_ray(plugin=True)
        yield made
    assert left(made.tag) == []


@pytest.fixture(scope="module")
def hosts(namespaces: None) -> Iterator[Hosts]:
    """A head and three workers with Ray on them, for tests that leave them as they are.

    A test that kills, cuts or fills makes its own with `new_hosts`.
    """
    with Hosts(4) as made:
        made.start_ray()
        yield made
