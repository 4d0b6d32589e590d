"""What a lock installs for a choice of extras and groups: as uv itself installs it.

The packages are tiny wheels of a folder, so that no test needs the network; uv is the real one.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import uv

from ray_envs.decisions import locks, resolving
from ray_envs.errors import RayEnvsError, ResolutionFailed
from ray_envs.node.interpreter import this_platform, this_target
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from tests.local.conftest import RAY, Locked, build

#: How long one run of uv may take here.
_UV_S = 60.0

#: Name, version, and what it requires.
WHEELS = [
    *(("leaf", version, []) for version in "123"),
    *(("other", version, []) for version in "12"),
    *(
        (
            "mid",
            version,
            ["leaf", "leaf==1; extra == 'x'", "leaf==2; extra == 'y'", "other; os_name == 'posix'"],
        )
        for version in "12"
    ),
    ("top", "1", ["mid", "mid[x]; extra == 'x'", "other==1; extra == 'z'"]),
]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name, version, requires in WHEELS:
        extras = sorted({line.split("'")[1] for line in requires if "extra ==" in line})
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {each}" for each in requires]
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                             "Tag: py3-none-any\n")  # fmt: skip
            archive.writestr(f"{info}/RECORD", "")
    return folder


def run_uv(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [uv.find_uv_bin(), *command, "--offline", "--python", sys.executable],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=_UV_S,
    )


def lock_text(project: Path) -> str:
    """The lock in `project`, with a hash for each wheel: uv writes none for those of a folder."""
    return (project / "uv.lock").read_text().replace("{ path =", '{ hash = "sha256:0", path =')


def of_uv(project: Path, extras: Iterable[str], groups: Iterable[str]) -> list[str] | None:
    """What `uv sync` would install; None if it refuses the choice."""
    chosen = [word for extra in extras for word in ("--extra", extra)]
    chosen += [word for group in groups for word in ("--group", group)]
    ended = run_uv(
        project, "sync", "--frozen", "--dry-run", "--no-install-project", "--no-default-groups",
        *chosen,
    )  # fmt: skip
    if ended.returncode:
        assert "conflict" in ended.stderr, ended.stderr
        return None
    return sorted(line[3:] for line in ended.stderr.splitlines() if line.startswith(" + "))


def of_ours(lock: str, extras: Iterable[str], groups: Iterable[str]) -> list[str] | None:
    try:
        found = locks.installed(lock, this_platform(), extras=extras, groups=groups)
    except ResolutionFailed as exc:
        return None if "exclude each other" in exc.message else [exc.message]
    return sorted(f"{each.name}=={each.version}" for each in found)


PROJECTS = {
    "two extras": """
a = ["leaf==1", "top"]
b = ["leaf==2", "mid"]
c = ["other==1"]
[dependency-groups]
g = ["mid"]
h = []
[tool.uv]
conflicts = [[{ extra = "a" }, { extra = "b" }]]
""",
    "an extra and groups": """
a = ["leaf==1", "mid"]
b = ["mid"]
c = []
[dependency-groups]
g = ["leaf==2"]
h = ["leaf==3", "other==2"]
[tool.uv]
conflicts = [[{ extra = "a" }, { group = "g" }, { group = "h", package = "proj" }]]
""",
    "extras without requirements": """
a = []
b = ["mid==1"]
c = ["top", "mid==2"]
[dependency-groups]
g = ["mid"]
h = ["mid"]
[tool.uv]
conflicts = [[{ extra = "a" }, { extra = "b" }], [{ extra = "b" }, { extra = "c" }]]
""",
    "through others": """
a = ["leaf==1"]
b = ["proj[a]", "mid==1"]
c = ["leaf==2"]
[dependency-groups]
g = ["proj[a]"]
h = [{ include-group = "g" }, "mid"]
[tool.uv]
conflicts = [
    [{ extra = "a" }, { extra = "c" }],
    [{ extra = "b" }, { extra = "c" }],
    [{ group = "g" }, { extra = "c" }],
    [{ group = "h" }, { extra = "c" }],
]
""",
    "extras of packages": """
a = ["mid[x]"]
b = ["mid[y]"]
c = ["top[z]"]
[dependency-groups]
g = ["top[x]"]
h = ["mid"]
[tool.uv]
conflicts = [
    [{ extra = "a" }, { extra = "b" }, { group = "g" }],
    [{ package = "mid", extra = "x" }, { package = "mid", extra = "y" }],
]
""",
    "an index for each": """
a = ["leaf==1", "mid"]
b = ["leaf==1", "mid"]
c = ["leaf"]
[dependency-groups]
g = ["other"]
h = ["leaf==3"]
[tool.uv]
conflicts = [[{ extra = "a" }, { extra = "b" }, { extra = "c" }, { group = "h" }]]
[tool.uv.sources]
leaf = [{ index = "one", extra = "a" }, { index = "two", extra = "b" }]
other = [{ index = "one", group = "g" }]
mid = [{ index = "two", marker = "sys_platform == 'linux'", extra = "b" }]
[[tool.uv.index]]
name = "one"
url = "{copy}"
format = "flat"
explicit = true
[[tool.uv.index]]
name = "two"
url = "{wheels}"
format = "flat"
explicit = true
""",
}


def write_project(folder: Path, wheels: Path, body: str) -> None:
    (folder / "pyproject.toml").write_text(f"""
