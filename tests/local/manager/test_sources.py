"""Requirements files, scripts and pylock.toml as the manager and the real uv take them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uv

from ray_envs.client.inputs import read_definition
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.errors import InvalidPackages, RayEnvsError, ResolutionFailed
from ray_envs.manager.manager import EnvManager
from ray_envs.settings import Settings
from ray_envs.specs import EnvSpec
from ray_envs.testing import FakeUv
from tests.local.conftest import tried
from tests.local.life_tools import managed

#: The wheel of six 1.16.0, and its source archive.
WHEEL = "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254"
SDIST = "1e61c37477a1626458e36f7b1d82aa5c9b094fa4802892072e49de9c60c4c926"


@pytest.fixture
def settings(tmp_path: Path, fake_uv: FakeUv) -> Settings:
    """A root where uv may resolve, and nothing is ever built."""
    made = tried(Settings(root=tmp_path / "root", uv_retries=0, tick_s=0.5))
    fake_uv.fail("sync", times=None)
    return made


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a package index with the wheel of `own-part` 1.0 alone, and its sha256."""
    folder = tmp_path / "served" / "simple" / "own-part"
    folder.mkdir(parents=True)
    wheel = folder / "own_part-1.0-py3-none-any.whl"
    texts = {
        "METADATA": "Metadata-Version: 2.1\nName: own-part\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"own_part-1.0.dist-info/{name}", text)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    link = f'<a href="{wheel.name}#sha256={sha256}">{wheel.name}</a>'
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(tmp_path / "served"))

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple", sha256
        server.shutdown()
        thread.join(10)


