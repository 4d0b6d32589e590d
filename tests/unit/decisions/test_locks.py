"""What locks install: real locks of uv 0.13 (cut down to a few wheels) and generated ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.tags import compatible_tags, cpython_tags, mac_platforms

from ray_envs.decisions import locks
from ray_envs.errors import InvalidInput, InvalidPackages, ResolutionFailed
from ray_envs.models import Installed, Platform, Target

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
    every = [*cpython_tags((3, 11), ["cp311"], tags), *compatible_tags((3, 11), "cp311", tags)]
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


def by_name(items: tuple[Installed, ...]) -> dict[str, Installed]:
    found = {item.name: item for item in items}
    assert len(found) == len(items)
    return found


# -- keys

words = st.text(st.characters(codec="utf-8"), max_size=5)
packages = st.builds(Installed, name=words, version=words, pin=words, is_built=st.booleans())


@given(st.lists(packages), st.randoms())
def test_a_key_does_not_depend_on_the_order_of_packages(
    items: list[Installed], random: Any
) -> None:
    key = locks.key_of(items, TARGET, LINUX)
    shuffled = list(items)
    random.shuffle(shuffled)
    assert locks.key_of(iter(shuffled), TARGET, LINUX) == key
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


@given(
    st.lists(packages, min_size=1),
    st.data(),
    st.sampled_from(
        ["name", "version", "pin", "python", "ray", "platform", "missing", "build_options"]
    ),
    words.filter(bool),
)
def test_a_key_changes_with_everything_that_is_installed(
    items: list[Installed], data: st.DataObject, what: str, more: str
) -> None:
    index = data.draw(st.integers(0, len(items) - 1))
    changed, target, where, options = list(items), TARGET, LINUX, ""
    if what == "build_options":
        options = more
    elif what in ("python", "ray"):
        target = TARGET.model_copy(update={what: getattr(TARGET, what) + more})
    elif what == "platform":
        where = LINUX.model_copy(update={"name": LINUX.name + more})
    elif what == "missing":
        del changed[index]
    else:
        new = getattr(items[index], what) + more
        changed[index] = items[index].model_copy(update={what: new})
    key = locks.key_of(changed, target, where, build_options=options)
    assert key != locks.key_of(items, TARGET, LINUX)


def test_a_key_knows_where_a_name_ends() -> None:
    one, two = (Installed(name=n, version=v, pin="p") for n, v in (("ab", "c"), ("a", "bc")))
    assert locks.key_of([one], TARGET, LINUX) != locks.key_of([two], TARGET, LINUX)


def test_variants_without_build_options_share_a_key_and_each_option_has_its_own() -> None:
    items = [Installed(name="a", version="1", pin="p", is_built=True)]
    plain, *others = (
        locks.key_of(items, TARGET, LINUX, build_options=each)
        for each in ("", '{"no-binary":true}', '{"no-build":true}')
    )
    assert plain == locks.key_of(items, TARGET, LINUX)
    assert len({plain, *others}) == 3


def test_a_lock_is_known_by_the_hash_of_its_text() -> None:
    assert locks.lock_sha256("") == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


# -- locks

RAYS = """attrs certifi charset-normalizer click filelock idna jsonschema jsonschema-specifications
msgpack packaging protobuf pyyaml ray referencing requests rpds-py typing-extensions urllib3"""


def test_a_lock_installs_what_its_markers_say_for_the_platform() -> None:
    linux = by_name(locks.installed(FORKS, LINUX))
    mac = by_name(locks.installed(FORKS, MAC))
    assert set(linux) == set(mac) == {*RAYS.split(), "docopt", "numpy", "pysocks"}
    assert (linux["numpy"].version, mac["numpy"].version) == ("2.4.6", "1.26.4")
    assert list(linux) == sorted(linux)
    assert [item.name for item in linux.values() if item.is_built] == ["docopt"]


def test_extras_and_groups_are_installed_only_where_they_are_asked_for() -> None:
    base = set(by_name(locks.installed(FORKS, LINUX)))

    def added(**options: Any) -> set[str]:
        return set(by_name(locks.installed(FORKS, LINUX, **options))) - base

    assert added(extras=["Fast"]) == {"ujson"}
    assert added(extras=["plot"]) == {"cycler", "ujson"}
    assert added(groups=["more"]) == {"pluggy"}
    assert added(extras=["fast"], groups=["check"]) == {"ujson", "iniconfig", "pluggy"}


def test_the_pin_is_the_hash_of_the_file_that_uv_takes() -> None:
    packages = {p["name"]: p for p in tomllib.loads(FORKS)["package"]}
    linux, mac = (by_name(locks.installed(FORKS, each)) for each in (LINUX, MAC))
    (certifi,) = packages["certifi"]["wheels"]
    assert linux["certifi"].pin == mac["certifi"].pin == certifi["hash"]
    assert linux["docopt"].pin == packages["docopt"]["sdist"]["hash"]
    for found, part in ((linux, "x86_64"), (mac, "macosx_11_0_arm64")):
        (wheel,) = [w for w in packages["msgpack"]["wheels"] if part in w["url"]]
        assert found["msgpack"].pin == wheel["hash"]


def test_urls_are_pinned_by_the_hash_of_their_file() -> None:
    found = by_name(locks.installed(URLS, LINUX))
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
    (item,) = locks.installed(one(source), LINUX)
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
        locks.installed(one(source, files), LINUX)
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
    (item,) = locks.installed(one('registry = "https://h"', f"wheels = [{files}]"), LINUX)
    assert (item.pin, item.is_built) == ("3", False)


def test_an_encoded_wheel_name_is_read_as_what_it_is() -> None:
    wheel = 'wheels = [{ url = "https://h/a-1%2Bcpu-cp311-cp311-linux_x86_64.whl", hash = "w" }]'
    (item,) = locks.installed(one('registry = "https://h"', wheel), LINUX)
    assert item.pin == "w"


def test_an_edge_chooses_among_packages_of_one_name_by_source_or_by_markers() -> None:
    def package(index: str, marker: str) -> str:
        return (
            f'[[package]]\nname = "a"\nversion = "1"\nsource = {{ registry = "{index}" }}\n'
            f'resolution-markers = ["{marker}"]\nsdist = {{ hash = "{index}" }}\n'
        )

    both = package("one", "sys_platform == 'darwin'") + package("two", "sys_platform == 'linux'")
    edge = '{ name = "a", version = "1", source = { registry = "one" } }'
    assert [p.pin for p in locks.installed(lock_of(both, edge), LINUX)] == ["one"]
    assert [p.pin for p in locks.installed(lock_of(both), LINUX)] == ["two"]
    assert [p.pin for p in locks.installed(lock_of(both), MAC)] == ["one"]


def test_circles_and_edges_back_to_the_project_end() -> None:
    back = 'dependencies = [{ name = "a", extra = ["x"] }, { name = "root" }]\n'
    more = f'{back}sdist = {{ hash = "s" }}\n[package.optional-dependencies]\nx = [{{name="a"}}]\n'
    assert len(locks.installed(one('registry = "https://h"', more), LINUX)) == 1


@pytest.mark.parametrize(
    ("lock", "said"), [("", "no project"), ("[[package]\n", "TOML"), (lock_of(""), "a is missing")]
)
def test_what_is_no_lock_is_refused(lock: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        locks.installed(lock, LINUX)
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
    whole = min(seconds(lambda: locks.installed(text, LINUX)) for _ in range(3))
    assert len(locks.installed(text, LINUX)) == 150
    # Measured 0.01 s of processor time; the limit leaves room for a busy machine.
    assert whole - parsing < 0.2


# -- moved pins


def test_adding_ray_moves_a_pin_and_it_is_named() -> None:
    assert locks.moved_pins(BEFORE, AFTER, LINUX) == ("packaging 21.0 -> 26.3",)
    assert locks.moved_pins(AFTER, AFTER, LINUX) == ()
    assert locks.moved_pins("", AFTER, LINUX) == ()


def test_a_fork_for_another_platform_is_no_moved_pin() -> None:
    assert locks.moved_pins(FORKS, FORKS, LINUX) == ()
    numpy_moved = FORKS.replace('"2.4.6"', '"2.4.7"')
    assert locks.moved_pins(FORKS, numpy_moved, LINUX) == ("numpy 2.4.6 -> 2.4.7",)
    assert locks.moved_pins(FORKS, numpy_moved, MAC) == ()


def test_pins_of_extras_and_groups_count_too() -> None:
    after = FORKS.replace('version = "2.3.1"', 'version = "2.4"')  # iniconfig, of a group
    assert locks.moved_pins(FORKS, after, LINUX) == ("iniconfig 2.3.1 -> 2.4",)


@pytest.mark.parametrize(("before", "after"), [("[", AFTER), (BEFORE, "["), (BEFORE, "")])
def test_pins_of_what_is_no_lock_are_refused(before: str, after: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        locks.moved_pins(before, after, LINUX)
    assert caught.value.where == "uv.lock"


# -- hashes

HASHED = """version = 1
[[package]]
name = "own"
source = { virtual = "." }
dependencies = [{ name = "a" }, { name = "w", marker = "sys_platform == 'win32'" }]
[package.optional-dependencies]
more = [{ name = "c" }]
[package.dev-dependencies]
ray-envs = [{ name = "ray" }]
""" + "".join(
    f"""[[package]]
