"""What the README says works: its Python blocks run, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ray_envs.cli.main import cli

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.timeout(600)
def test_the_examples_run_as_they_stand(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks("python")))
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
    assert "{'six': ['1.16.0', '1.17.0']}" in done.stdout
    assert "back to generation 1\n3 operations" in done.stdout


def test_the_first_two_commands_are_the_main_job_and_the_tests() -> None:
    run, test = (block.strip() for block in blocks("sh")[:2])
    start = "python3 -m pip install -q uv && python3 -m uv run "
    assert run == start + "ray-envs run envs/sklearn-upgrade/batch.toml"
    assert test == start + "pytest"
    assert (README.parent / run.split()[-1]).is_file()


@pytest.mark.parametrize("command", sorted(cli.list_commands(click.Context(cli))))
def test_every_command_is_in_the_readme_and_has_help_with_an_example(command: str) -> None:
    table = "".join(line for line in README.read_text().splitlines() if line.startswith("| `"))
    assert re.search(rf"`(ray-envs )?{command}\b", table)
    shown = CliRunner().invoke(cli, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output
    assert f"Example: ray-envs {command}" in shown.output
