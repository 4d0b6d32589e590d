"""Extras and groups that exclude each other: in projects, and in the markers of locks."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from ray_envs.decisions import locks
from ray_envs.decisions.choices import Choice, LockMarkers, check_choice
from ray_envs.errors import InvalidInput, ResolutionFailed
from tests.unit.decisions.test_locks import LINUX, MAC, by_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]


def check(conflicts: str, extras: str = "", groups: str = "") -> None:
    data = tomllib.loads(f"""
[project]
name = "My.Project"
[project.optional-dependencies]
cpu = ["torch"]
GPU_12 = ["torch"]
both = ["my-project[cpu]", "My.Project[gpu-12]"]
all = ["six", "my_project[fast,cpu]"]
fast = []
mac = ["my-project[cpu]; sys_platform == 'darwin'"]
broken = ["a,b"]
[dependency-groups]
g1 = ["six"]
G_2 = ["six"]
dev = [{{ include-group = "g1" }}, "pytest"]
more = [{{ include-group = "dev" }}]
self = ["my-project[cpu]"]
[tool.uv]
conflicts = {conflicts}
""")
    check_choice(data, extras=extras.split(), groups=groups.split())


EXTRAS = '[[{ extra = "cpu" }, { extra = "gpu-12" }]]'
GROUPS = '[[{ group = "g1" }, { group = "g-2" }]]'
MIXED = '[[{ extra = "cpu", package = "my-project" }, { group = "g1" }, { group = "G_2" }]]'
OTHER = '[[{ package = "torch", extra = "x" }, { extra = "cpu" }]]'


@pytest.mark.parametrize(
    ("conflicts", "extras", "groups"),
    [
        ("[]", "cpu gpu_12", "g1 g_2"),
        (EXTRAS, "", ""),
        (EXTRAS, "cpu fast", "g1 g_2"),
        (EXTRAS, "cpu all", ""),
        (EXTRAS, "gpu.12 fast", ""),
        (EXTRAS, "gpu_12 mac", ""),  # uv decides, on the platform
        (EXTRAS, "gpu_12 broken", ""),
        (GROUPS, "cpu gpu_12", "g1"),
        (GROUPS, "", "more dev g1"),
        (MIXED, "cpu", ""),
        (MIXED, "gpu_12", "g1"),
        (OTHER, "cpu", ""),
        ('[[{ extra = "unknown" }, { extra = "cpu" }]]', "cpu", ""),
        ('[[{ package = "my-project" }, { extra = "cpu" }]]', "fast", ""),
        ('[[{ package = "other" }, { extra = "cpu" }]]', "cpu", ""),
        (EXTRAS[:-1] + ", " + GROUPS[1:], "cpu", "g1"),
    ],
)
def test_what_does_not_exclude_each_other_may_be_chosen(
    conflicts: str, extras: str, groups: str
) -> None:
    check(conflicts, extras, groups)


@pytest.mark.parametrize(
    ("conflicts", "extras", "groups", "said", "where"),
    [
        (EXTRAS, "cpu GPU_12", "", "extra 'cpu' and extra 'gpu-12' exclude", "extras"),
        (EXTRAS, "gpu.12 fast cpu", "", "extra 'cpu' and extra 'gpu-12' exclude", "extras"),
        (EXTRAS, "both", "", "'cpu' (through extra 'both') and extra 'gpu-12' (thr", "extras"),
        (EXTRAS, "all gpu-12", "", "'cpu' (through extra 'all') and extra 'gpu-12' ex", "extras"),
        (EXTRAS, "gpu-12", "self", "'cpu' (through group 'self') and extra 'gpu-12'", "extras"),
        (GROUPS, "", "g1 G_2", "group 'g-2' and group 'g1' exclude", "groups"),
        (GROUPS, "", "more g-2", "group 'g-2' and group 'g1' (through group 'more')", "groups"),
        (MIXED, "cpu", "g1", "extra 'cpu' and group 'g1' exclude", "extras"),
        (MIXED, "all", "g-2", "extra 'cpu' (through extra 'all') and group 'g-2'", "extras"),
        (
            '[[{ package = "my-project" }, { extra = "cpu" }]]',
            "cpu",
            "",
            "extra 'cpu' and project 'my-project' exclude each other",
            "extras",
        ),
    ],
)
def test_a_choice_that_excludes_itself_is_refused_with_both_names(
    conflicts: str, extras: str, groups: str, said: str, where: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        check(conflicts, extras, groups)
    assert said in caught.value.message
    assert "tool.uv.conflicts" in caught.value.message
    assert (caught.value.where, "variant for each" in caught.value.hint) == (where, True)


def test_a_group_that_includes_one_that_it_excludes_is_refused_whatever_is_chosen() -> None:
    with pytest.raises(InvalidInput, match="group 'more' includes group 'g1'") as caught:
        check('[[{ group = "g1" }, { group = "more" }]]')
    assert caught.value.where == "pyproject.toml: tool.uv.conflicts"


@pytest.mark.parametrize(
    ("conflicts", "said", "place"),
    [
        ('"x"', "list of lists", ""),
        ("1", "list of lists", ""),
        ("{ a = 1 }", "list of lists", ""),
        ('[{ extra = "cpu" }]', "list of lists", ""),
        ("[[]]", "two", "[0]"),
        ('[[{ extra = "cpu" }]]', "two", "[0]"),
        ('[[{ extra = "GPU_12" }, { extra = "gpu-12" }]]', "two", "[0]"),
        (f'[{GROUPS[1:-1]}, ["cpu", "gpu"]]', "not a table", "[1][0]"),
        ('[[{}, { extra = "cpu" }]]', "one extra or one group", "[0][0]"),
        ('[[{ extra = "cpu", group = "g1" }, {}]]', "one extra or one group", "[0][0]"),
        ('[[{ extra = "cpu" }, { extra = 1 }]]', "extra is not a name", "[0][1]"),
        ('[[{ extra = "cpu" }, { group = "" }]]', "group is not a name", "[0][1]"),
        ('[[{ extras = "cpu" }, { extra = "fast" }]]', "unknown key 'extras'", "[0][0]"),
    ],
)
def test_conflicts_of_another_form_are_refused_at_their_place(
    conflicts: str, said: str, place: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        check(conflicts)
    assert said in caught.value.message
    assert caught.value.where == f"pyproject.toml: tool.uv.conflicts{place}"
    assert caught.value.hint


# -- markers

CPU, GPU = Choice("foo-bar", "extra", "cpu"), Choice("foo-bar", "extra", "gpu-12")
DEV = Choice("foo-bar", "group", "dev")


def test_a_choice_has_the_name_that_uv_gives_it_in_a_lock() -> None:
    project = Choice("foo-bar", "project")
    names = [each.in_lock for each in (CPU, GPU, DEV, project)]
    assert names == [
        "extra-7-foo-bar-cpu", "extra-7-foo-bar-gpu-12", "group-7-foo-bar-dev", "project-7-foo-bar"
    ]  # fmt: skip


IS_CPU, IS_GPU = "extra == 'extra-7-foo-bar-cpu'", "extra == 'extra-7-foo-bar-gpu-12'"
NOT_CPU, IS_DEV = IS_CPU.replace("==", "!="), "extra == 'group-7-foo-bar-dev'"


@pytest.mark.parametrize(
    ("marker", "active", "holds"),
    [
        ("", (), True),
        (IS_CPU, (), False),
        (IS_CPU, (CPU,), True),
        (IS_CPU, (GPU,), False),
        (IS_CPU.replace("'", '"'), (CPU,), True),
        (NOT_CPU, (), True),
        (NOT_CPU, (CPU,), False),
        (NOT_CPU, (GPU, DEV), True),
        (f"{IS_CPU} or {IS_GPU}", (GPU,), True),
        (f"{IS_CPU} and {IS_GPU}", (GPU,), False),
        (f"({IS_CPU} or {IS_DEV}) and {NOT_CPU}", (CPU,), False),
        (f"({IS_CPU} or {IS_DEV}) and {NOT_CPU}", (DEV,), True),
        (f"sys_platform == 'linux' and {IS_CPU}", (CPU,), True),
        (f"sys_platform == 'darwin' and {IS_CPU}", (CPU,), False),
        (f"sys_platform == 'darwin' or {IS_CPU}", (CPU,), True),
        ("extra == 'project-7-foo-bar'", (Choice("foo-bar", "project"),), True),
        ("extra == 'cpu'", (CPU,), False),
        ("sys_platform == 'linux'", (), True),
    ],
)
def test_a_marker_holds_for_a_choice_and_a_platform(
    marker: str, active: tuple[Choice, ...], holds: bool
) -> None:
    markers = LockMarkers(LINUX)
    names = {each.in_lock for each in active}
    assert [markers.hold(marker, names) for _ in range(2)] == [holds, holds]
    assert markers.hold(marker, None) >= holds


@pytest.mark.parametrize("marker", ["extra ==", "a == b", "x == 'linux'"])
def test_what_is_no_marker_is_refused(marker: str) -> None:
    with pytest.raises(InvalidInput, match="is not a marker") as caught:
        LockMarkers(LINUX).hold(marker, ())
    assert caught.value.where == "uv.lock"


# -- locks: torch from an index for each of two extras, as uv 0.13 writes it, with less files

TORCH = """
version = 1
revision = 5
requires-python = "==3.11.*"
resolution-markers = [
    "sys_platform == 'linux' and extra == 'extra-6-torchy-cpu' and extra != 'extra-6-torchy-cu124'",
    "sys_platform == 'linux' and extra != 'extra-6-torchy-cpu' and extra == 'extra-6-torchy-cu124'",
    "extra != 'extra-6-torchy-cpu' and extra != 'extra-6-torchy-cu124'",
]
conflicts = [[
    { package = "torchy", extra = "cpu" },
    { package = "torchy", extra = "cu124" },
]]

