"""From texts to keys: real locks of uv 0.13 (cut down to a few wheels) and generated ones."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags, mac_platforms

from ray_envs import resolving
from ray_envs.errors import InvalidInput, InvalidPackages, RayEnvsError, ResolutionFailed
from ray_envs.models import Definition, Installed, Platform, Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

DATA = Path(__file__).parent / "data"
FORKS, URLS, BEFORE, AFTER = (
    (DATA / f"{name}.lock").read_text() for name in ("forks", "urls", "before", "after")
)
TARGET = Target(python="3.11.7", ray="2.60.0")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def platform(system: str, tags: list[str]) -> Platform:
    every = [
        *cpython_tags((3, 11), ["cp311"], tags),
        *compatible_tags((3, 11), "cp311", tags),
    ]
    markers = {
        "implementation_name": "cpython",
        "implementation_version": "3.11.7",
        "os_name": "posix",
        "platform_machine": "x86_64" if system == "linux" else "arm64",
        "platform_python_implementation": "CPython",
        "platform_release": "6.1",
        "platform_system": "Linux" if system == "linux" else "Darwin",
        "platform_version": "1",
        "python_full_version": "3.11.7",
        "python_version": "3.11",
        "sys_platform": system,
    }
    return Platform(markers=markers, tags=tuple(map(str, every)), name=f"{system}-test")


MANYLINUX = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]
LINUX = platform("linux", [*MANYLINUX, "manylinux2014_x86_64", "linux_x86_64"])
MAC = platform("darwin", list(mac_platforms((15, 0), "arm64")))


def definition(pyproject: str | None = None, **options: Any) -> Definition:
    return Definition(pyproject=pyproject, **options)


def project(body: str = "", dependencies: str = '["six"]') -> str:
    return f'[project]\nname = "x"\nversion = "1"\ndependencies = {dependencies}\n{body}'


def by_name(items: tuple[Installed, ...]) -> dict[str, Installed]:
    found = {item.name: item for item in items}
    assert len(found) == len(items)
    return found


# -- requirements


def test_comments_blank_lines_continuations_and_order_do_not_matter() -> None:
    text = "\ufeff# a comment \\\nPandas\n\n  six # trailing\nscikit_learn>=1,\\\n<2\nsix\n"
    expected = ("pandas", "scikit-learn<2,>=1", "six")
    assert resolving.requirement_lines(text) == expected
    assert (
        resolving.requirement_lines(reversed(["Pandas", "six", "scikit_learn>=1,<2"])) == expected
    )
    assert resolving.requirement_lines(text.replace("\n", "\r\n")) == expected
    assert resolving.requirement_lines("numpy\\") == ("numpy",)
    assert resolving.requirement_lines("") == ()


def test_a_comma_separates_requirements_only_where_it_is_not_part_of_one() -> None:
    assert resolving.requirement_lines("numpy,pandas") == ("numpy", "pandas")
    assert resolving.requirement_lines("numpy>=1,<2") == ("numpy<2,>=1",)
    assert resolving.requirement_lines("x[a,b],y") == ("x[a,b]", "y")


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("--index-url=https://h/simple", "UV_DEFAULT_INDEX"),
        ("--extra-index-url https://h/simple", "tool.uv.index"),
        ("-e .", "wheel"),
        ("-e.", "wheel"),
        ("-r more.txt", 'requirements = "more.txt"'),
        ("-rmore.txt", 'requirements = "more.txt"'),
        ("-c c.txt", "constraint-dependencies"),
        ("--pre", "leave it out"),
        ("-", "leave it out"),
        ("six==1.16.0 --hash=sha256:00", "uv.lock pins"),
        ('six --config-settings="a=b"', "leave them out"),
        ("./x", "wheel"),
        ("/x", "wheel"),
        (".", "wheel"),
        ("C:\\x", "wheel"),
        ("libs/x", "wheel"),
        ("x-1-py3-none-any.whl", "wheel"),
        ("x @ file:///srv/x.whl", "wheel"),
        ("x @ ./x", "wheel"),
        ("x @ x.whl", "wheel"),
        ("x @ git+file:///srv/x", "wheel"),
        ("x @ git+https://h/x", "<commit>"),
        ("x @ git+https://h/x@main", "<commit>"),
        ("x @ git+https://h/x@0123456", "<commit>"),
        (f"x @ hg+https://h/x@{COMMIT}", "git+https"),
        ("https://h/x.whl", "name @ URL"),
        (f"git+https://h/x@{COMMIT}", "name @ URL"),
        ("numpy=>1", "numpy>=1.26"),
        ("numpy, pandas", "numpy>=1.26"),
        (",", "numpy>=1.26"),
    ],
)
def test_what_other_nodes_could_not_install_is_refused_with_a_way_out(
    entry: str, hint: str
) -> None:
    with pytest.raises(InvalidPackages) as caught:
        resolving.requirement_lines(f"six\n{entry}\n", where="requirements.txt")
    assert hint in caught.value.hint
    assert caught.value.where == "requirements.txt"
    assert repr(entry)[1:3] in caught.value.message


@pytest.mark.parametrize(
    "entry",
    [
        "x @ https://me:s3cret@h/x.whl",
        "x @ https://s3cret@h/x.whl",
        "x @ https://me:s3c/s3cret@h/x.whl",
        f"x @ git+https://s3cret@h/x@{COMMIT}",
        f"x @ git+ssh://git:s3cret@h/x@{COMMIT}",
        "https://me:s3cret@h/x.whl",
        "https://me:a,s3cret@h/x.whl",
        "--index-url=https://me:s3cret@h/simple",
        "-ihttps://me:s3cret@h/simple",
        "x @ file://me:s3cret@h/x.whl",
    ],
)
def test_credentials_are_refused_and_never_repeated(entry: str) -> None:
    with pytest.raises(InvalidPackages, match="credentials") as caught:
        resolving.requirement_lines([entry])
    assert "s3cret" not in f"{caught.value} {caught.value.to_dict()}"
    assert "UV_INDEX_<NAME>_PASSWORD" in caught.value.hint


def test_of_several_requirements_in_one_entry_the_wrong_one_is_named() -> None:
    with pytest.raises(InvalidPackages, match="'<2' is not a requirement"):
        resolving.requirement_lines("numpy,<2")


def test_pinned_urls_are_accepted() -> None:
    lines = (
        f"a @ git+https://h/a.git@{COMMIT}#subdirectory=b",
        f"b @ git+ssh://git@h/b@{COMMIT}",
        "c @ https://h:8443/c-1-py3-none-any.whl",
        "d @ https://[::1]:80/d-1-py3-none-any.whl",
    )
    assert resolving.requirement_lines(lines) == lines


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,6}[A-Za-z0-9])?", fullmatch=True)
versions = st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){0,2}", fullmatch=True)
specifiers = st.lists(st.builds("{}{}".format, st.sampled_from([">=", "<", "!=", "=="]), versions))
markers = st.sampled_from(["", "; python_version < '3.12'", " ; sys_platform=='linux'"])
extras = st.lists(names, max_size=2).map(lambda e: f"[{','.join(e)}]" if e else "")
requirements = st.builds("{}{}{}{}".format, names, extras, specifiers.map(",".join), markers)


@settings(deadline=None)  # long lists take long on a busy machine
@given(st.lists(requirements, max_size=12), st.randoms())
def test_canonical_requirements_are_a_fixed_point_whatever_the_order(
    lines: list[str], random: Any
) -> None:
    canonical = resolving.requirement_lines(lines)
    shuffled = [*lines, *lines]
    random.shuffle(shuffled)
    assert resolving.requirement_lines("\n".join(shuffled)) == canonical
    assert resolving.requirement_lines("\n".join(canonical)) == canonical
    assert {Requirement(line).specifier for line in canonical} == {
        Requirement(line).specifier for line in lines
    }


@given(st.text(max_size=40))
def test_any_text_is_requirements_or_one_clear_error(text: str) -> None:
    with contextlib.suppress(InvalidPackages):
        lines = resolving.requirement_lines(text)
        assert resolving.requirement_lines(lines) == lines


# -- Python


@pytest.mark.parametrize(
    "wanted", [None, "3", "3.11", "3.11.7", ">=3.10,<3.12", "==3.11.*", " 3.11"]
)
def test_a_python_that_admits_the_clusters_interpreter_is_accepted(wanted: str | None) -> None:
    resolving.check_python(wanted, TARGET, where="python")


@pytest.mark.parametrize("wanted", ["3.12", "3.1", "3.11.8", ">=3.12", "<3.11", "2"])
def test_another_python_is_refused_and_both_are_named(wanted: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolving.check_python(wanted, TARGET, where="python_version")
    assert caught.value.where == "python_version"
    assert wanted in caught.value.message
    assert "3.11.7" in caught.value.message
    assert "3.11" in caught.value.hint


@pytest.mark.parametrize("wanted", ["", "  ", "python3.11", "three", "3.11.7.1", "3.x"])
def test_a_python_that_is_no_version_is_refused(wanted: str) -> None:
    with pytest.raises(InvalidInput, match="neither") as caught:
        resolving.check_python(wanted, TARGET, where="python")
    assert "3.11.7" in caught.value.hint


# -- projects


def test_a_package_list_becomes_a_project_that_is_never_installed_itself() -> None:
    text = resolving.project_text(
        definition(packages=("six", "Pandas<3; os_name=='posix'")), TARGET
    )
    assert tomllib.loads(text) == {
        "project": {
            "name": "ray-envs-environment",
            "version": "0",
            "requires-python": "==3.11.*",
            "dependencies": ['pandas<3; os_name == "posix"', "six"],
        },
        "dependency-groups": {"ray-envs": ["ray==2.60.0"]},
        "tool": {"uv": {"package": False}},
    }
    assert resolving.project_text(definition(), TARGET).count("dependencies = []") == 1


OWN = """\
# mine
[project]
name = "x"  # why
version = "1"
requires-python = ">=3.10"
dependencies = [
    # a reason
    "six",  # another
]

