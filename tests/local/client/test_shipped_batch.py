"""The batch that a stranger runs first says what its files hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ray_envs.batch_models import BatchSpec
from ray_envs.client.code_folder import pack_code
from ray_envs.client.entrypoints import check_entrypoint
from ray_envs.client.inputs import read_batch, read_definition
from ray_envs.specs import Definition

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

FILE = Path(__file__).parents[3] / "envs" / "sklearn-upgrade" / "batch.toml"


def definitions(batch: BatchSpec) -> dict[str, Definition]:
    return {variant.id: read_definition(variant, FILE.parent) for variant in batch.variants}


def test_the_shipped_batch_is_three_variants_by_three_cases() -> None:
    batch = read_batch(FILE)
    check_entrypoint(batch, FILE.parent)
    assert (batch.name, batch.entrypoint, batch.code, batch.metric) == (
        "sklearn-upgrade",
        "accuracy:evaluate",
        ".",
        "accuracy",
    )
    assert [variant.id for variant in batch.variants] == ["sklearn-1.5", "pinned", "sklearn-new"]
    assert {case.id: case.kwargs for case in batch.cases} == {
        "digits": {"dataset": "digits"},
        "wine": {"dataset": "wine"},
        "breast-cancer": {"dataset": "breast_cancer"},
    }


def test_the_shipped_variants_conflict_in_scikit_learn() -> None:
    found = definitions(read_batch(FILE))
    assert found["sklearn-1.5"].packages == ("scikit-learn==1.5.*", "scipy<1.16")
    assert "scikit-learn==1.6.1" in found["pinned"].packages
    assert all("==" in pin for pin in found["pinned"].packages)
    project = tomllib.loads(found["sklearn-new"].pyproject or "")["project"]
    assert project["dependencies"] == ["scikit-learn>=1.7"]
    assert project["requires-python"] == ">=3.10"


def test_the_shipped_lock_is_of_the_public_index_and_holds_wheels_for_every_python() -> None:
    lock = tomllib.loads(definitions(read_batch(FILE))["sklearn-new"].uv_lock or "")
    packages = [package for package in lock["package"] if package["name"] != "sklearn-new"]
    assert {package["source"]["registry"] for package in packages} == {"https://pypi.org/simple"}
    learn = [package for package in packages if package["name"] == "scikit-learn"]
    wheels = json.dumps([package["wheels"] for package in learn])
    assert [tag for tag in ("cp310", "cp311", "cp312", "cp313") if f"-{tag}-" not in wheels] == []


def test_the_shipped_code_is_small() -> None:
    assert len(pack_code(FILE.parent)[1]) < 1024 * 1024
