"""What is packed for nodes that lack us, how it is unpacked there, and what people are told."""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ray_envs.cluster import bare_node, bootstrap
from ray_envs.cluster.bootstrap import Pack, packed
from ray_envs.errors import RayEnvsWarning
from ray_envs.settings import Settings


@pytest.fixture(scope="module")
def pack() -> Pack:
    return packed()


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has told nothing yet."""
    monkeypatch.setattr(bootstrap, "_said", set())


def unpack(base: Path, pack: Pack) -> Path:
    folder, hold = bare_node._unpacked(str(base), pack.sha256, pack.data)
    os.close(hold)
    return Path(folder)


def small(text: str) -> Pack:
    """A pack of the same form that takes no time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("bin/uv", text)
    return Pack(buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest(), "any")


# -- packing -------------------------------------------------------------------------------------


def test_equal_packages_give_equal_packs(pack: Pack) -> None:
    assert packed() == pack
    assert hashlib.sha256(pack.data).hexdigest() == pack.sha256


def test_a_pack_has_what_we_require_and_nothing_of_ray_and_of_this_machine(pack: Pack) -> None:
    names = zipfile.ZipFile(io.BytesIO(pack.data)).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"ray_envs", "pydantic", "pydantic_core", "tomlkit", "uv", "bin"} <= tops
    assert tops.isdisjoint({"ray", "numpy", "pytest", "google", ".."})
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pth", ".pyc"))]
    ours = [name for name in names if name.startswith("ray_envs-")]
    assert ours == [f"ray_envs-{bootstrap.own_version()}.dist-info/METADATA"]


def test_an_interpreter_without_any_package_imports_the_agent_from_a_pack(
    pack: Pack, tmp_path: Path
) -> None:
    folder = unpack(tmp_path / "bootstrap", pack)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ray_envs.node.agent, uv, subprocess, importlib.metadata\n"
        "print(importlib.metadata.version('ray-envs'), ray_envs.__file__)\n"
        "subprocess.run([sys.argv[1] + '/bin/uv', '--version'], check=True)\n"
    )
    base = os.path.realpath(sys.executable)
    done = subprocess.run(
        [base, "-I", "-S", "-c", code, folder],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{bootstrap.own_version()} {folder}/ray_envs/__init__.py" in done.stdout


# -- unpacking -----------------------------------------------------------------------------------


def test_a_pack_that_is_there_is_neither_sent_nor_written_again(tmp_path: Path) -> None:
    first = small("one")
    folder = unpack(tmp_path, first)
    before = (folder / "bin/uv").stat()
    assert unpack(tmp_path, Pack(b"", first.sha256, "any")) == folder
    assert (folder / "bin/uv").stat().st_ino == before.st_ino
    assert os.access(folder / "bin/uv", os.X_OK)


def test_a_pack_that_arrives_damaged_leaves_nothing(tmp_path: Path) -> None:
    sent = small("one")
    with pytest.raises(OSError, match="not what was sent"):
        unpack(tmp_path, Pack(sent.data[:-1], sent.sha256, "any"))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_half_a_pack_of_a_killed_process_is_no_pack(tmp_path: Path) -> None:
    sent = small("one")
    half = tmp_path / f"{sent.sha256}.part"
    half.mkdir()
    (half / "rubbish").touch()
    folder = unpack(tmp_path, sent)
    assert sorted(path.name for path in folder.iterdir()) == ["bin", "held"]
    assert not half.exists()


def test_older_packs_go_unless_an_agent_runs_from_them(tmp_path: Path) -> None:
    used, unused, new = small("used"), small("unused"), small("new")
    folder, hold = bare_node._unpacked(str(tmp_path), used.sha256, used.data)
    (tmp_path / unused.sha256).mkdir()
    unpack(tmp_path, new)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", used.sha256, new.sha256}

    fcntl.flock(hold, fcntl.LOCK_UN)
    os.close(hold)
    unpack(tmp_path, new)
    assert not Path(folder).exists()


# -- telling -------------------------------------------------------------------------------------


def node(error: str | None = None, **fields: Any) -> dict[str, Any]:
    told = {"type": "WrongEnvironment", "message": error, "hint": "run there: pip"}
    return {"address": "192.0.2.1", "error": told if error else None, **fields}


@pytest.mark.usefixtures("untold")
def test_each_bare_node_is_warned_of_once_and_many_are_counted() -> None:
    nodes = {"a": node("node a lacks it"), "b": node()}
    with pytest.warns(RayEnvsWarning, match="node a lacks it\nhint: run there: pip") as caught:
        bootstrap.warn_of_bare(nodes, stacklevel=1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bootstrap.warn_of_bare(nodes, stacklevel=1)

    with pytest.warns(RayEnvsWarning, match=r"^node c \(192.0.2.1\) gets no .*: the disk is full"):
        bootstrap.warn_of_bare({"c": node("the disk is full")}, stacklevel=1)

    many = {f"n{number}": node(f"node n{number} lacks it") for number in range(100)}
    with pytest.warns(RayEnvsWarning) as caught:
        bootstrap.warn_of_bare(many, stacklevel=1)
    assert len(caught) == 9
    assert str(caught[-1].message).startswith("92 more nodes")


@pytest.mark.usefixtures("untold")
def test_a_missing_gate_is_noted_once_and_only_where_nodes_answered_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "ray_envs")
    bootstrap.note_missing_gate({})
    bootstrap.note_missing_gate(
        {"a" * 56: node(has_gate=True), "b" * 56: node("bare", has_gate=False)}
    )
    assert caplog.messages == []

    nodes = {"a" * 56: node(has_gate=True), "b" * 56: node(has_gate=False)}
    bootstrap.note_missing_gate(nodes)
    bootstrap.note_missing_gate(nodes)
    (text,) = caplog.messages
    assert text.startswith("nodes bbbbbbbbbbbb run without the plugin")
    assert 'RAY_RUNTIME_ENV_PLUGINS=\'[{"class": "ray_envs.plugin.EnvironmentPlugin"}]\'' in text


def test_bootstrap_is_off_unless_it_is_asked_for() -> None:
    assert not Settings.from_environment({}).bootstrap
    asked = Settings.from_environment({"RAY_ENVS_BOOTSTRAP": "1"})
    assert asked.bootstrap
    assert Settings.from_environment(asked.to_environment()) == asked