[tool.ruff]
line-length = 100

[project.optional-dependencies]
Fast_One = ["ujson"]

[dependency-groups]
check = ["iniconfig", { include-group = "more" }]
more = []
Ray_Envs = ["ray==1.0"]

[tool.uv.sources]
six = [{ index = "mine" }]
"""


def test_a_projects_own_text_is_kept_apart_from_what_must_be_ours() -> None:
    text = resolving.project_text(
        definition(OWN, packages=("idna", "six"), extras=("fast-one",), groups=("Check",)), TARGET
    )
    wanted = tomllib.loads(OWN)
    wanted["project"] |= {"requires-python": "==3.11.*", "dependencies": ["six", "idna"]}
    wanted["dependency-groups"]["Ray_Envs"] = ["ray==2.60.0"]
    wanted["tool"]["uv"]["package"] = False
    assert tomllib.loads(text) == wanted
    assert {"# mine", "# why", "# a reason", "# another"} <= {
        line[line.find("#") :] for line in text.splitlines()
    }


LAYOUTS = [
    OWN,
    OWN.replace("\n", "\r\n"),
    project(),
    '[project]\nname = "x"\nversion = "1"\n[project.urls]\na = "b"',
    'project = {name="x", version="1"}\n',
    'project.name = "x"\nproject.version = "1"\ntool.uv.offline = true\n',
    '[project]\nname = "x"\ndynamic = ["version"]\n[tool]\nuv.offline = true\n[tool.z]\n',
    "[tool.uv]\npackage = true\n[[tool.uv.index]]\nurl = 'https://h/s'\n[tool.z]\n" + project(),
    "[tool.z]\n" + project("[tool.y]\n[build-system]\nrequires = []\n[tool.uv]\n[tool.q]\na = 1\n"),
    project('[tool.uv]\npackage = 0\n[dependency-groups]\nray-envs = ["ray"]\n'),
]


@pytest.mark.parametrize("text", LAYOUTS)
def test_what_was_exported_comes_back_byte_for_byte(text: str) -> None:
    once = resolving.project_text(definition(text, packages=("idna",)), TARGET)
    assert once != text
    assert "idna" in resolving.declared(once)
    assert tomllib.loads(once)["tool"]["uv"]["package"] is False
    assert resolving.project_text(definition(once), TARGET) == once
    assert resolving.project_text(definition(once, packages=("idna",)), TARGET) == once


def test_a_generated_project_comes_back_byte_for_byte() -> None:
    text = resolving.project_text(definition(packages=("idna", "six>=1,<2")), TARGET)
    assert resolving.project_text(definition(text), TARGET) == text


def test_a_dynamic_version_is_fixed_because_its_build_backend_is_elsewhere() -> None:
    own = '[project]\nname = "x"\ndynamic = ["version", "readme"]\n'
    data = tomllib.loads(resolving.project_text(definition(own), TARGET))
    assert (data["project"]["version"], data["project"]["dynamic"]) == ("0", ["readme"])


@pytest.mark.parametrize(
    ("text", "said", "where"),
    [
        ("[project]\nname = x\n", "line 2", "pyproject.toml"),
        ('[tool.x]\na = "b"\n', "[project]", "pyproject.toml"),
        ('project = "x"\n', "no table", "pyproject.toml"),
        (project('dynamic = ["dependencies"]\n'), "dynamic", "project"),
        (project('dynamic = ["optional-dependencies"]\n'), "dynamic", "project"),
        (project('requires-python = ">=3.12"\n'), "3.11.7", "project.requires-python"),
        (project('requires-python = "new"\n'), "neither", "project.requires-python"),
        (project('[tool.uv.sources]\na = { path = "../a" }\n'), "local", "tool.uv.sources.a"),
        (project("[tool.uv.sources]\na = { workspace = true }\n"), "local", "tool.uv.sources.a"),
        (project('[tool.uv.sources]\na = [{ path = "a" }]\n'), "local", "tool.uv.sources.a"),
        (project('[tool.uv.sources]\na = { git = "https://h/a" }\n'), "commit", "sources.a"),
        (
            project('[tool.uv.sources]\na = { git = "https://h/a", rev = "v1" }'),
            "commit",
            "sources",
        ),
        (project('[tool.uv.sources]\na = ["x"]\n'), "no table", "tool.uv.sources.a"),
        (project('[tool.uv.workspace]\nmembers = ["a"]\n'), "workspace", "tool.uv.workspace"),
        (project("[tool.uv]\nconflicts = []\n"), "conflicts", "tool.uv.conflicts"),
        (project("[[tool.uv.index]]\nurl = 'https://a:s3cret@h'\n"), "credentials", "tool.uv"),
        (project("[tool.uv]\nindex-url = 'https://s3cret@h'\n"), "credentials", "tool.uv"),
        (project("[tool.uv]\nextra-index-url=['https://s3cret@h']\n"), "credentials", "tool.uv"),
        (project("[tool.uv.sources]\na={git='https://s3cret@h'}\n"), "credentials", "tool.uv"),
        (project(dependencies='"six"'), "no list", "project.dependencies"),
        (project(dependencies="[{}]"), "no string", "project.dependencies"),
        (project("[dependency-groups]\na = [1]\n"), "no string", "dependency-groups.a"),
        (project("[tool]\nuv = 1\n"), "no table", "pyproject.toml"),
    ],
)
def test_a_project_that_other_nodes_could_not_reproduce_is_refused(
    text: str, said: str, where: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolving.project_text(definition(text), TARGET)
    assert said in caught.value.message
    assert where in caught.value.where
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (project(dependencies='["a @ file:///a"]'), "project.dependencies"),
        (project(dependencies='["a,b"]'), "project.dependencies"),
        (project('optional-dependencies.z = ["./a"]\n'), "project.optional-dependencies.z"),
        (project('[dependency-groups]\nz = ["a @ git+https://h/a"]\n'), "dependency-groups.z"),
    ],
)
def test_dependencies_of_a_project_obey_the_rules_of_requirements(text: str, where: str) -> None:
    with pytest.raises(InvalidPackages) as caught:
        resolving.project_text(definition(text), TARGET)
    assert caught.value.where == f"pyproject.toml: {where}"


def test_a_source_that_is_pinned_is_accepted() -> None:
    text = project(f'[tool.uv.sources]\nsix = {{ git = "https://h/six", rev = "{COMMIT}" }}\n')
    assert COMMIT in resolving.project_text(definition(text), TARGET)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"extras": ("fast-on",)}, "did you mean 'fast-one'?"),
        ({"groups": ("chek",)}, "did you mean 'check'?"),
    ],
)
def test_an_unknown_extra_or_group_names_the_nearest(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(InvalidInput, match="unknown") as caught:
        resolving.project_text(definition(OWN, **options), TARGET)
    assert caught.value.hint == hint


def test_extras_and_pythons_are_checked_without_a_project_too() -> None:
    with pytest.raises(InvalidInput, match="unknown extra") as caught:
        resolving.project_text(definition(extras=("a",)), TARGET)
    assert caught.value.hint == "the project declares no extras"
    with pytest.raises(InvalidInput, match=r"3\.12"):
        resolving.project_text(definition(python="3.12"), TARGET)


def test_a_layout_that_cannot_be_edited_faithfully_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forgetful:
        def as_string(self) -> str:
            return project()

        def __contains__(self, name: str) -> bool:
            return True

        def __getitem__(self, name: str) -> Any:
            return Forgetful()

        def __setitem__(self, name: str, value: Any) -> None: ...

    monkeypatch.setattr(tomlkit, "parse", lambda text: Forgetful())
    with pytest.raises(InvalidInput, match="unusual"):
        resolving.project_text(definition(project(dependencies="[]")), TARGET)

    def confused(text: str) -> None:
        raise tomlkit.exceptions.ParseError(1, 1)

    monkeypatch.setattr(tomlkit, "parse", confused)
    with pytest.raises(InvalidInput, match="unusual"):
        resolving.project_text(definition(project()), TARGET)


def test_declared_shows_the_projects_own_words() -> None:
    assert resolving.declared(project(dependencies='["Six >= 1"]')) == ("Six >= 1",)
    assert resolving.declared("") == ()


# -- fingerprints and keys


def test_a_fingerprint_changes_with_what_decides_a_resolution_and_nothing_else() -> None:
    same = [
        definition(),
        definition(env_vars={"A": "1"}),
        definition(extras=("a",)),
        definition(groups=("a",)),
        definition(python="3.11"),
    ]
    assert len({resolving.fingerprint("p", None, each, TARGET) for each in same}) == 1
    other = [
        resolving.fingerprint("p", None, definition(), TARGET),
        resolving.fingerprint("q", None, definition(), TARGET),
        resolving.fingerprint("p", "", definition(), TARGET),
        resolving.fingerprint("p", None, definition(exclude_newer="2026-01-01"), TARGET),
        resolving.fingerprint("p", None, definition(), Target(python="3.11.8", ray="2.60.0")),
        resolving.fingerprint("p", None, definition(), Target(python="3.11.7", ray="2.60.1")),
    ]
    assert len(set(other)) == len(other)
    assert all(len(each) == 64 for each in other)


words = st.text(st.characters(codec="utf-8"), max_size=5)
packages = st.builds(Installed, name=words, version=words, pin=words, is_built=st.booleans())


@given(st.lists(packages), st.randoms())
def test_a_key_does_not_depend_on_the_order_of_packages(
    items: list[Installed], random: Any
) -> None:
    key = resolving.key_of(items, TARGET, LINUX)
    shuffled = list(items)
    random.shuffle(shuffled)
    assert resolving.key_of(iter(shuffled), TARGET, LINUX) == key
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


@given(
    st.lists(packages, min_size=1),
    st.data(),
    st.sampled_from(["name", "version", "pin", "python", "ray", "platform", "missing"]),
    words.filter(bool),
)
def test_a_key_changes_with_everything_that_is_installed(
    items: list[Installed], data: st.DataObject, what: str, more: str
) -> None:
    index = data.draw(st.integers(0, len(items) - 1))
    changed, target, where = list(items), TARGET, LINUX
    if what in ("python", "ray"):
        target = TARGET.model_copy(update={what: getattr(TARGET, what) + more})
    elif what == "platform":
        where = LINUX.model_copy(update={"name": LINUX.name + more})
    elif what == "missing":
        del changed[index]
    else:
        new = getattr(items[index], what) + more
        changed[index] = items[index].model_copy(update={what: new})
    assert resolving.key_of(changed, target, where) != resolving.key_of(items, TARGET, LINUX)


def test_a_key_knows_where_a_name_ends() -> None:
    one, two = (Installed(name=n, version=v, pin="p") for n, v in (("ab", "c"), ("a", "bc")))
    assert resolving.key_of([one], TARGET, LINUX) != resolving.key_of([two], TARGET, LINUX)


def test_a_lock_is_known_by_the_hash_of_its_text() -> None:
    assert resolving.lock_sha256("") == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


# -- locks

RAYS = """attrs certifi charset-normalizer click filelock idna jsonschema jsonschema-specifications
msgpack packaging protobuf pyyaml ray referencing requests rpds-py typing-extensions urllib3"""


def test_a_lock_installs_what_its_markers_say_for_the_platform() -> None:
    linux = by_name(resolving.installed(FORKS, LINUX))
    mac = by_name(resolving.installed(FORKS, MAC))
    assert set(linux) == set(mac) == {*RAYS.split(), "docopt", "numpy", "pysocks"}
    assert (linux["numpy"].version, mac["numpy"].version) == ("2.4.6", "1.26.4")
    assert list(linux) == sorted(linux)
    assert [item.name for item in linux.values() if item.is_built] == ["docopt"]


def test_extras_and_groups_are_installed_only_where_they_are_asked_for() -> None:
    base = set(by_name(resolving.installed(FORKS, LINUX)))

    def added(**options: Any) -> set[str]:
        return set(by_name(resolving.installed(FORKS, LINUX, **options))) - base

    assert added(extras=["Fast"]) == {"ujson"}
    assert added(extras=["plot"]) == {"cycler", "ujson"}
    assert added(groups=["more"]) == {"pluggy"}
    assert added(extras=["fast"], groups=["check"]) == {"ujson", "iniconfig", "pluggy"}


def test_the_pin_is_the_hash_of_the_file_that_uv_takes() -> None:
    packages = {p["name"]: p for p in tomllib.loads(FORKS)["package"]}
    linux, mac = (by_name(resolving.installed(FORKS, each)) for each in (LINUX, MAC))
    (certifi,) = packages["certifi"]["wheels"]
    assert linux["certifi"].pin == mac["certifi"].pin == certifi["hash"]
    assert linux["docopt"].pin == packages["docopt"]["sdist"]["hash"]
    for found, part in ((linux, "x86_64"), (mac, "macosx_11_0_arm64")):
        (wheel,) = [w for w in packages["msgpack"]["wheels"] if part in w["url"]]
        assert found["msgpack"].pin == wheel["hash"]


def test_urls_are_pinned_by_the_hash_of_their_file() -> None:
    found = by_name(resolving.installed(URLS, LINUX))
    assert (found["docopt"].is_built, found["iniconfig"].is_built) == (True, False)
    assert all(f'hash = "{item.pin}"' in URLS for item in found.values())


def lock_of(package: str, edge: str = '{ name = "a" }') -> str:
    return (
        '[[package]]\nname = "root"\nsource = { editable = "." }\n'
        f"dependencies = [{edge}]\n{package}"
    )


def one(source: str, more: str = "") -> str:
    return lock_of(f'[[package]]\nname = "a"\nversion = "1"\nsource = {{ {source} }}\n{more}')


@pytest.mark.parametrize(
    ("source", "pin"),
    [
        (f'git = "https://h/a?rev={COMMIT}#{COMMIT}"', f"git:{COMMIT}"),
        (f'git = "https://h/a?subdirectory=b&rev=x#{COMMIT}"', f"git:{COMMIT}:subdirectory=b"),
        ('url = "https://h/a.zip#sha256=00"', "sha256:00"),
    ],
)
def test_what_has_no_files_is_pinned_by_its_source(source: str, pin: str) -> None:
    (item,) = resolving.installed(one(source), LINUX)
    assert item == Installed(name="a", version="1", pin=pin, is_built=True)


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ('registry = "https://h"', 'wheels = [{ url = "a-1-py3-none-win32.whl", hash = "w" }]'),
        ('registry = "https://h"', 'wheels = [{ url = "a-1-py3-none-any.whl" }]'),
        ('registry = "https://h"', 'sdist = { url = "a-1.tar.gz" }'),
        ('directory = "../a"', ""),
    ],
)
def test_a_package_without_a_pinned_file_for_the_platform_is_named(source: str, files: str) -> None:
    with pytest.raises(ResolutionFailed) as caught:
        resolving.installed(one(source, files), LINUX)
    assert "a 1" in caught.value.message
    assert LINUX.name in caught.value.message


def test_the_best_wheel_is_the_most_specific_then_the_latest_build() -> None:
    names = [
        'url = "https://h/a-1-py3-none-any.whl"',
        'url = "https://h/a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"',
        'filename = "a-1-2-cp311-cp311-manylinux_2_28_x86_64.whl"',
        'path = "wheels/a-1-10-cp311-cp311-manylinux_2_28_x86_64.whl"',
        'url = "https://h/a-1-cp311-cp311-win_amd64.whl"',
        'url = "https://h/a-1-x-cp311-cp311-manylinux_2_36_x86_64.whl"',
        'url = "https://h/a-1-cp312-abi3-manylinux_2_36_x86_64.whl"',
        'url = "https://h/a-1-9-cp311-cp311-manylinux_2_28_x86_64.whl"',
        'url = "https://h/a-1-99-cp311-cp311-manylinux_2_17_x86_64.whl"',
        'url = "https://h/a-1-99-py3-none-any.whl"',
    ]
    files = ", ".join(f'{{ {name}, hash = "{index}" }}' for index, name in enumerate(names))
    (item,) = resolving.installed(one('registry = "https://h"', f"wheels = [{files}]"), LINUX)
    assert (item.pin, item.is_built) == ("3", False)


def test_an_encoded_wheel_name_is_read_as_what_it_is() -> None:
    wheel = 'wheels = [{ url = "https://h/a-1%2Bcpu-cp311-cp311-linux_x86_64.whl", hash = "w" }]'
    (item,) = resolving.installed(one('registry = "https://h"', wheel), LINUX)
    assert item.pin == "w"


def test_an_edge_chooses_among_packages_of_one_name_by_source_or_by_markers() -> None:
    def package(index: str, marker: str) -> str:
        return (
            f'[[package]]\nname = "a"\nversion = "1"\nsource = {{ registry = "{index}" }}\n'
            f'resolution-markers = ["{marker}"]\nsdist = {{ hash = "{index}" }}\n'
        )

    both = package("one", "sys_platform == 'darwin'") + package("two", "sys_platform == 'linux'")
    edge = '{ name = "a", version = "1", source = { registry = "one" } }'
    assert [p.pin for p in resolving.installed(lock_of(both, edge), LINUX)] == ["one"]
    assert [p.pin for p in resolving.installed(lock_of(both), LINUX)] == ["two"]
    assert [p.pin for p in resolving.installed(lock_of(both), MAC)] == ["one"]


def test_circles_and_edges_back_to_the_project_end() -> None:
    back = 'dependencies = [{ name = "a", extra = ["x"] }, { name = "root" }]\n'
    more = f'{back}sdist = {{ hash = "s" }}\n[package.optional-dependencies]\nx = [{{name="a"}}]\n'
    assert len(resolving.installed(one('registry = "https://h"', more), LINUX)) == 1


@pytest.mark.parametrize(
    ("lock", "said"),
    [("", "no project"), ("[[package]\n", "TOML"), (lock_of(""), "a is missing")],
)
def test_what_is_no_lock_is_refused(lock: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        resolving.installed(lock, LINUX)
    assert caught.value.where == "uv.lock"


def test_a_large_lock_is_read_within_milliseconds() -> None:
    wheels = ", ".join(
        f'{{ url = "https://h/p-1-cp3{python}-cp3{python}-{part}.whl", hash = "{python}{part}" }}'
        for python in range(8, 15)
        for part in ("manylinux_2_17_x86_64.manylinux2014_x86_64", "win_amd64", "macosx_11_0_arm64")
    )
    edges = ", ".join(f'{{ name = "p{i}", marker = "os_name != \'{i}\'" }}' for i in range(150))
    text = lock_of(
        "".join(
            f'[[package]]\nname = "p{i}"\nversion = "1"\nsource = {{ registry = "x" }}\n'
            f"wheels = [{wheels}]\n"
            for i in range(150)
        ),
        edges,
    )

    def seconds(work: Callable[[], Any]) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    parsing = min(seconds(lambda: tomllib.loads(text)) for _ in range(3))
    whole = min(seconds(lambda: resolving.installed(text, LINUX)) for _ in range(3))
    assert len(resolving.installed(text, LINUX)) == 150
    # Measured 0.02 s; the limit leaves room for a busy machine.
    assert whole - parsing < 0.2


# -- moved pins


def test_adding_ray_moves_a_pin_and_it_is_named() -> None:
    assert resolving.moved_pins(BEFORE, AFTER, LINUX) == ("packaging 21.0 -> 26.3",)
    assert resolving.moved_pins(AFTER, AFTER, LINUX) == ()
    assert resolving.moved_pins("", AFTER, LINUX) == ()


def test_a_fork_for_another_platform_is_no_moved_pin() -> None:
    assert resolving.moved_pins(FORKS, FORKS, LINUX) == ()
    numpy_moved = FORKS.replace('"2.4.6"', '"2.4.7"')
    assert resolving.moved_pins(FORKS, numpy_moved, LINUX) == ("numpy 2.4.6 -> 2.4.7",)
    assert resolving.moved_pins(FORKS, numpy_moved, MAC) == ()


def test_pins_of_extras_and_groups_count_too() -> None:
    after = FORKS.replace('version = "2.3.1"', 'version = "2.4"')  # iniconfig, of a group
    assert resolving.moved_pins(FORKS, after, LINUX) == ("iniconfig 2.3.1 -> 2.4",)


def test_every_error_of_a_text_is_one_of_ours() -> None:
    calls: list[Callable[[], Any]] = [
        lambda: resolving.declared("["),
        lambda: resolving.moved_pins("[", AFTER, LINUX),
        lambda: resolving.moved_pins(BEFORE, "[", LINUX),
    ]
    for call in calls:
        with pytest.raises(RayEnvsError):
            call()
