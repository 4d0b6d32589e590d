"""Local sources are found, and wheels take their place, in any layout of the file."""

from __future__ import annotations

import io
import zipfile

import pytest

from ray_envs.decisions import local_sources, local_wheels
from ray_envs.decisions.local_sources import LocalSource, Replacement
from ray_envs.decisions.local_wheels import Described
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.errors import InvalidInput


def wheel(name: str, *, version: str = "1.0", extras: tuple[str, ...] = ()) -> Described:
    packed = io.BytesIO()
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
    filename = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    return local_wheels.described(filename, packed.getvalue(), where="here")


# -- wheels ----------------------------------------------------------------------------------------


def test_the_order_and_the_times_of_files_do_not_count() -> None:
    def packed(*names: str, year: int) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), name * 100)
        return local_wheels.normalised(content.getvalue(), where="")

    assert packed("a", "b", year=1990) == packed("b", "a", year=2020)
    assert packed("a", year=1990) != packed("b", year=1990)


@pytest.mark.parametrize(
    ("filename", "content", "message"),
    [
        ("x-1.0-py3-none-any.whl", b"", "no wheel"),
        ("x.whl", b"", "Invalid wheel filename"),
        ("y-1.0-py3-none-any.whl", wheel("x").wheel.content, "does not name it"),
    ],
)
def test_what_is_no_wheel_is_refused(filename: str, content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        local_wheels.described(filename, content, where="here")


def test_a_content_must_be_the_described_one() -> None:
    one = wheel("x").wheel
    local_wheels.check_content(one, one.content or b"")
    with pytest.raises(InvalidInput, match="is not what its definition says"):
        local_wheels.check_content(one, wheel("x", extras=("a",)).wheel.content or b"")


def test_places_in_an_export_go_back_to_what_they_were() -> None:
    one, other = wheel("x").wheel, wheel("x-y").wheel
    text = f'a = "{one.path}"\nb = "{other.path}"\n'
    exported = local_wheels.in_export(text, [one, other])
    assert exported == f'a = "wheels/{one.filename}"\nb = "wheels/{other.filename}"\n'
    assert local_wheels.from_export(exported, [one, other]) == text
    assert local_wheels.in_export(f"/r/wheels/{one.sha256}/{one.filename} \\\n", [one]) == (
        f"wheels/{one.filename} \\\n"
    )


# -- sources ---------------------------------------------------------------------------------------


def test_local_sources_are_found_and_others_are_not() -> None:
    data = parsed_toml(
        '[tool.uv.sources]\nA_b = { path = "../a", editable = true }\nw = { workspace = true }\n'
        'g = { git = "https://h/g" }\nm = [{ path = "x.whl", marker = "a" }, { index = "i" }]\n',
        where="",
    )
    assert local_sources.local_sources(data, where="") == [
        LocalSource("a-b", 0, "../a", True),
        LocalSource("w", 0, None, False),
        LocalSource("m", 0, "x.whl", False),
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("tool = 3", "tool"),
        ("[tool]\nuv = 3", "tool.uv"),
        ("[tool.uv]\nsources = []", "tool.uv.sources"),
        ('project = "x"', "project"),
        ("[project]\ndependencies = 3", "project.dependencies"),
        ("[tool.uv]\nworkspace = 3", "tool.uv.workspace"),
        ("[tool.uv.workspace]\nmembers = 3", "tool.uv.workspace.members"),
        ("[tool.uv]\nindex = 3", "tool.uv.index"),
    ],
)
def test_an_entry_of_a_wrong_type_is_named(text: str, place: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        local_sources.check_shapes(parsed_toml(text, where=""), where="p")
    assert caught.value.where == f"p: {place}"


@pytest.mark.parametrize(
    ("text", "has_setup_files", "is_package"),
    [
        ("[project]\n", False, False),
        ("[project]\n", True, False),
        ("[build-system]\n", False, True),
        ("[build-system]\n[tool.uv]\npackage = false\n", False, False),
        ("[project]\n[tool.uv]\npackage = true\n", False, True),
        ("", True, True),
    ],
)
def test_uv_decides_what_is_a_package(text: str, has_setup_files: bool, is_package: bool) -> None:
    data = parsed_toml(text, where="")
    assert local_sources.is_package(data, has_setup_files=has_setup_files) is is_package


LAYOUTS = (
    '[project]\nname = "app"  # mine\nversion = "1"\ndependencies = ["lib"]\n'
    '[tool.uv.sources]\nlib = { path = "../lib" }\n',
    '[project]\nname = "app"  # mine\nversion = "1"\ndependencies = ["lib"]\n'
    '[tool.uv.sources.lib]\npath = "../lib"\neditable = true\n',
    'project.name = "app"  # mine\nproject.version = "1"\nproject.dependencies = ["lib"]\n'
    'tool.uv.sources.lib.path = "../lib"\n',
    '[tool]\nuv = { sources = { lib = { path = "../lib" } } }\n'
    '[project]\nname = "app"  # mine\nversion = "1"\ndependencies = ["lib"]\n',
)


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_wheel_takes_the_place_of_a_source_in_any_layout(text: str) -> None:
    built = wheel("lib")
    new = Replacement(wheels={LocalSource("lib", 0, "../lib", False): built}, names=("lib",))
    data = parsed_toml(local_sources.replaced(text, new, where=""), where="")
    assert data["tool"]["uv"]["sources"] == {"lib": {"path": built.wheel.path}}
    assert data["tool"]["uv"]["constraint-dependencies"] == ["lib"]
    assert data["project"]["dependencies"] == ["lib"]


def test_conditions_stay_and_a_workspace_goes() -> None:
    text = (
        '[project]\nname = "app"\nversion = "1"\n[tool.uv.workspace]\nmembers = ["x"]\n'
        '[tool.uv.sources]\nlib = [{ path = "a", marker = "m" }, { index = "i" }]\n'
    )
    built = wheel("lib")
    new = Replacement(
        wheels={LocalSource("lib", 0, "a", False): built}, names=("lib",),
        workspace={"workspace": {}, "index": [{"name": "i", "url": "u"}], "package": True},
    )  # fmt: skip
    uv = parsed_toml(local_sources.replaced(text, new, where=""), where="")["tool"]["uv"]
    assert uv["sources"]["lib"] == [{"path": built.wheel.path, "marker": "m"}, {"index": "i"}]
    assert uv["index"] == [{"name": "i", "url": "u"}]
    assert "workspace" not in uv
    assert "package" not in uv


def test_a_project_that_is_installed_becomes_a_requirement_of_the_environment() -> None:
    text = (
        '[project]\nname = "My_App"\ndynamic = ["version", "dependencies"]\n'
        '[project.optional-dependencies]\nall = ["my-app[fast]"]\n'
        '[tool.uv]\nconflicts = [[{ package = "my-app", extra = "a" }, { extra = "b" }]]\n'
    )
    built = wheel("my-app", extras=("all", "fast"))
    new = Replacement(wheels={}, names=("my-app",), project=built)
    data = parsed_toml(local_sources.replaced(text, new, where=""), where="")
    assert data["project"]["name"] == local_sources.ENVIRONMENT
    assert data["project"]["dependencies"] == ["my-app"]
    assert data["project"]["dynamic"] == ["version"]
    assert data["project"]["optional-dependencies"] == {
        "all": ["my-app[fast]"], "fast": ["my-app[fast]"],
    }  # fmt: skip
    assert data["tool"]["uv"]["conflicts"] == [[{"extra": "a"}, {"extra": "b"}]]
    assert data["tool"]["uv"]["sources"] == {"my-app": {"path": built.wheel.path}}


def test_what_a_local_package_requires_from_elsewhere_is_told_or_refused() -> None:
    uv = {"sources": {"T_x": {"index": "i"}, "unused": {"git": "g"}, "lib": {"path": "p"}}}
    data = {"project": {"dependencies": ["t.x>=1 ; python_version > '3'", "lib"]}}
    requirements, sources = local_sources.other_sources(data, uv, where="")
    assert requirements == ["t.x>=1 ; python_version > '3'"]
    assert sources == {"t-x": [{"index": "i"}]}
    only_extra = {"project": {"optional-dependencies": {"more": ["t-x"]}}}
    with pytest.raises(InvalidInput, match="an extra requires t-x"):
        local_sources.other_sources(only_extra, uv, where="")


def test_a_source_of_the_workspace_keeps_its_conditions_and_its_neighbours() -> None:
    built = wheel("lib")
    given = [{"path": "lib", "marker": "m"}, {"index": "i", "marker": "n"}]
    new = Replacement(
        wheels={LocalSource("lib", 0, "lib", False): built},
        names=("lib",),
        workspace={"sources": {"lib": given}},
    )
    text = local_sources.replaced('[project]\nname = "app"\n', new, where="")
    assert parsed_toml(text, where="")["tool"]["uv"]["sources"]["lib"] == [
        {"path": built.wheel.path, "marker": "m"},
        {"index": "i", "marker": "n"},
    ]


@pytest.mark.parametrize(
    "files",
    [
        {"x-1.0.dist-info/METADATA": "Name: x\n" + "a" * 5_000_000},
        {"deep/x-1.0.dist-info/METADATA": "Name: x\n"},
    ],
    ids=["a huge text", "in another folder"],
)
def test_metadata_that_is_huge_or_elsewhere_is_none(files: dict[str, str]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    with pytest.raises(InvalidInput, match="its metadata does not name it"):
        local_wheels.described("x-1.0-py3-none-any.whl", packed.getvalue(), where="here")


def test_a_wheel_that_is_damaged_inside_is_refused() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x-1.0.dist-info/METADATA", "Name: x\n" * 1000)
    content = bytearray(packed.getvalue())
    content[60:80] = b"\xff" * 20
    for read in (
        lambda: local_wheels.described("x-1.0-py3-none-any.whl", bytes(content), where="here"),
        lambda: local_wheels.normalised(bytes(content), where="here"),
    ):
        with pytest.raises(InvalidInput, match="this is no wheel"):
            read()