[[package]]
name = "cuda"
version = "12.4"
source = { registry = "https://two.example" }
wheels = [{ url = "https://two.example/cuda-12.4-py3-none-any.whl", hash = "sha256:0c" }]

[[package]]
name = "torch"
version = "2.6.0"
source = { registry = "https://one.example/cpu" }
resolution-markers = ["sys_platform == 'darwin' and extra == 'extra-6-torchy-cpu'"]
wheels = [{ url = "https://h/torch-2.6.0-cp311-none-macosx_11_0_arm64.whl", hash = "sha256:01" }]

[[package]]
name = "torch"
version = "2.6.0+cpu"
source = { registry = "https://one.example/cpu" }
resolution-markers = [
    "sys_platform == 'linux' and extra == 'extra-6-torchy-cpu' and extra != 'extra-6-torchy-cu124'",
]
wheels = [{ url = "https://h/torch-2.6.0%2Bcpu-cp311-cp311-linux_x86_64.whl", hash = "sha256:02" }]

[[package]]
name = "torch"
version = "2.6.0+cu124"
source = { registry = "https://two.example" }
resolution-markers = [
    "sys_platform == 'linux' and extra != 'extra-6-torchy-cpu' and extra == 'extra-6-torchy-cu124'",
]
dependencies = [{ name = "cuda" }]
wheels = [{ url = "https://torch-2.6.0%2Bcu124-cp311-cp311-linux_x86_64.whl", hash = "sha256:03" }]

