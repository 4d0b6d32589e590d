"""What the README says works: its Python block runs, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_envs.cli import cli

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.timeout(600)
def test_the_example_runs_as_it_stands(root: Path, tmp_path: Path) -> None:
    (block,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(block)
    environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**environ, "RAY_ENVS_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"^(?:old |new )?(0\.9\d+)$", done.stdout, re.MULTILINE)
    assert len(numbers) == 5, done.stdout


def test_the_first_two_commands_are_the_main_job_and_the_tests() -> None:
    run, test = (block.strip() for block in blocks("sh")[:2])
    start = "python3 -m pip install -q uv && python3 -m uv run "
    assert run == start + "ray-envs run envs/sklearn-upgrade/batch.toml"
    assert test == start + "pytest"
    assert (README.parent / run.split()[-1]).is_file()


@pytest.mark.parametrize("command", ["run", "create", "list", "status", "exec", "delete"])
def test_every_command_of_the_table_has_help(command: str) -> None:
    assert re.search(rf"`ray-envs {command}|`{command} VARIANT`", README.read_text())
    shown = CliRunner().invoke(cli, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output
