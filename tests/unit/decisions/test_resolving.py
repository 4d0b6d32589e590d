"""From what was asked to what uv resolves: accepted, refused by name, equal for equal wishes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import tomlkit

from ray_envs.decisions import resolving
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import Target
from ray_envs.specs import Definition

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

TARGET = Target(python="3.11.7", ray="2.60.0")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def definition(pyproject: str | None = None, **options: Any) -> Definition:
    return Definition(pyproject=pyproject, **options)


def project(body: str = "", dependencies: str = '["six"]') -> str:
    return f'[project]\nname = "x"\nversion = "1"\ndependencies = {dependencies}\n{body}'


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
        ('project = "x"\n', "not a table", "pyproject.toml"),
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
        (project('[tool.uv.sources]\na = ["x"]\n'), "not a table", "tool.uv.sources.a"),
        (project('[tool.uv.workspace]\nmembers = ["a"]\n'), "workspace", "tool.uv.workspace"),
        (project("[tool.uv]\nconflicts = [[]]\n"), "two", "tool.uv.conflicts[0]"),
        (project("[[tool.uv.index]]\nurl = 'https://a:s3cret@h'\n"), "credentials", "tool.uv"),
        (project("[tool.uv]\nindex-url = 'https://s3cret@h'\n"), "credentials", "tool.uv"),
        (project("[tool.uv]\nextra-index-url=['https://s3cret@h']\n"), "credentials", "tool.uv"),
        (project("[tool.uv.sources]\na={git='https://s3cret@h'}\n"), "credentials", "tool.uv"),
        (project(dependencies='"six"'), "not a list", "project.dependencies"),
        (project(dependencies="[{}]"), "not a string", "project.dependencies"),
        (project("[dependency-groups]\na = [1]\n"), "not a string", "dependency-groups.a"),
        (project("[tool]\nuv = 1\n"), "not a table", "pyproject.toml"),
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


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "setup.cfg"),
        ("[tool.black]\na = 1\n", "setup.cfg"),
        (
            '[tool.poetry]\nname = "a"\n[build-system]\nrequires = ["poetry-core"]\n',
            "poetry export",
        ),
        ('[build-system]\nrequires = ["setuptools"]\n', "add one with name"),
    ],
)
def test_a_file_without_a_project_says_what_to_do_about_what_it_has(text: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=r"no \[project\] table") as caught:
        resolving.project_text(definition(text), TARGET)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("groups", "said", "where"),
    [
        ('b = [{ include-group = "cheek" }]\ncheck = []', "'cheek'", "dependency-groups.b"),
        ('b = [{ include-group = "b" }]', "b -> b", "dependency-groups.b"),
        (
            'a = [{ include-group = "b" }]\nb = [{ include-group = "A" }]',
            "a -> b -> a",
            "dependency-groups.a",
        ),
        ("b = [{ include = 1 }]", "neither a requirement nor", "dependency-groups.b"),
        ('b = []\n[tool.uv]\ndefault-groups = ["bb"]', "'bb'", "tool.uv.default-groups"),
        ("b = []\n[tool.uv]\ndefault-groups = 1", "neither a list", "tool.uv.default-groups"),
        (
            'b = [{ include-group = "c" }]\nc = ["six"]\n[tool.uv.dependency-groups]\n'
            'C = { requires-python = ">=3.13" }',
            "3.11.7",
            "tool.uv.dependency-groups.c.requires-python",
        ),
    ],
)
def test_groups_that_uv_would_refuse_or_leave_out_are_refused(
    groups: str, said: str, where: str
) -> None:
    text = project(f"[dependency-groups]\n{groups}\n")
    with pytest.raises(InvalidInput) as caught:
        resolving.project_text(definition(text, groups=("b",)), TARGET)
    assert said in caught.value.message
    assert caught.value.where == f"pyproject.toml: {where}"
    assert caught.value.hint


@pytest.mark.parametrize(
    "groups",
    [
        'b = []\nc = ["six"]\n[tool.uv.dependency-groups]\nc = { requires-python = ">=3.13" }',
        'b = ["six"]\n[tool.uv.dependency-groups]\nb = { requires-python = ">=3.11" }',
        'b = []\n[tool.uv]\ndefault-groups = ["B"]',
        'b = []\n[tool.uv]\ndev-dependencies = []\ndefault-groups = ["B", "dev"]',
        'b = []\n[tool.uv]\ndefault-groups = "all"',
        'b = [{ include-group = "c" }, { include-group = "C" }]\nc = []',
    ],
)
def test_groups_that_uv_installs_are_accepted(groups: str) -> None:
    text = project(f"[dependency-groups]\n{groups}\n")
    assert resolving.project_text(definition(text, groups=("b",)), TARGET)


def test_groups_that_include_many_others_are_checked_at_once() -> None:
    rows = [
        f'g{i} = [{{ include-group = "g{i + 1}" }}, {{ include-group = "g{i + 1}" }}]'
        for i in range(2_000)
    ]
    text = project("\n".join(["[dependency-groups]", *rows, "g2000 = []"]))
    assert resolving.project_text(definition(text, groups=("g0",)), TARGET)


CHOICES = project(
    """[project.optional-dependencies]