[[package]]
name = "vision"
version = "1"
source = { registry = "https://three.example" }
dependencies = [
    { name = "torch", version = "2.6.0", source = { registry = "https://one.example/cpu" }, \
marker = "sys_platform == 'darwin' and extra == 'extra-6-torchy-cpu'" },
    { name = "torch", version = "2.6.0+cpu", source = { registry = "https://one.example/cpu" }, \
marker = "sys_platform != 'darwin' and extra == 'extra-6-torchy-cpu' or \
(extra == 'extra-6-torchy-cpu' and extra == 'extra-6-torchy-cu124')" },
    { name = "torch", version = "2.6.0+cu124", source = { registry = "https://two.example" }, \
marker = "extra == 'extra-6-torchy-cu124'" },
]
wheels = [{ url = "https://h/vision-1-py3-none-any.whl", hash = "sha256:04" }]

[[package]]
name = "torchy"
version = "1"
source = { virtual = "." }
dependencies = [{ name = "vision" }]

[package.optional-dependencies]
cpu = [
    { name = "torch", version = "2.6.0", source = { registry = "https://one.example/cpu" }, \
marker = "sys_platform == 'darwin'" },
    { name = "torch", version = "2.6.0+cpu", source = { registry = "https://one.example/cpu" }, \
marker = "sys_platform != 'darwin'" },
]
cu124 = [
    { name = "torch", version = "2.6.0+cu124", source = { registry = "https://two.example" } },
]
"""


@pytest.mark.parametrize(
    ("extras", "versions"),
    [
        ([], {"vision": "1"}),
        (["cpu"], {"torch": "2.6.0+cpu", "vision": "1"}),
        (["CU124"], {"cuda": "12.4", "torch": "2.6.0+cu124", "vision": "1"}),
    ],
)
def test_each_extra_installs_its_own_torch(extras: list[str], versions: dict[str, str]) -> None:
    found = by_name(locks.installed(TORCH, LINUX, extras=extras))
    assert {name: each.version for name, each in found.items()} == versions
    assert not any(each.is_built for each in found.values())


def test_the_torch_of_another_platform_is_another() -> None:
    found = by_name(locks.installed(TORCH, MAC, extras=["cpu"]))
    assert {name: each.pin for name, each in found.items()} == {
        "torch": "sha256:01",
        "vision": "sha256:04",
    }


def test_a_lock_installs_nothing_for_a_choice_that_excludes_itself() -> None:
    with pytest.raises(ResolutionFailed, match="extra 'cpu' of torchy and extra 'cu124'") as caught:
        locks.installed(TORCH, LINUX, extras=["cpu", "cu124"])
    assert caught.value.hint


def test_two_versions_of_a_package_are_never_installed_together() -> None:
    lock = TORCH.replace("cpu' and extra == 'extra-6-torchy-cu124'", "cpu'").replace(
        "marker = \"extra == 'extra-6-torchy-cu124'\"", "marker = \"sys_platform == 'linux'\""
    )
    with pytest.raises(ResolutionFailed, match="torch would be installed twice") as caught:
        locks.installed(lock, LINUX, extras=["cpu"])
    assert "2.6.0+cpu" in caught.value.message
    assert "2.6.0+cu124" in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        ("", "", ()),
        ("2.6.0+cpu", "2.6.1+cpu", ("torch 2.6.0+cpu or 2.6.0+cu124 -> 2.6.1+cpu",)),
        ("2.6.0+cu124", "2.7", ("torch 2.6.0+cpu or 2.6.0+cu124 -> 2.7",)),
        ("12.4", "12.5", ("cuda 12.4 -> 12.5",)),
    ],
)
def test_the_pins_of_every_choice_count(old: str, new: str, moved: tuple[str, ...]) -> None:
    after = TORCH.replace(f'version = "{old}"', f'version = "{new}"') if old else TORCH
    assert locks.moved_pins(TORCH, after, LINUX) == moved


@pytest.mark.parametrize(
    ("supported", "is_for_linux"),
    [
        (["sys_platform == 'darwin'"], False),
        (["sys_platform == 'darwin'", "platform_machine == 'aarch64'"], False),
        (["sys_platform == 'darwin'", "sys_platform == 'linux'"], True),
        (["sys_platform == 'linux' and platform_machine == 'x86_64'"], True),
        ([], True),
    ],
)
def test_a_project_for_other_platforms_only_is_named_with_its_entries(
    supported: list[str], is_for_linux: bool
) -> None:
    lock: Any = TORCH.replace("conflicts =", f"supported-markers = {supported}\nconflicts =")
    if is_for_linux:
        assert locks.installed(lock, LINUX)
        return
    with pytest.raises(ResolutionFailed) as caught:
        locks.installed(lock, LINUX)
    assert supported[0] in caught.value.message
    assert caught.value.where == "pyproject.toml: tool.uv.environments"
    assert "sys_platform == 'linux'" in caught.value.hint