[project]
name = "proj"
version = "1"
requires-python = "=={sys.version_info.major}.{sys.version_info.minor}.*"
[[tool.uv.index]]
url = "{wheels}"
format = "flat"
default = true
[project.optional-dependencies]
{body}
""")


@pytest.mark.parametrize("name", PROJECTS)
def test_a_lock_installs_what_uv_installs_for_every_choice(
    name: str, wheels: Path, tmp_path: Path
) -> None:
    shutil.copytree(wheels, tmp_path / "copy")
    body = PROJECTS[name].replace("{copy}", str(tmp_path / "copy")).replace("{wheels}", str(wheels))
    write_project(tmp_path, wheels, body)
    ended = run_uv(tmp_path, "lock")
    assert ended.returncode == 0, ended.stderr
    lock, told, ours = lock_text(tmp_path), {}, {}
    for extras in (each for n in range(3) for each in itertools.combinations("abc", n)):
        for groups in ((), ("g",), ("h",)):
            told[extras, groups] = of_uv(tmp_path, extras, groups)
            ours[extras, groups] = of_ours(lock, extras, groups)
    assert ours == told
    assert None in told.values()
    assert len({str(each) for each in told.values()}) > 3


def test_the_pins_of_a_lock_with_conflicts_stay_until_they_are_upgraded(
    wheels: Path, tmp_path: Path
) -> None:
    body = """
a = ["leaf==1", "mid==1"]
b = ["leaf==3", "mid==1"]
[tool.uv]
conflicts = [[{ extra = "a" }, { extra = "b" }]]
"""
    texts = []
    for asked, command in ((body, []), (body.replace("==1", "<3"), []), ("", ["--upgrade"])):
        if asked:
            write_project(tmp_path, wheels, asked)
        ended = run_uv(tmp_path, "lock", *command)
        assert ended.returncode == 0, ended.stderr
        texts.append(lock_text(tmp_path))
    first, kept, moved = texts
    assert of_ours(kept, ["a"], []) == ["leaf==1", "mid==1", "other==2"]
    assert locks.moved_pins(first, kept, this_platform()) == ()
    assert locks.moved_pins(first, moved, this_platform()) == ("leaf 1 or 3 -> 2", "mid 1 -> 2")


# -- through the builder of a node


BODY = """
[project]
name = "proj"
version = "1"
dependencies = ["six"]
[project.optional-dependencies]
old = ["idna==3.6"]
new = ["idna==3.7"]
[dependency-groups]
g = ["six==1.15.0"]
[tool.uv]
conflicts = [[{ extra = "old" }, { extra = "new" }, { group = "g" }]]
"""


def test_alternatives_of_one_lock_are_different_environments(
    warm: Settings, locked: Locked
) -> None:
    """Ray's own idna is another one for each extra: two variants, one lock, two environments."""
    asked = {extra: Definition(pyproject=BODY, extras=(extra,)) for extra in ("old", "new")}
    target, platform = this_target(RAY), this_platform()
    (text,) = {resolving.project_text(each, target) for each in asked.values()}
    plain = locked()
    folder = warm.root / "project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(text)
    uv_lock = asyncio.run(Builder(warm, Store(warm).cache).resolve(folder)).text
    shutil.rmtree(folder)
    states = []
    for extra, version in (("old", "3.6"), ("new", "3.7")):
        packages = locks.installed(uv_lock, platform, extras=(extra,))
        assert {each.version for each in packages if each.name == "idna"} == {version}
        request = plain.model_copy(
            update={
                "key": locks.key_of(packages, target, platform),
                "pyproject": text,
                "uv_lock": uv_lock,
                "extras": (extra,),
                "lock_sha256": locks.lock_sha256(uv_lock),
                "packages": {each.name: each.version for each in packages},
            }
        )
        states.append(build(warm, request))
    assert [(each.phase.value, each.error) for each in states] == [("ready", None)] * 2
    assert len({each.key for each in states}) == 2
    with pytest.raises(RayEnvsError, match="exclude each other"):
        locks.installed(uv_lock, platform, extras=asked)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("override-dependencies = 3", "expected a sequence"),
        ("environments = [\"python_version >= '3.99'\"]", "don't overlap"),
        ('default-groups = ["nope"]', "nope"),
    ],
)
def test_a_project_that_uv_cannot_use_is_no_passing_fault(
    settings: Settings, tmp_path: Path, wheels: Path, entry: str, said: str
) -> None:
    write_project(tmp_path, wheels, f"[tool.uv]\n{entry}")
    with pytest.raises(ResolutionFailed, match="uv cannot use the project") as caught:
        asyncio.run(Builder(settings, Store(settings).cache).resolve(tmp_path))
    assert said in caught.value.detail
    assert (caught.value.where, bool(caught.value.hint)) == ("pyproject.toml", True)
