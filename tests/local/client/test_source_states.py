"""When a local package counts as changed: its own files, and what git says of its version."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ray_envs.client.source_states import state_of

COMMIT = "commit -q --allow-empty -m more"


def run(folder: Path, command: str) -> None:
    """Run git, or another command of the shell, in `folder`."""
    if command.startswith("git "):
        command = f"git -c user.name=a -c user.email=a@b.invalid {command[4:]}"
    subprocess.run(["sh", "-ec", command], cwd=folder, check=True, timeout=60, capture_output=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two packages, a tag and a packed tag."""
    folder = tmp_path_factory.mktemp("original")
    for name in ("one", "two"):
        (folder / name / "src").mkdir(parents=True)
        (folder / name / "src" / "x.py").write_text("x = 1\n")
    run(folder, "git init -q && git add .")
    for command in (COMMIT, "tag v0", "pack-refs --all", COMMIT, "tag v1"):
        run(folder, f"git {command}")
    return folder


@pytest.fixture
def repository(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "repository"))


@pytest.mark.parametrize(
    ("command", "is_changed"),
    [
        ("echo more >> one/src/x.py", True),
        ("echo > one/src/y.py", True),
        ("rm one/src/x.py", True),
        ("mv one/src/x.py one/src/z.py", True),
        ("touch -d @1 one/src/x.py", True),
        ("mkdir one/src/empty", False),
        ("echo more >> two/src/x.py", False),
        ("mkdir one/build one/.venv one/x.egg-info && touch one/build/x one/.venv/x", False),
        ("git status && git log && git diff", False),
        ("git gc -q --prune=now && git pack-refs --no-all", True),
        ("git tag v2", True),
        ("git tag -d v1", True),
        ("git tag -d v0", True),
        (f"git {COMMIT}", True),
        ("git checkout -q --detach v0", True),
        ("git update-ref refs/remotes/origin/main HEAD", False),
        ("git config user.name b", False),
    ],
)
def test_what_a_build_may_depend_on_changes_the_state(
    repository: Path, command: str, is_changed: bool
) -> None:
    before = state_of(repository / "one")
    assert state_of(repository / "one") == before
    run(repository, command)
    assert (state_of(repository / "one") != before) == is_changed


def test_a_worktree_has_the_tags_of_its_repository_and_a_head_of_its_own(repository: Path) -> None:
    run(repository, "git worktree add -q ../other")
    other = repository.parent / "other"
    states = [state_of(other)]
    run(repository, "git tag v2")
    states.append(state_of(other))
    run(other, "git checkout -q --detach v0")
    states.append(state_of(other))
    assert len({*states}) == 3


@pytest.mark.parametrize("text", ["", "gitdir: ", "gitdir: none", "nonsense", "gitdir: \0", "\xff"])
def test_a_repository_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / ".git").write_bytes(text.encode("latin-1"))
    (tmp_path / "x.py").touch()
    before = state_of(tmp_path)
    assert state_of(tmp_path) == before
    (tmp_path / "y.py").touch()
    assert state_of(tmp_path) != before


def test_a_file_is_its_own_state(tmp_path: Path) -> None:
    file = tmp_path / "x.tar.gz"
    file.write_bytes(b"1")
    before = state_of(file)
    file.write_bytes(b"12")
    assert state_of(file) != before
