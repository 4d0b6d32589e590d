"""Clusters that end under a batch, whose manager is killed, or that want a token."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest

from ray_envs import RayEnvironmentProvider, Settings
from ray_envs.cluster.ray_versions import has_tokens, makes_tokens
from tests.cluster.cli_tools import BIN, Shell, ended, free_port, lines_of, wait_until, write_batch

#: The manager may restart for so long, and so may the head before Ray ends a driver.
ENDED_S = 60.0
CASES = ["first", "second", "third", "fourth", "fifth"]
HELD = CASES[1:]


@pytest.fixture
def lost(
    cluster: RayEnvironmentProvider,  # its root has the wheels then
    other_root: Callable[[str], Settings],
) -> Iterator[Shell]:
    """A shell, and whatever it has started is ended after the test."""
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    auth = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    (folder / "home").mkdir()  # no token of this machine's user is found
    auth["HOME"] = str(folder / "home")
    shell = Shell(other_root("lost").root, folder, folder, variables=auth)
    yield shell
    for running in shell.processes():
        with suppress(psutil.NoSuchProcess):
            running.kill()
    shell.check_idle()
    shutil.rmtree(folder, ignore_errors=True)


def started(shell: Shell, port: int) -> subprocess.Popen[str]:
    log = shell.cwd / f"{port}.log"
    process = shell.command(
        [
            BIN / "python", "-u", BIN / "ray", "start", "--block", "--head", "--port", port,
            "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats",
            "--temp-dir", shell.cwd / "ray", "--object-store-memory", "100000000",
            "--min-worker-port", "0", "--max-worker-port", "0",
        ],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until(lambda: "Ray runtime started" in log.read_text(), "the start of Ray", within_s=90)
    return process


@pytest.mark.timeout(240)
def test_a_manager_that_is_killed_while_it_starts_is_started_again(lost: Shell) -> None:
    port = free_port()
    started(lost, port)
    up = lost.start("up", "--address", f"127.0.0.1:{port}", "--json")

    def managers() -> list[psutil.Process]:
        found = []
        for process in lost.processes():
            with suppress(psutil.Error):
                if "EnvManager" in " ".join(process.cmdline()) and process.pid != up.pid:
                    found.append(process)
        return [process for process in found if process.name().startswith("ray::")]

    for _ in range(2):
        wait_until(lambda: managers() or up.poll() is not None, "a manager", within_s=60)
        for process in managers():
            process.kill()
    told = ended(up, within_s=120)
    assert told.code == 0, told.err
    assert told.data()["nodes"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_batch_whose_cluster_is_killed_ends_with_a_reason_and_is_resumed_on_the_next(
    lost: Shell, tmp_path: Path, name: str
) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    for word in HELD:
        (calls / f"hold-{word}").touch()
    variants = [{"id": "old", "packages": ["six==1.16.0"]}]
    batch = write_batch(tmp_path / "batch", variants, CASES, calls=calls, name="lost")
    port = free_port()
    head = started(lost, port)
    running = lost.start("run", batch, "--address", f"127.0.0.1:{port}")
    results = lost.cwd / "lost.results.jsonl"
    wait_until(lambda: results.exists() and results.read_bytes(), "the first item", within_s=90)

    (doomed,) = (p for p in psutil.Process(head.pid).children() if p.name().startswith(name))
    doomed.kill()
    told = ended(running, within_s=ENDED_S)
    assert told.code == 18, told.err
    assert "has ended while the batch ran" in told.err
    assert "--resume" in told.err
    assert "Traceback" not in told.err
    assert [line["case_id"] for line in lines_of(results)] == ["first"]

    for word in HELD:
        (calls / f"hold-{word}").unlink()
    again = lost("run", batch, "--resume", "--address", "local", within_s=120)
    assert again.code == 0, again.err
    assert sorted(line["case_id"] for line in lines_of(results)) == sorted(CASES)
    assert all(line["ok"] for line in lines_of(results))


@pytest.mark.timeout(240)
@pytest.mark.skipif(not has_tokens(), reason="this Ray has no tokens")
def test_a_token_is_used_where_it_is_wanted_and_its_lack_is_told_at_once(lost: Shell) -> None:
    port = free_port()
    started(lost, port)
    up = ["up", "--address", f"127.0.0.1:{port}", "--json"]
    right = lost.environ()["RAY_AUTH_TOKEN"]
    without = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}
    for more, why in (
        ({}, "and this user has none"),
        ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, "and this user has another one"),
        ({"RAY_AUTH_MODE": "token"}, "and this user has none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "and this user has another one"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": right}, "RAY_AUTH_MODE is disabled"),
    ):
        told = ended(lost.command(unset(without | more, *up)), within_s=60)
        told.check_refusal(14, "wants a token", why, "export RAY_AUTH_MODE=token")
        assert told.seconds < 10, told  # 3 s on an idle machine
    told = ended(lost.command(unset(without | {"RAY_AUTH_TOKEN": right}, *up)), within_s=120)
    assert told.code == 0, told.err  # RAY_AUTH_MODE is not set


#: A process that has read its token would refuse what workers without one report.
HAS_A_TOKEN = """
import ray
from ray_envs.cluster.ray_versions import token_header

assert token_header()
ray.init("local", num_cpus=1, include_dashboard=False)

@ray.remote(num_returns="streaming")
def told():
    yield "told"

(ready,), _ = ray.wait([told.remote()], timeout=30, fetch_local=False)
print(ray.get(next(ready)))
ray.shutdown()
"""


@pytest.mark.skipif(not has_tokens(), reason="this Ray has no tokens")
def test_who_has_a_token_gets_results_of_a_cluster_without_tokens(lost: Shell) -> None:
    """The workers have no token: a cluster does not give them the driver's variables."""
    driver = lost.command(
        ["env", "RAY_AUTH_MODE=disabled", BIN / "python", "-c", HAS_A_TOKEN.lstrip()]
    )
    told = ended(driver, within_s=90)
    assert (told.code, told.out.strip()) == (0, "told"), told.err


@pytest.mark.timeout(240)
def test_a_home_that_cannot_be_written_is_no_matter_or_is_named(
    lost: Shell, tmp_path: Path
) -> None:
    batch = write_batch(
        tmp_path / "batch", [{"id": "old", "packages": ["six==1.16.0"]}], ["a"], name="homeless"
    )
    words = ["run", str(batch), "--address", "local"]
    none = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}
    told = ended(lost.command(unset(none | {"HOME": "/dev/null"}, *words)), within_s=120)
    assert told.code == 0, told.err
    told = ended(lost.command(unset(none | {"HOME": "/proc"}, *words)), within_s=120)
    if makes_tokens():
        told.check_refusal(14, "Ray cannot start on this machine", "/proc", "set HOME")
    else:  # an older Ray writes nothing there
        assert told.code == 0, told.err


def unset(variables: dict[str, str], *words: str) -> list[str]:
    """`ray-envs WORDS…` with some variables, and without those whose value is empty."""
    given = [f"{name}={value}" for name, value in variables.items() if value]
    gone = [word for name, value in variables.items() if not value for word in ("-u", name)]
    return ["env", *gone, *given, str(BIN / "ray-envs"), *words]
