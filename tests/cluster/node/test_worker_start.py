"""An environment in which Ray's worker cannot start ends in an error, at every door."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_envs import EnvSpec, RayBatchRunner, RayEnvironmentProvider
from ray_envs.errors import WorkerCannotStart

PYPROJECT = """
[project]
name = "p"
version = "0"
requires-python = ">=3.10"
dependencies = ["requests"]
[tool.uv]
exclude-dependencies = ["idna"]
"""


@pytest.mark.timeout(120)
def test_an_environment_that_lacks_what_ray_needs_is_an_error_everywhere(
    cluster: RayEnvironmentProvider, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    cluster.create("no-idna", EnvSpec(project=str(tmp_path)))
    try:
        for door in (cluster.prepare, cluster.options):
            with pytest.raises(WorkerCannotStart) as caught:
                door("no-idna")
            assert "No module named 'idna'" in caught.value.detail
            assert "Ray needs idna" in caught.value.hint
            assert "importlib" not in caught.value.detail
        (result,) = RayBatchRunner(cluster).run(os.getpid, variants=["no-idna"], cases=[[]])
        assert result.error is not None
        assert (result.error.type, result.attempts) == ("WorkerCannotStart", 0)
        assert "Ray needs idna" in result.error.message
    finally:
        cluster.delete("no-idna", force=True)


@pytest.mark.timeout(180)
def test_a_worker_that_cannot_start_any_more_is_found_out_and_its_items_end(
    cluster: RayEnvironmentProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment was good when it was built; what its workers import was broken later."""
    monkeypatch.setattr(type(cluster), "worker_start_timeout_s", lambda _: 3.0)
    cluster.create("spoilt-later", EnvSpec(packages=("six==1.10.0",)))
    try:
        venv = Path(cluster.prepare("spoilt-later")["spoilt-later"]["venv_path"])
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "sitecustomize.py").write_text("raise SystemExit('broken on purpose')\n")
        (result,) = RayBatchRunner(cluster).run(os.getpid, variants=["spoilt-later"], cases=[[]])
        assert result.error is not None
        assert result.error.type == "WorkerCannotStart"
        assert "broken on purpose" in result.error.message
    finally:
        cluster.delete("spoilt-later", force=True)