def uv_run(folder: Path, *command: str) -> str:
    ended = subprocess.run(
        [uv.find_uv_bin(), *command, "--color", "never"],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def given(folder: Path, **spec: Any) -> dict[str, Any]:
    """A spec as clients give it, with the texts of its files."""
    definition = read_definition(EnvSpec(**spec), folder)
    return definition.model_dump(mode="json", exclude_defaults=True)


def exported(settings: Settings, spec: dict[str, Any]) -> dict[str, str]:
    """The files of a variant that was created from `spec`."""

    async def act(manager: EnvManager) -> Any:
        await manager.create_env(variant_id="v", spec=spec)
        return (await manager.export_env(variant_id="v"))["files"]

    files: dict[str, str] = managed(settings, act)
    return files


def refused(settings: Settings, spec: dict[str, Any]) -> RayEnvsError:
    """The error of a create."""

    async def act(manager: EnvManager) -> Any:
        with pytest.raises(RayEnvsError) as caught:
            await manager.create_env(variant_id="refused", spec=spec)
        return caught.value

    error: RayEnvsError = managed(settings, act)
    return error


def versions(lock: str) -> dict[str, str]:
    packages = parsed_toml(lock, where="uv.lock")["package"]
    return {each["name"]: each["version"] for each in packages}


def test_uv_keeps_to_the_settings_and_constraints_of_a_requirements_file(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "r.txt").write_text(
        "six\n-c c.txt\n--prefer-binary --only-binary six\nzipp; python_version < '3'\n"
    )
    (tmp_path / "c.txt").write_text("six<1.16\nzipp<4\n")
    files = exported(settings, given(tmp_path, requirements="r.txt"))
    assert versions(files["uv.lock"])["six"] == "1.15.0"
    uv_table = parsed_toml(files["pyproject.toml"], where="pyproject.toml")["tool"]["uv"]
    assert uv_table == {
        "package": False,
        "constraint-dependencies": ["six<1.16", "zipp<4"],
        "no-build-package": ["six"],
    }


def test_hashes_are_kept_through_export_and_import_and_checked_again(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "r.txt").write_text(f"six==1.16.0 --hash=sha256:{WHEEL}\n")
    spec = given(tmp_path, requirements="r.txt")

    async def act(manager: EnvManager) -> Any:
        await manager.create_env(variant_id="v", spec=spec)
        files = (await manager.export_env(variant_id="v"))["files"]
        texts = {"pyproject": files["pyproject.toml"], "uv_lock": files["uv.lock"]}
        options = json.loads(files["options.json"])
        await manager.import_env(variant_id="copy", **texts, options=options)
        again = (await manager.export_env(variant_id="copy"))["files"]
        wrong = {**options, "hashes": {"six": [f"sha256:{SDIST}"]}}
        with pytest.raises(InvalidPackages) as at_import:
            await manager.import_env(variant_id="wrong", **texts, options=wrong)
        with pytest.raises(InvalidPackages) as at_add:
            await manager.add_deps(variant_id="copy", packages=["zipp==3.7.0"])
        return files, again, at_import.value, at_add.value

    files, again, at_import, at_add = managed(settings, act)
    assert json.loads(files["options.json"])["hashes"] == {"six": [f"sha256:{WHEEL}"]}
    assert again == files
    assert "not among the hashes: six" in at_import.message
    assert f"six 1.16.0: sha256:{WHEEL} is locked" in at_import.detail
    assert "not among the hashes: zipp" in at_add.message


def test_a_hash_of_another_file_is_refused_after_locking(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "r.txt").write_text(f"six==1.16.0 --hash=sha256:{SDIST}\n")
    error = refused(settings, given(tmp_path, requirements="r.txt"))
    assert isinstance(error, InvalidPackages)
    assert "not among the hashes: six" in error.message
    assert "uv pip compile --generate-hashes" in error.hint


def test_the_versions_in_the_lock_of_a_script_are_kept(settings: Settings, tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    head = '# /// script\n# requires-python = ">=3.10"\n# dependencies = [{}]\n# ///\n'
    script.write_text(head.format('"six<1.16", "zipp==3.7.0"'))
    uv_run(tmp_path, "lock", "--script", "x.py")
    script.write_text(head.format('"six", "zipp"'))  # the lock alone keeps them now
    files = exported(settings, given(tmp_path, script="x.py"))
    found = versions(files["uv.lock"])
    assert (found["six"], found["zipp"]) == ("1.15.0", "3.7.0")

    script.write_text(head.format('"six", "zipp>=3.8"'))  # its lock is older
    error = refused(settings, given(tmp_path, script="x.py"))
    assert isinstance(error, ResolutionFailed)
    assert "zipp 3.7.0 -> " in error.detail


def test_a_pylock_of_uv_gives_the_same_versions_and_files(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "r.in").write_text("six<1.16\nzipp==3.7.0 ; sys_platform == 'linux'\n")
    command = ("pip", "compile", "--universal", "--format", "pylock.toml", "--quiet")
    uv_run(tmp_path, *command, "--output-file", "pylock.toml", "r.in")
    spec = given(tmp_path, pylock="pylock.toml")
    assert set(spec["hashes"]) == {"six", "zipp"}
    files = exported(settings, spec)
    found = versions(files["uv.lock"])
    assert (found["six"], found["zipp"]) == ("1.15.0", "3.7.0")
    assert "[[tool.uv.index]]" not in files["pyproject.toml"]


def test_a_compiled_file_with_hashes_is_taken_as_it_is(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "r.in").write_text("importlib-metadata<8\n")  # needs zipp, which has a hash too
    command = ("pip", "compile", "--universal", "--generate-hashes", "--emit-index-url", "--quiet")
    uv_run(tmp_path, *command, "--output-file", "r.txt", "r.in")
    assert "zipp" in (tmp_path / "r.txt").read_text()
    spec = given(tmp_path, requirements="r.txt")
    assert {"importlib-metadata", "zipp"} <= set(spec["hashes"])
    assert "default = true" in spec["pyproject"]
    exported(settings, spec)


def test_packages_of_another_index_are_found_there(
    settings: Settings, tmp_path: Path, index: tuple[str, str]
) -> None:
    address, sha256 = index
    texts = {
        "extra.txt": f"own-part\nsix\n--extra-index-url {address}\n",
        "links.txt": f"own-part==1.0 --hash=sha256:{sha256}\n-f {address}/own-part/\n",
        "pylock.toml": 'lock-version = "1.0"\ncreated-by = "test"\n[[packages]]\n'
        f'name = "own-part"\nversion = "1.0"\nindex = "{address}"\n'
        "marker = \"python_version >= '3'\"\n"
        f'wheels = [{{ name = "x", hashes = {{ sha256 = "{sha256}" }} }}]\n',
    }
    specs = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        specs[name] = given(tmp_path, **{"pylock" if "pylock" in name else "requirements": name})

    async def act(manager: EnvManager) -> Any:
        told = {}
        for name, spec in specs.items():
            await manager.create_env(variant_id=name, spec=spec)
            told[name] = (await manager.export_env(variant_id=name))["files"]["uv.lock"]
        return told

    for name, lock in managed(settings, act).items():
        assert versions(lock)["own-part"] == "1.0", name
