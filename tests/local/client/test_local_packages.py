"""Local packages: a project's own one, workspace members, path sources; built, kept, sent, used."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs.client.inputs import read_definition
from ray_envs.client.local_packages import LocalPackages
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.disk import local_wheels
from ray_envs.errors import InvalidInput, InvalidPackages, RayEnvsError
from ray_envs.manager import exports
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.specs import Definition, EnvSpec
from tests.local.life_tools import managed, warm_root

HATCH = '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
SETUPTOOLS = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Settings]:
    folder = tmp_path_factory.mktemp("local-packages")
    with warm_root(folder / "root", warm_cache) as made:
        yield made


@pytest.fixture(autouse=True)
def _here(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENVS_ROOT", str(settings.root))


def project(folder: Path, name: str, *requires: str, more: str = HATCH, code: str = "") -> Path:
    """A project with one module that is called like it."""
    module = name.replace("-", "_")
    place = folder / "src" / module
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(code)
    head = f'[project]\nname = "{name}"\nversion = "1.0"\nrequires-python = ">=3.10"\n'
    text = f"{head}dependencies = {json.dumps(requires)}\n{more}"
    (folder / "pyproject.toml").write_text(text)
    return folder


def defined(folder: Path, **options: Any) -> Definition:
    return read_definition(EnvSpec(project=str(folder), **options), folder)


def create(settings: Settings, definition: Definition, variant: str = "v") -> dict[str, Any]:
    """The status of a variant that is ready."""

    async def act(manager: EnvManager) -> Any:
        return await manager.create_env(
            variant_id=variant,
            spec=definition.model_dump(mode="json", exclude_defaults=True),
            wheels=definition.contents(),
            replace=True,
            wait_s=120,
        )

    told: dict[str, Any] = managed(settings, act)
    return told


def said(status: dict[str, Any], code: str) -> str:
    run = [status["python_path"], "-c", code]
    ended = subprocess.run(run, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


# -- what is built ---------------------------------------------------------------------------------


def test_a_project_with_a_build_system_is_installed(settings: Settings, tmp_path: Path) -> None:
    folder = project(tmp_path / "app", "my-app", "idna", code="value = 7\n")
    status = create(settings, defined(folder), "installed")
    assert status["status"] == "ACTIVE"
    assert said(status, "import my_app, idna; print(my_app.value, my_app.__file__)").startswith("7")
    assert str(tmp_path) not in said(status, "import my_app; print(my_app.__file__)")


def test_without_a_build_system_only_the_dependencies_are(tmp_path: Path) -> None:
    folder = project(tmp_path / "app", "app", more="")
    text = (folder / "pyproject.toml").read_text()
    assert defined(folder).pyproject == text
    assert [w.name for w in defined(folder, install_project=True).wheels] == ["app"]
    other = project(tmp_path / "other", "app")
    assert defined(other, install_project=False).wheels == ()


def test_equal_files_give_equal_wheels(tmp_path: Path) -> None:
    one, other = (project(tmp_path / name, "app", code="x = 1\n") for name in ("one", "other"))
    os.utime(other / "src" / "app" / "__init__.py", (1, 1))
    wheels = [defined(folder).wheels[0] for folder in (one, other)]
    assert wheels[0].sha256 == wheels[1].sha256
    (other / "src" / "app" / "__init__.py").write_text("x = 2\n")
    assert defined(other).wheels[0].sha256 != wheels[0].sha256


def test_setuptools_does_not_bring_back_deleted_modules(tmp_path: Path) -> None:
    folder = project(tmp_path / "app", "app", more=SETUPTOOLS)
    more = folder / "src" / "app" / "more.py"
    more.write_text("")
    before = defined(folder).wheels[0]
    more.unlink()
    after = defined(folder).wheels[0]
    assert b"app/more.py" in (before.content or b"")
    assert b"app/more.py" not in (after.content or b"")


@pytest.mark.parametrize(
    "files",
    [
        {"setup.py": "from setuptools import setup\nsetup(name='app', version='2', "
                     "py_modules=['app'], install_requires=['idna'], "
                     "extras_require={'more': ['six']})\n"},
        {"pyproject.toml": '[tool.poetry]\nname = "app"\nversion = "2"\ndescription = ""\n'
                           'authors = []\n[tool.poetry.dependencies]\npython = ">=3.10"\n'
                           'idna = "*"\nsix = { version = "*", optional = true }\n'
                           '[tool.poetry.extras]\nmore = ["six"]\n[build-system]\n'
                           'requires = ["poetry-core"]\n'
                           'build-backend = "poetry.core.masonry.api"\n'},
        {"pyproject.toml": '[project]\nname = "app"\ndynamic = ["version", "dependencies", '
                           f'"optional-dependencies"]\n{SETUPTOOLS}[tool.setuptools]\n'
                           'py-modules = ["app"]\n[tool.setuptools.dynamic]\nversion = '
                           '{ attr = "app.__version__" }\ndependencies = { file = ["r.txt"] }\n'
                           'optional-dependencies = { more = { file = ["m.txt"] } }\n',
         "r.txt": "idna\n", "m.txt": "six\n"},
    ],
    ids=["setup.py", "poetry", "dynamic"],
)  # fmt: skip
def test_projects_of_older_tools_are_built_by_them(
    settings: Settings, tmp_path: Path, files: dict[str, str]
) -> None:
    for name, text in {"app.py": "__version__ = '2'\n", **files}.items():
        (tmp_path / name).write_text(text)
    definition = defined(tmp_path, extras=("more",))
    assert [(wheel.name, wheel.version) for wheel in definition.wheels] == [("app", "2")]
    status = create(settings, definition, "older")
    assert said(status, "import app, idna, six; print(app.__version__)") == "2"


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize(("place", "is_worktree"), [(".", False), ("packages/clock", True)])
def test_a_new_tag_of_git_is_a_new_version(tmp_path: Path, place: str, is_worktree: bool) -> None:
    repository = tmp_path / "repository"
    folder = repository / place
    root = "../.." if place != "." else "."
    text = (
        '[project]\nname = "clock"\ndynamic = ["version"]\n[build-system]\n'
        'requires = ["setuptools", "setuptools-scm"]\n'
        f'build-backend = "setuptools.build_meta"\n[tool.setuptools_scm]\nroot = "{root}"\n'
    )
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(text)
    (folder / "clock.py").touch()
    (repository / ".gitignore").write_text("*.egg-info\n")
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    if is_worktree:
        git(repository, "worktree", "add", "-q", str(tmp_path / "other"))
        repository, folder = tmp_path / "other", tmp_path / "other" / place
    versions = []
    commit = "commit -q --allow-empty -m more"
    for steps in (["tag v1"], [commit, "tag v2"]):
        for step in steps:
            git(repository, *step.split())
        versions.append(defined(folder).wheels[0].version)
    assert versions == ["1", "2"]


# -- other local packages --------------------------------------------------------------------------


def test_path_sources_become_wheels_also_those_of_others(
    settings: Settings, tmp_path: Path
) -> None:
    project(tmp_path / "libs" / "deep", "deep", code="name = 'deep'\n")
    source = '[tool.uv.sources]\ndeep = { path = "../deep" }\n'
    project(tmp_path / "libs" / "lib", "lib", "deep", more=HATCH + source)
    more = '[tool.uv.sources]\nlib = { path = "../libs/lib", editable = true }\n'
    folder = project(tmp_path / "app", "app", "lib", more=more)
    with pytest.warns(UserWarning, match="is editable: the environment gets it as it is now"):
        definition = defined(folder)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        defined(folder)
    assert [wheel.name for wheel in definition.wheels] == ["deep", "lib"]
    status = create(settings, definition, "paths")
    assert said(status, "import lib, deep; print(deep.name)") == "deep"


def test_members_of_a_workspace_and_its_lock_are_used(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.uv.workspace]\nmembers = ["packages/*"]\nexclude = ["packages/old"]\n'
        '[tool.uv]\nconstraint-dependencies = ["six<1.17"]\n'
        "[tool.uv.sources]\nlib = { workspace = true }\n"
    )
    project(tmp_path / "packages" / "lib", "lib", "six", code="import six\n")
    project(tmp_path / "packages" / "old", "old", "nothing-of-this-name")
    folder = project(tmp_path / "packages" / "app", "app", "lib")
    uv = Store(settings).cache
    environ = {**os.environ, "UV_CACHE_DIR": str(uv)}
    lock = ["uv", "lock", "-q", "--upgrade-package", "six==1.15.0"]
    subprocess.run(lock, cwd=tmp_path, env=environ, check=True, timeout=60)
    definition = defined(folder)
    assert sorted(wheel.name for wheel in definition.wheels) == ["app", "lib"]
    status = create(settings, definition, "member")
    assert said(status, "import app, lib; print(lib.six.__version__)") == "1.15.0"

    with pytest.raises(InvalidInput, match="root of a workspace") as caught:
        defined(tmp_path)
    assert "app, lib" in caught.value.hint


def test_a_wheel_and_a_source_archive_are_local_packages_too(
    settings: Settings, tmp_path: Path
) -> None:
    lib = project(tmp_path / "lib", "lib")
    build = ["uv", "build", "-q", "--out-dir", str(tmp_path / "dist"), str(lib)]
    subprocess.run(build, check=True, timeout=60)
    kinds = {}
    for file in sorted(path.name for path in (tmp_path / "dist").glob("lib-*")):
        source = f'[tool.uv.sources]\nlib = {{ path = "../dist/{file}" }}\n'
        folder = project(tmp_path / file.rpartition(".")[2], "app", "lib", more=source)
        kinds[file.rpartition(".")[2]] = defined(folder).wheels
    assert [wheel.name for wheel in kinds["whl"]] == ["lib"]
    assert [wheel.name for wheel in kinds["gz"]] == ["lib"]
    assert create(settings, defined(tmp_path / "whl"), "wheel")["status"] == "ACTIVE"


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('{ path = "../none" }', "none does not exist"),
        ('{ path = "../lib", package = false }', "package = false"),
        ("{ workspace = true }", "belongs to no workspace"),
        ('{ path = "../other" }', "is the package other"),
        ('{ path = "../lib/pyproject.toml" }', "neither a folder, nor a wheel"),
        ("3", "this is not a table"),
    ],
)
def test_a_wrong_source_is_named(tmp_path: Path, source: str, message: str) -> None:
    project(tmp_path / "lib", "lib")
    project(tmp_path / "other", "other")
    more = f"[tool.uv.sources]\nlib = {source}\n"
    folder = project(tmp_path / "app", "app", "lib", more=more)
    with pytest.raises(InvalidInput) as caught:
        defined(folder)
    assert message in caught.value.message
    assert "tool.uv.sources.lib" in caught.value.where


def test_a_build_that_fails_shows_the_words_of_its_back_end(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler for the moon')\n")
    with pytest.raises(InvalidPackages) as caught:
        defined(tmp_path)
    assert "no compiler for the moon" in caught.value.detail
    assert str(tmp_path) in caught.value.where


def test_an_operator_may_forbid_local_packages(settings: Settings, tmp_path: Path) -> None:
    definition = defined(project(tmp_path / "app", "app"))
    strict = settings.model_copy(update={"allowed_sources": ()})
    with pytest.raises(InvalidPackages, match="app is a local package, which is not allowed"):
        create(strict, definition, "forbidden")


def test_a_content_that_is_missing_or_other_is_refused(settings: Settings, tmp_path: Path) -> None:
    definition = defined(project(tmp_path / "app", "app", code="odd = 1\n"))
    (wheel,) = definition.wheels
    for content, message in ((None, "was not sent"), (b"PK", "is not what its definition says")):
        changed = wheel.model_copy(update={"content": content})
        with pytest.raises(InvalidInput, match=message):
            create(settings, definition.model_copy(update={"wheels": (changed,)}), "other")
    assert local_wheels.missing(settings.root, [wheel]) == [wheel]


# -- its life --------------------------------------------------------------------------------------


def test_a_changed_file_makes_a_new_generation_and_a_rollback_the_old_one(
    settings: Settings, tmp_path: Path
) -> None:
    folder = project(tmp_path / "app", "app", code="value = 1\n")
    first = create(settings, defined(folder), "changing")
    (folder / "src" / "app" / "__init__.py").write_text("value = 2\n")
    second = create(settings, defined(folder), "changing")
    assert first["key"] != second["key"]
    (changed,) = second["diff"]["changed"].values()
    assert [each.split()[0] for each in changed] == ["1.0", "1.0"]
    assert changed[0] != changed[1]
    shutil.rmtree(folder)  # the files are not needed any more
    back = managed(settings, lambda m: m.rollback_env(variant_id="changing"))
    assert back["key"] == first["key"]
    assert said(back, "import app; print(app.value)") == "1"


def test_an_export_and_a_bundle_carry_it(settings: Settings, tmp_path: Path) -> None:
    folder = project(tmp_path / "app", "app", code="value = 3\n")
    status = create(settings, defined(folder), "carried")

    async def again(manager: EnvManager) -> Any:
        told = await manager.export_env(variant_id="carried")
        files = told["files"]
        assert "../" not in files["pyproject.toml"] + files["uv.lock"]
        return await manager.import_env(
            variant_id="copy",
            pyproject=files["pyproject.toml"],
            uv_lock=files["uv.lock"],
            options=json.loads(files["options.json"]),
            wheels=told["wheels"],
        )

    assert managed(settings, again)["key"] == status["key"]
    registry = Registry(settings)
    record = registry.get(EnvId.parse("carried"))
    assert record is not None
    bundle = tmp_path / "app.tar"
    exports.put_bundle(registry, Store(settings), record, record.current, bundle)
    files = exports.take_bundle(bundle, Store(settings))
    (wheel,) = record.current.definition.wheels
    assert files[f"{wheel.sha256}.whl"] == local_wheels.read(settings.root, wheel)


def test_a_sweep_deletes_only_old_wheels_that_no_generation_names(
    settings: Settings, tmp_path: Path
) -> None:
    wheels = [
        defined(project(tmp_path / name, "app", code=f"x = '{name}'\n")).wheels[0]
        for name in ("kept", "old", "new")
    ]
    root = tmp_path / "root"
    local_wheels.take(root, wheels, {w.sha256: w.content for w in wheels if w.content})
    hours_ago = time.time() - 2 * 3600
    for wheel in wheels[:2]:
        os.utime(local_wheels.place(root, wheel).parent, (hours_ago, hours_ago))
    assert local_wheels.sweep(root, [wheels[0].sha256]) == wheels[1].size
    assert local_wheels.missing(root, wheels) == [wheels[1]]


def test_a_build_in_a_running_loop_is_built_once(tmp_path: Path, settings: Settings) -> None:
    folder = project(tmp_path / "app", "app", code="x = 'loop'\n")

    async def twice() -> list[Definition]:
        return [defined(folder), defined(folder)]

    began = time.monotonic()
    one, other = asyncio.run(twice())
    assert one == other
    took_s = time.monotonic() - began
    began = time.monotonic()
    LocalPackages(settings).add(folder, where="")
    assert time.monotonic() - began < took_s / 2


def test_pins_of_the_projects_own_lock_stay(settings: Settings, tmp_path: Path) -> None:
    folder = project(tmp_path / "app", "app", "six")
    environ = {**os.environ, "UV_CACHE_DIR": str(Store(settings).cache)}
    lock = ["uv", "lock", "-q", "--upgrade-package", "six==1.15.0"]
    subprocess.run(lock, cwd=folder, env=environ, check=True, timeout=60)
    status = create(settings, defined(folder), "pinned")
    assert said(status, "import six; print(six.__version__)") == "1.15.0"


def test_a_source_of_another_kind_in_a_local_package_is_required_by_the_project(
    tmp_path: Path,
) -> None:
    index = '[[tool.uv.index]]\nname = "other"\nurl = "https://i.invalid/simple"\nexplicit = true\n'
    more = HATCH + '[tool.uv.sources]\nsix = { index = "other" }\n' + index
    project(tmp_path / "lib", "lib", "six>=1", more=more)
    source = '[tool.uv.sources]\nlib = { path = "../lib" }\n'
    text = defined(project(tmp_path / "app", "app", "lib", more=source)).pyproject or ""
    data = parsed_toml(text, where="")
    assert data["project"]["dependencies"] == ["lib", "six>=1"]
    assert data["tool"]["uv"]["sources"]["six"] == {"index": "other"}
    assert data["tool"]["uv"]["index"][0]["name"] == "other"


def test_a_package_that_requires_a_path_in_its_metadata_is_refused(tmp_path: Path) -> None:
    lib = project(tmp_path / "lib", "lib")
    more = HATCH + "[tool.hatch.metadata]\nallow-direct-references = true\n"
    folder = project(tmp_path / "app", "app", f"lib @ file://{lib}", more=more)
    with pytest.raises(RayEnvsError, match="requires a path of this machine"):
        defined(folder)


# -- in other files --------------------------------------------------------------------------------


def test_local_entries_of_a_requirements_file_are_built(settings: Settings, tmp_path: Path) -> None:
    extra = '[project.optional-dependencies]\nmore = ["six"]\n'
    project(tmp_path / "app", "app", more=extra + HATCH)
    project(tmp_path / "libs" / "lib", "lib", code="x = 5\n")
    (tmp_path / "app" / "requirements.txt").write_text("-e .[more]\n-r ../libs/more.txt\n")
    (tmp_path / "libs" / "more.txt").write_text(
        f'./lib ; python_version >= "3"\nidna==3.6\nlib @ file://{tmp_path}/libs/lib\n'
    )
    spec = EnvSpec(requirements="app/requirements.txt")
    definition = read_definition(spec, tmp_path)
    assert definition.packages == (
        "app[more]", "idna==3.6", "lib", 'lib; python_version >= "3"',
    )  # fmt: skip
    status = create(settings, definition, "requirements")
    assert said(status, "import app, six, lib; print(lib.x)") == "5"


def test_local_packages_of_a_spec_a_script_and_a_pylock(settings: Settings, tmp_path: Path) -> None:
    project(tmp_path / "lib", "lib", code="x = 6\n")
    (tmp_path / "x.py").write_text(
        '# /// script\n# dependencies = ["lib"]\n# [tool.uv.sources]\n'
        '# lib = { path = "lib" }\n# ///\n'
    )
    (tmp_path / "pylock.toml").write_text(
        'lock-version = "1.0"\ncreated-by = "test"\n[[packages]]\nname = "lib"\n'
        '[packages.directory]\npath = "lib"\n'
    )
    specs = [EnvSpec(packages=("./lib",)), EnvSpec(script="x.py"), EnvSpec(pylock="pylock.toml")]
    keys = set()
    for number, spec in enumerate(specs):
        status = create(settings, read_definition(spec, tmp_path), f"form-{number}")
        assert said(status, "import lib; print(lib.x)") == "6"
        keys.add(status["key"])
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("./none", "none does not exist"), ("other @ file://{}/lib", "is the package lib")],
)
def test_a_wrong_local_entry_is_named_with_its_line(
    tmp_path: Path, line: str, message: str
) -> None:
    project(tmp_path / "lib", "lib")
    (tmp_path / "r.txt").write_text(f"six\n{line.format(tmp_path)}\n")
    with pytest.raises(InvalidInput) as caught:
        read_definition(EnvSpec(requirements="r.txt"), tmp_path)
    assert message in caught.value.message
    assert caught.value.where.endswith("r.txt: line 2")


@pytest.mark.parametrize("pattern", ["/etc/*", "a**b", "../../*/x"])
def test_a_pattern_of_members_that_leads_nowhere_hangs_nothing(
    tmp_path: Path, pattern: str
) -> None:
    folder = project(tmp_path / "app", "app", more="")
    with (folder / "pyproject.toml").open("a") as file:
        file.write(f'[tool.uv.workspace]\nmembers = ["{pattern}"]\n')
    if pattern.startswith(".."):
        assert defined(folder).wheels == ()
        return
    with pytest.raises(InvalidInput, match="is not a pattern of folders"):
        defined(folder)


def test_a_changed_file_in_a_folder_called_build_or_behind_a_link_is_seen(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "linked.py").write_text("x = 1\n")
    folder = project(tmp_path / "app", "app")
    inner = folder / "src" / "app" / "build"
    inner.mkdir()
    (inner / "x.py").write_text("x = 1\n")
    (folder / "src" / "app" / "more").symlink_to(shared)
    hashes = [defined(folder).wheels[0].sha256]
    for file in (inner / "x.py", shared / "linked.py"):
        file.write_text("x = 22\n")
        hashes.append(defined(folder).wheels[0].sha256)
    assert hashes[1] != hashes[0]


def test_a_wheel_that_was_cut_off_under_the_root_is_written_again(
    settings: Settings, tmp_path: Path
) -> None:
    definition = defined(project(tmp_path / "app", "app", code="cut = 1\n"))
    create(settings, definition, "cut")
    file = local_wheels.place(settings.root, definition.wheels[0])
    os.unlink(file)
    file.write_bytes(b"")
    with pytest.raises(RayEnvsError, match="the head has lost the local package app"):
        managed(settings, lambda m: m.add_deps(variant_id="cut", packages=["six==1.16.0"]))
    create(settings, definition, "cut-again")
    assert local_wheels.missing(settings.root, definition.wheels) == []


def test_a_project_and_local_packages_beside_it(settings: Settings, tmp_path: Path) -> None:
    project(tmp_path / "other", "other", code="x = 8\n")
    project(tmp_path / "lib", "lib")
    source = '[tool.uv.sources]\nlib = { path = "../lib" }\n'
    project(tmp_path / "app", "app", "lib", more=HATCH + source)
    definition = read_definition(EnvSpec(project="app", packages=("./other",)), tmp_path)
    assert [wheel.name for wheel in definition.wheels] == ["app", "lib", "other"]
    status = create(settings, definition, "beside")
    assert said(status, "import app, lib, other; print(other.x)") == "8"


def test_without_the_definitions_no_wheel_is_called_unneeded(tmp_path: Path) -> None:
    assert Registry(Settings(root=tmp_path / "lost")).local_wheels() is None
