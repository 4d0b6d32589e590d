"""Projects as people really write them, from their files to a value that a task returns.

The files are in `tests/shapes`. Each shape is copied, completed by the commands that its author
would have run, defined, prepared on a real Ray, and asked for what only the right environment has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import uv

from ray_envs import EnvSpec, RayEnvironmentProvider
from ray_envs.errors import RayEnvsWarning
from tests.cluster.cli_tools import Shell, lines_of

#: One shape takes two to four seconds; the first one of a back end downloads that, too.
pytestmark = pytest.mark.timeout(90)

SHAPES = Path(__file__).parents[1] / "shapes"
MADE_S = 60
ANSWERED_S = 60


@dataclass(frozen=True)
class Shape:
    """A folder in `tests/shapes`, what is asked for, and what a task must see."""

    folder: str
    spec: EnvSpec
    #: Python statements that set `seen`, in a task; `version(name)` is None if it is not there.
    look: str
    seen: Any
    #: What its author runs first, in the folder of the shape.
    make: tuple[str, ...] = ()


def project(folder: str = ".", **options: Any) -> EnvSpec:
    return EnvSpec(project=folder, **options)


def versions(*names: str) -> str:
    return f"seen = [version(name) for name in {names!r}]"


SIX = "version('six')"
GIT = "git -c user.name=a -c user.email=a@b.invalid"

PROJECTS = {
    "flit": Shape(
        "flit_dynamic_version", project(),
        f"import signalbox; seen = signalbox.__version__, version('signalbox'), {SIX}",
        ("3.1.4", "3.1.4", "1.16.0"),
    ),
    "setup.cfg": Shape(
        "setup_cfg_extras", project(extras=("tables",)),
        "import rivets, importlib.util as u; seen = rivets.__version__, u.find_spec('tests'), ["
        "version(n) for n in ('rivets', 'six', 'tabulate', 'toml', 'sortedcontainers')]",
        ("2.7", None, ["2.7", "1.16.0", "0.9.0", None, None]),
    ),
    "hatch": Shape(
        "hatch_dynamic_version", project(extras=("all",)),
        versions("kiln", "tabulate", "toml", "six"), ["0.4.1", "0.9.0", "0.10.2", "1.16.0"],
    ),
    "hatch-without-extras": Shape(
        "hatch_dynamic_version", project(),
        "import kiln; " + versions("kiln", "tabulate", "toml"), ["0.4.1", None, None],
    ),
    "poetry": Shape(
        "poetry_extras", project(extras=("tables",)),
        "import lantern; assert lantern.light == 'on'; "
        + versions("lantern", "six", "tabulate", "toml", "zipp"),
        ["1.2.3", "1.16.0", "0.9.0", None, "3.17.0"],
    ),
    "pdm": Shape(
        "pdm_version_from_file", project(),
        f"import ferry; seen = ferry.__version__, version('ferry'), {SIX}",
        ("5.0.1", "5.0.1", "1.16.0"),
    ),
    "uv-build-and-a-variable": Shape(
        "environment_variable", project(env_vars={"THERMOSTAT_LIMIT": "21"}),
        f"import thermostat; seen = thermostat.limit, version('thermostat'), {SIX}",
        (21, "0.2.0", "1.16.0"),
    ),
    "package-data": Shape(
        "setuptools_package_data", project(),
        "import subprocess, sys; from pathlib import Path; from importlib.metadata import "
        "entry_points; (moon,) = entry_points(group='almanac.plugins'); seen = moon.load()(), "
        "subprocess.run([Path(sys.prefix, 'bin', 'almanac')], capture_output=True, text=True, "
        "timeout=30).stdout",
        ("full", "full\n"),
    ),
    "dynamic-dependencies": Shape(
        "setuptools_dynamic_dependencies", project(extras=("tables",)),
        "import quarry; " + versions("quarry", "six", "tabulate", "sortedcontainers"),
        ["7.1", "1.16.0", "0.9.0", None],
    ),
    "c-extension": Shape(
        "c_extension", project(), f"import abacus; seen = abacus.add(40, 2), {SIX}", (42, "1.16.0")
    ),
    "build-hook": Shape(
        "hatch_build_hook", project(),
        "from stencil import generated; seen = generated.sides, version('toml')", (6, None),
    ),
    "in-tree-back-end": Shape(
        "in_tree_backend", project(),
        "import foundry; seen = foundry.metal, version('foundry')", ("iron", "8.0"),
    ),
    "version-from-git": Shape(
        "version_from_git", project(),
        "import pendulum_clock; seen = pendulum_clock.version, version('pendulum-clock')",
        ("1.4.2", "1.4.2"),
        make=("git init -q", "git add .", f"{GIT} commit -qm first", "git tag v1.4.2"),
    ),
}  # fmt: skip

#: As for pip, the other extras do not count: they cannot be had together, or not at all.
PROJECTS["extras-that-pip-ignores"] = Shape(
    "setup_py_conflicting_extras", EnvSpec(packages=(".[new]",)),
    "import pylon; seen = pylon.__version__, version('six'), version('tabulate')",
    ("0.9", "1.17.0", "0.9.0"),
)  # fmt: skip

SEVERAL = {
    "namespace": Shape(
        "namespace_packages", project("apples"),
        "from orchard import apples, core; seen = apples.count, core.rows, version('orchard-core')",
        (40, 4, "2.0"),
    ),
    "workspace": Shape(
        "workspace_virtual_root", project("apps/harbour"),
        "import harbour; seen = harbour.ships, version('six'), version('tabulate')",
        (8, "1.15.0", "0.8.10"),
        make=("uv lock -q --upgrade-package six==1.15.0",),
    ),
    "monorepo": Shape(
        "monorepo_editable_library", project("services/api"),
        "import core; seen = core.answer, version('core'), version('api'), version('tabulate')",
        (42, "0.3.0", None, "0.9.0"),
    ),
}  # fmt: skip

CHOICES = {
    "application-with-lock": Shape(
        "application_with_lock", project(),
        versions("six", "tabulate", "report"), ["1.15.0", "0.8.9", None],
        make=("uv lock -q --upgrade-package six==1.15.0 --upgrade-package tabulate==0.8.9",),
    ),
    "conflict-old": Shape(
        "conflicting_extras", project(extras=("old",), groups=("modern",)),
        "import switchyard; " + versions("six", "toml", "tabulate"), ["1.15.0", "0.10.2", "0.9.0"],
    ),
    "conflict-new": Shape(
        "conflicting_extras", project(extras=("new",), groups=("legacy",)),
        "import switchyard; " + versions("six", "toml", "tabulate"), ["1.17.0", "0.10.1", "0.9.0"],
    ),
    "groups": Shape(
        "dependency_groups", project(groups=("tables",)),
        versions("six", "iniconfig", "tabulate", "sortedcontainers"),
        ["1.16.0", "2.0.0", "0.9.0", None],
    ),
    "settings-of-uv": Shape(
        "uv_settings", project(),
        versions("zipp", "idna", "six", "python-dateutil", "toml"),
        ["3.17.0", "3.6", None, "2.9.0", "0.10.1"],
    ),
}  # fmt: skip

FILES = {
    "hashed": Shape(
        "hashed_requirements", EnvSpec(requirements="requirements.txt"),
        versions("six", "tabulate"), ["1.16.0", "0.9.0"],
        make=("uv pip compile -q --generate-hashes requirements.in -o requirements.txt",),
    ),
    "powershell": Shape(
        "powershell_freeze", EnvSpec(requirements="requirements.txt"),
        versions("six", "tabulate", "toml"), ["1.15.0", "0.8.10", "0.10.2"],
    ),
    "requirements-folder": Shape(
        "requirements_folder", EnvSpec(requirements="requirements/dev.txt"),
        "import gazette; assert gazette.pages == 16; assert version('iniconfig'); "
        + versions("gazette", "six", "tabulate", "zipp"), ["3.2", "1.15.0", "0.8.10", None],
    ),
    "script": Shape(
        "script_with_lock", EnvSpec(script="fetch.py"),
        versions("six", "tabulate"), ["1.15.0", "0.8.10"],
        make=("uv lock -q --script fetch.py --upgrade-package six==1.15.0",),
    ),
    "pylock": Shape(
        "pylock", EnvSpec(pylock="pylock.toml"),
        versions("six", "tabulate", "toml"), ["1.15.0", "0.8.10", None],
        make=("uv pip compile -q --format pylock.toml requirements.in -o pylock.toml",),
    ),
}  # fmt: skip

ALL = {**PROJECTS, **SEVERAL, **CHOICES, **FILES}


def why_no_compiler() -> str:
    """Why this machine cannot build a C extension; "" if it can."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        return f"there is no C compiler {compiler}"
    return "" if header.is_file() else f"there is no {header}"


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built here has its build back ends from the cluster's cache."""
    monkeypatch.setenv("RAY_ENVS_ROOT", str(root))


