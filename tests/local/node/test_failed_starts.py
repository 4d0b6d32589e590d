"""Which starts of workers count as failed. The logs are files as Ray names them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envs.node.failed_starts import FailedStarts
from ray_envs.worker import hold

NODE, OTHER = "aa" * 28, "bb" * 28


@pytest.fixture
def starts(tmp_path: Path) -> FailedStarts:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"worker-1-ffffffff-{os.getpid()}.out").touch()
    found = FailedStarts(tmp_path, NODE, tmp_path / "logs", patience_s=100)
    assert found.set_up()
    return found


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def told(root: Path, pid: int, start: str = "key-1", node: str = NODE, ago_s: float = 0) -> Path:
    file = root / hold.STARTS / f"{node}.{start}.{pid}"
    file.touch()
    at = file.stat().st_mtime - ago_s
    os.utime(file, (at, at))
    return file


def test_only_an_ended_process_without_a_log_has_failed(
    starts: FailedStarts, tmp_path: Path
) -> None:
    pid, registered, living = ended_pid(), ended_pid(), os.getppid()
    (tmp_path / "logs" / f"worker-2-01000000-{registered}.out").touch()
    doomed, fine, waits = (
        told(tmp_path, pid),
        told(tmp_path, registered, "key-2"),
        told(tmp_path, living, "key-3"),
    )
    assert {name: (f.key, f.pids) for name, f in starts.look().items()} == {"key-1": ("key", [pid])}
    assert (doomed.exists(), fine.exists(), waits.exists()) == (False, False, True)
    assert starts.look() == {}


def test_a_process_that_lives_on_without_registering_has_failed_after_a_while(
    starts: FailedStarts, tmp_path: Path
) -> None:
    told(tmp_path, os.getppid(), ago_s=101)
    assert list(starts.look()) == ["key-1"]


def test_a_worker_that_registers_ends_the_row_and_an_older_log_of_its_pid_does_not(
    starts: FailedStarts, tmp_path: Path
) -> None:
    pid = ended_pid()
    log = tmp_path / "logs" / f"worker-2-01000000-{pid}.out"
    log.touch()
    os.utime(log, (1, 1))
    for count in (1, 2):
        told(tmp_path, pid)
        assert len(starts.look()["key-1"].pids) == count
    log.touch()
    told(tmp_path, pid)
    assert starts.look() == {}
    log.unlink()
    told(tmp_path, pid)
    assert len(starts.look()["key-1"].pids) == 1


def test_other_nodes_on_this_root_keep_their_files_until_they_are_gone(
    starts: FailedStarts, tmp_path: Path
) -> None:
    young = told(tmp_path, ended_pid(), node=OTHER)
    old = told(tmp_path, ended_pid(), node=OTHER, ago_s=4000)
    strange = tmp_path / hold.STARTS / "notes.txt"
    strange.touch()
    assert starts.look() == {}
    assert (young.exists(), old.exists(), strange.exists()) == (True, False, True)


def test_the_log_of_a_worker_that_crashed_is_quoted(starts: FailedStarts, tmp_path: Path) -> None:
    (tmp_path / "logs" / "python-core-worker-3_77.log").write_text("begun\nCheck failed: x\n")
    assert starts.said([77, 78]) == "python-core-worker-3_77.log:\nbegun\nCheck failed: x"
    assert starts.said([79]) == ""


def test_nothing_is_watched_where_workers_have_no_logs_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert not FailedStarts(tmp_path, NODE, tmp_path / "logs", patience_s=1).set_up()
    assert not (tmp_path / hold.STARTS).exists()


@pytest.mark.parametrize("is_worker", [True, False])
def test_only_rays_own_command_tells_its_start(tmp_path: Path, is_worker: bool) -> None:
    (tmp_path / hold.STARTS).mkdir()
    script = tmp_path / ("default_worker.py" if is_worker else "mine.py")
    code = "import sys; sys.path[0] = sys.argv[1]; import hold; hold._tell_start(sys.argv[2])"
    script.write_text(code)
    folder, store = str(Path(hold.__file__).parent), str(tmp_path / "store")
    command = [sys.executable, str(script), folder, store, f"--node-id={NODE}"]
    process = subprocess.Popen(command, env={**os.environ, hold.START_VARIABLE: "key-1"})
    assert process.wait() == 0
    expected = [f"{NODE}.key-1.{process.pid}"] if is_worker else []
    assert os.listdir(tmp_path / hold.STARTS) == expected
