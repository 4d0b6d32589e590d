from __future__ import annotations

from tests.cluster.cli_tools import X


def test_x() -> None:
    assert X == 1