@pytest.fixture
def forgotten(cluster: RayEnvironmentProvider) -> Iterator[Callable[[str], str]]:
    """Makes ids of variants that are deleted after the test."""
    made: list[str] = []

    def note(variant_id: str) -> str:
        made.append(variant_id)
        return variant_id

    yield note
    known = {status["variant_id"] for status in cluster.list_variants()}
    for variant_id in known & {*made}:
        cluster.delete(variant_id, force=True)


def looking() -> Any:
    """A task that returns the value of `seen` after some statements."""

    def look_inside(statements: str) -> Any:  # inside: Ray then sends its code, not its name
        from importlib import metadata

        def version(name: str) -> str | None:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                return None

        scope: dict[str, Any] = {"version": version}
        exec(statements, scope)
        return scope["seen"]

    return ray.remote(look_inside)


def complete(shape: Shape, folder: Path, cache: Path) -> None:
    """Run what the author of a shape ran."""
    environ = {**os.environ, "UV_CACHE_DIR": str(cache)}
    for command in shape.make:
        words = command.split()
        if words[0] == "uv":
            words[0] = uv.find_uv_bin()
        ended = subprocess.run(
            words, cwd=folder, env=environ, timeout=MADE_S, capture_output=True, check=False
        )
        assert ended.returncode == 0, f"{command}: {ended.stderr!r}"


