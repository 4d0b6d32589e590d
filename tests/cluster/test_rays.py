"""The oldest Ray that is supported and the newest one: the shipped batch, and a few tests, on each.

Each Ray gets a virtual environment of its own, from the package index, with this checkout in it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import uv

from ray_envs.cluster.ray_versions import TESTED
from tests.cluster.cli_tools import Shell, ended
from tests.cluster.conftest import left_after

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1200)]

CHECKOUT = Path(__file__).parents[2]
BATCH = CHECKOUT / "envs" / "sklearn-upgrade" / "batch.toml"
#: What the tests need besides ray_envs and Ray.
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "psutil")
#: The plugin's gate, a job, and placement.
TESTS = (
    "plugin/test_plugin.py::test_a_task_waits_for_its_environment_and_hinders_no_other",
    "cli/test_jobs.py::test_a_submitted_batch_runs_in_its_environments_and_the_manager_outlives_it",
    "client/test_doors_of_ray.py::test_a_placement_group_on_ready_nodes_goes_with_a_variant",
)
#: How long each step may take, in seconds, on a busy machine.
INSTALL_S, BATCH_S, TESTS_S = 300, 240, 420


@pytest.fixture(params=[f"=={TESTED[0]}", f">={TESTED[-1]},<3"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    """A shell whose `ray-envs` uses that Ray; nothing that it starts outlives it."""
    place = tmp_path / "venv"
    folder = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))  # short: sockets have 107 bytes
    made = Shell(tmp_path / "root", folder, tmp_path, bin_folder=place / "bin")
    ray = f"ray[default,client,data,serve]{request.param}"
    try:
        for words in (
            ["venv", "--quiet", "--python", sys.executable, place],
            ["pip", "install", "--quiet", "--python", place / "bin" / "python",
             "--editable", CHECKOUT, ray, *TOOLS],
        ):  # fmt: skip
            done = ended(made.command([uv.find_uv_bin(), *words]), within_s=INSTALL_S)
            assert done.code == 0, done.err
        yield made
    finally:
        for process in made.processes():
            process.kill()
        left_after(made.processes(), 30)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_shipped_batch_and_a_few_tests_run_on_the_oldest_and_the_newest_ray(
    shell: Shell, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    batch = shell("run", BATCH, "--results", results, within_s=BATCH_S)
    assert batch.code == 0, batch.out + batch.err
    items = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(items) == 9
    assert all(item["ok"] for item in items)
    python = tmp_path / "venv" / "bin" / "python"
    version = ended(
        shell.command([python, "-c", "import ray; print(ray.__version__)"]), within_s=60
    ).out.strip()
    assert {item["ray"] for item in items} == {version}

    doctor = shell("doctor", "--json", within_s=120)
    (node,) = doctor.data()["nodes"].values()
    (found,) = (probe for probe in node["probes"] if probe["name"] == "ray")
    tried = " (tried)" if version in TESTED else " (not one of the tried versions: "
    assert found["value"].startswith(version + tried)

    tests = ended(
        shell.command(
            [python, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider",
             *(CHECKOUT / "tests" / "cluster" / each for each in TESTS)],
            cwd=CHECKOUT,
        ),
        within_s=TESTS_S,
    )  # fmt: skip
    assert tests.code == 0, tests.out + tests.err
    assert f"{len(TESTS)} passed" in tests.out