name = "{name}"
version = "1"
source = {{ registry = "https://h/simple" }}
{needs}
wheels = [{{ url = "https://h/{name}-1-py3-none-any.whl", hash = "sha256:{name}" }}]
"""
    for name, needs in [
        ("a", 'dependencies = [{ name = "b" }]'),
        ("b", ""),
        ("c", ""),
        ("w", ""),
        ("ray", 'dependencies = [{ name = "d" }]'),
        ("d", ""),
    ]
)


@pytest.mark.parametrize(
    ("hashes", "extras", "wrong"),
    [
        ({}, ["more"], ""),
        ({"a": ["sha256:a"], "b": ["sha256:x", "sha256:b"]}, [], ""),
        ({"a": ["sha256:a"], "b": ["sha256:b"], "c": ["sha256:c"]}, ["more"], ""),
        ({"a": ["sha256:x"], "b": ["sha256:b"]}, [], "a"),
        ({"a": ["sha256:a"], "ray": ["sha256:x"]}, [], "b"),
        ({"a": ["sha256:a"], "b": []}, ["More"], "b, c"),
        ({"z": ["sha256:a"]}, [], "a, b"),
    ],
)
def test_what_a_definition_brings_in_has_one_of_its_hashes(
    hashes: dict[str, list[str]], extras: list[str], wrong: str
) -> None:
    if not wrong:
        locks.check_hashes(HASHED, LINUX, hashes, extras=extras)
        return
    with pytest.raises(InvalidPackages) as caught:
        locks.check_hashes(HASHED, LINUX, hashes, extras=extras, groups=["ray-envs"])
    assert caught.value.message.endswith(f"not among the hashes: {wrong}")
    assert f"{wrong[0]} 1: sha256:{wrong[0]} is locked" in caught.value.detail
    assert "--generate-hashes" in caught.value.hint