@pytest.mark.parametrize("name", ALL)
def test_a_shape_gives_a_task_what_its_files_ask_for(
    cluster: RayEnvironmentProvider,
    forgotten: Callable[[str], str],
    root: Path,
    tmp_path: Path,
    name: str,
) -> None:
    shape = ALL[name]
    if shape.folder == "c_extension" and (reason := why_no_compiler()):
        pytest.skip(reason)
    folder = tmp_path / shape.folder
    shutil.copytree(SHAPES / shape.folder, folder)
    complete(shape, folder, root / "uv-cache")
    variant_id = forgotten(f"shape-{name}")
    with warnings.catch_warnings():
        # the library of the monorepo is editable
        warnings.simplefilter("ignore", RayEnvsWarning)
        cluster.create(variant_id, shape.spec, base=folder)
    cluster.prepare(variant_id)
    task = looking().options(**cluster.options(variant_id, num_cpus=0))
    assert ray.get(task.remote(shape.look), timeout=ANSWERED_S) == shape.seen


def test_shapes_as_variants_of_a_batch_file(
    cluster: RayEnvironmentProvider, forgotten: Callable[[str], str], root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(SHAPES, folder)
    expected = {
        "flit": ["1.16.0", None, "3.1.4", None],
        "old": ["1.15.0", "0.9.0", None, "1.0.0"],
        "new": ["1.17.0", "0.9.0", None, "1.0.0"],
        "freeze": ["1.15.0", "0.8.10", None, None],
        "script": ["1.17.0", "0.8.10", None, None],
    }
    for name in expected:
        forgotten(f"shapes/{name}")
    shell = Shell(root, tmp_path / "ray", tmp_path)
    address = ray.get_runtime_context().gcs_address
    try:
        ended = shell(
            "run", folder / "batch" / "batch.toml", "--results", "out.jsonl", "--address", address
        )
        assert ended.code == 0, ended.err
        shell.check_idle()
    finally:
        for process in shell.processes():
            process.kill()
    items = {item["variant_id"]: item["value"] for item in lines_of(tmp_path / "out.jsonl")}
    assert {name: list(seen.values()) for name, seen in items.items()} == expected