cpu = ["idna==2.10"]
gpu = ["idna==3.7"]
[tool.uv]
conflicts = [[{ extra = "cpu" }, { extra = "gpu" }]]
"""
)


def test_a_project_whose_extras_exclude_each_other_gets_one_variant_for_each() -> None:
    texts = {
        resolving.project_text(definition(CHOICES, extras=(e,)), TARGET) for e in ("cpu", "gpu")
    }
    (text,) = texts
    assert tomllib.loads(text)["tool"]["uv"]["conflicts"] == [[{"extra": "cpu"}, {"extra": "gpu"}]]
    assert resolving.build_options(text) == ""
    with pytest.raises(InvalidInput, match="'cpu' and extra 'gpu' exclude each other") as caught:
        resolving.project_text(definition(CHOICES, extras=("gpu", "CPU")), TARGET)
    assert (caught.value.where, "variant for each" in caught.value.hint) == ("extras", True)


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
    with pytest.raises(InvalidInput, match="TOML"):
        resolving.declared("[")


# -- fingerprints


def fingerprint_of(
    project: str,
    user_lock: str | None,
    asked: Definition,
    target: Target = TARGET,
    index_settings: Mapping[str, str] | None = None,
) -> str:
    return resolving.fingerprint(
        project, user_lock, asked, target, index_settings=index_settings or {}
    )


def test_a_fingerprint_changes_with_what_decides_a_resolution_and_nothing_else() -> None:
    same = [
        definition(),
        definition(env_vars={"A": "1"}),
        definition(extras=("a",)),
        definition(groups=("a",)),
        definition(python="3.11"),
    ]
    assert len({fingerprint_of("p", None, each) for each in same}) == 1
    other = [
        fingerprint_of("p", None, definition()),
        fingerprint_of("q", None, definition()),
        fingerprint_of("p", "", definition()),
        fingerprint_of("p", None, definition(exclude_newer="2026-01-01")),
        fingerprint_of("p", None, definition(only_binary=True)),
        fingerprint_of("p", None, definition(), Target(python="3.11.8", ray="2.60.0")),
        fingerprint_of("p", None, definition(), Target(python="3.11.7", ray="2.60.1")),
        fingerprint_of("p", None, definition(), index_settings={"UV_INDEX": "https://h"}),
        fingerprint_of("p", None, definition(), index_settings={"UV_DEFAULT_INDEX": "https://h"}),
        fingerprint_of("p", None, definition(), index_settings={"UV_INDEX": "https://i"}),
    ]
    assert len(set(other)) == len(other)
    assert all(len(each) == 64 for each in other)


def test_a_fingerprint_does_not_depend_on_the_order_of_settings() -> None:
    settings = {"UV_INDEX": "https://h", "UV_RESOLUTION": "lowest"}
    turned = dict(reversed(settings.items()))
    one, two = (
        fingerprint_of("p", None, definition(), index_settings=each) for each in (settings, turned)
    )
    assert one == two


# -- build options


@pytest.mark.parametrize(
    "entry",
    [
        "no-binary = true",
        'no-binary-package = ["six"]',
        "no-build = true",
        'no-build-package = ["six"]',
        "no-build-isolation = true",
        'no-build-isolation-package = ["six"]',
        'config-settings = { a = "b" }',
        'config-settings-package.six = { a = "b" }',
        'extra-build-dependencies.six = ["setuptools<60"]',
        'extra-build-variables.six = { A = "b" }',
        'build-constraint-dependencies = ["setuptools<60"]',
        "from-the-future = 2026-01-01",
    ],
)
def test_what_changes_how_a_lock_is_installed_is_a_build_option(entry: str) -> None:
    plain = project("[tool.uv]\npackage = false\n")
    text = plain + entry + "\n"
    assert resolving.build_options(plain) == ""
    assert list(tomllib.loads(text)["tool"]["uv"]) == ["package", entry.split()[0].split(".")[0]]
    assert entry.split()[0].split(".")[0] in resolving.build_options(text)
    assert "package" not in json.loads(resolving.build_options(text))


def test_what_chooses_a_lock_or_says_how_uv_works_is_no_build_option() -> None:
    text = project("""[tool.uv]
package = false
managed = true
required-version = ">=0.13"
cache-dir = "/c"
cache-keys = [{ file = "a" }]
concurrent-builds = 1
compile-bytecode = true
link-mode = "copy"
index-strategy = "first-index"
extra-index-url = ["https://h"]
no-index = false
keyring-provider = "disabled"
http-proxy = "http://h"
resolution = "highest"
prerelease = "allow"
fork-strategy = "fewest"
exclude-newer = 2026-01-01T00:00:00Z
exclude-newer-package = { six = "2026-01-01" }
python-preference = "system"
default-groups = "all"
dev-dependencies = []
constraint-dependencies = ["six<2"]
override-dependencies = ["six<2"]
environments = ["sys_platform == 'linux'"]
required-environments = []

[[tool.uv.index]]
url = "https://h"

[tool.uv.sources]
six = { index = "mine" }
""")
    assert resolving.build_options(text) == ""
    assert resolving.build_options("") == ""


def test_equal_build_options_have_equal_texts_whatever_their_order_and_layout() -> None:
    one = '[tool.uv]\nno-build = true\nconfig-settings = { a = "1", b = "2" }\n'
    two = '[tool]\nuv.config-settings = { b = "2", a = "1" }\nuv.no-build = true\n'
    assert resolving.build_options(one) == resolving.build_options(two) != ""
    assert resolving.build_options(one) == '{"config-settings":{"a":"1","b":"2"},"no-build":true}'
