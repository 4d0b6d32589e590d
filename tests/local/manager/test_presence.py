"""The sign of a manager: there as long as its process lives, and only one for each root."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envs.errors import StorageFailed
from ray_envs.manager import presence

#: Announces a manager, says so, and lives until it is killed.
MANAGER = """\
import sys
from pathlib import Path
from ray_envs.manager import presence
fd = presence.announce(Path(sys.argv[1]), "10.0.0.1:6379")
print(fd is not None, flush=True)
sys.stdin.read()
"""


def test_a_manager_is_found_exactly_as_long_as_its_process_lives(tmp_path: Path) -> None:
    assert presence.address_of(tmp_path) is None
    with subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "True\n"
        for _ in range(3):  # asking must not take the lock away
            assert presence.address_of(tmp_path) == "10.0.0.1:6379"
        assert presence.announce(tmp_path, "10.0.0.2:6379") is None
        assert presence.address_of(tmp_path) == "10.0.0.1:6379"
        manager.kill()
    assert presence.address_of(tmp_path) is None
    fd = presence.announce(tmp_path, "10.0.0.3:6379")
    assert fd is not None
    assert presence.address_of(tmp_path) == "10.0.0.3:6379"
    os.close(fd)
    assert presence.address_of(tmp_path) is None


def test_a_manager_without_a_cluster_has_no_address(tmp_path: Path) -> None:
    fd = presence.announce(tmp_path, "")
    assert fd is not None
    assert presence.address_of(tmp_path) is None
    os.close(fd)


def test_an_announcement_that_cannot_be_written_leaves_no_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(presence, "write_atomically", fails)
        with pytest.raises(StorageFailed):
            presence.announce(tmp_path, "10.0.0.1:6379")
    fd = presence.announce(tmp_path, "10.0.0.2:6379")
    assert fd is not None
    os.close(fd)


def test_a_session_counts_while_its_manager_lives_and_a_while_longer(tmp_path: Path) -> None:
    fd = presence.join(tmp_path, "session_1")
    again = presence.join(tmp_path, "session_2")
    os.close(again)
    assert presence.sessions(tmp_path) == {"session_1", "session_2"}  # that one may be restarted
    for name in ("session_1", "session_2"):
        os.utime(tmp_path / "sessions" / name, (0, 0))
    assert presence.sessions(tmp_path) == {"session_1"}
    assert os.listdir(tmp_path / "sessions") == ["session_1"]
    os.close(fd)
    assert presence.sessions(tmp_path) == set()
    assert presence.sessions(tmp_path / "nowhere") == set()
