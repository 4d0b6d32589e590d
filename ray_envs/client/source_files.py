"""Reads the file that a spec names: a requirements file with all that it names, script or pylock.

The parsers are `decisions.requirements_file`, `scripts` and `pylocks`. Projects are in `inputs`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ray_envs.client.texts import read_text, read_utf8
from ray_envs.decisions.entries import Include, Local, Setting, Wanted
from ray_envs.decisions.pylocks import from_pylock
from ray_envs.decisions.requirements_file import entries_of
from ray_envs.decisions.scripts import from_script
from ray_envs.decisions.sources import Asked, from_requirements
from ray_envs.disk.files import kind_of
from ray_envs.errors import InvalidInput, InvalidPackages

_CONDA_HINT = (
    "list its pip packages in a requirements file, e.g. with `pip freeze` inside the environment; "
    "ray_envs installs from package indexes only"
)
_PROJECT_HINT = "give its folder as a project: project = …, or --project"
#: What people give in place of a requirements file.
_HINTS = {
    "pyproject.toml": _PROJECT_HINT,
    "uv.lock": _PROJECT_HINT,
    "pipfile": "write its packages into a requirements file: `pipenv requirements`",
    "pipfile.lock": "write its packages into a requirements file: `pipenv requirements --hash`",
    "poetry.lock": "write its packages into a requirements file: `poetry export`",
    "pdm.lock": "write its packages into a requirements file: `pdm export`",
    "pixi.toml": _CONDA_HINT,
    "pixi.lock": _CONDA_HINT,
    "setup.py": "name its packages in a requirements file, or publish a wheel of it",
    "setup.cfg": "name its packages in a requirements file, or publish a wheel of it",
}
_ENDS = (
    ((".yml", ".yaml"), _CONDA_HINT),
    ((".py",), "for a script with a `# /// script` block: script = …, or --script"),
    ((".whl", ".gz", ".zip", ".bz2", ".xz"), "publish it to an index, and name the package"),
)
_PYLOCK = re.compile(r"pylock\.([^.]+\.)?toml")
#: One of them is in the folder of every package.
_PROJECT_FILES = ("pyproject.toml", "setup.py", "setup.cfg")
#: No person nests files so deeply.
_DEEPEST = 100


@dataclass(slots=True)
class Gathered:
    """The entries of a requirements file and of all files that it names."""

    wanted: list[Wanted] = field(default_factory=list)
    constraints: list[Wanted] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    #: Each with the folder that its path is relative to; see `_folder_of`.
    locals: list[tuple[Local, Path]] = field(default_factory=list)


def read_requirements(path: Path) -> tuple[Asked, tuple[tuple[Local, Path], ...]]:
    """Return what a requirements file asks for, and its local entries with their folders.

    Raises:
        InvalidInput: a file cannot be read, is not a requirements file, or names itself.
        InvalidPackages: a line cannot be accepted.
    """
    found = gathered(path)
    locals_ = tuple(found.locals)
    asked = from_requirements(
        found.wanted, found.constraints, found.settings, [local for local, _ in locals_]
    )
    return asked, locals_


def gathered(path: Path) -> Gathered:
    """Return the entries of a requirements file and of the files that it names.

    Raises: see `read_requirements`.
    """
    if kind_of(path) == "folder":
        raise InvalidInput(
            "the requirements file is a folder",
            where=str(path),
            hint="for a folder with a pyproject.toml write project = … instead",
        )
    found = Gathered()
    _gather(path, found, is_constraint=False, around=(), done=set())
    return found


def _gather(
    path: Path,
    found: Gathered,
    *,
    is_constraint: bool,
    around: tuple[str, ...],
    done: set[tuple[str, bool]],
) -> None:
    """Add the entries of `path` to `found`. `around` are the files that name it, outermost first.

    A file that is named twice is read once.
    """
    _check_name(path)
    text, here = read_text(path), os.path.realpath(path)
    if (here, is_constraint) in done:
        return
    for entry in entries_of(text, file=str(path)):
        if isinstance(entry, Wanted):
            (found.constraints if is_constraint else found.wanted).append(entry)
        elif isinstance(entry, Local):
            found.locals.append((entry, _folder_of(entry, path.parent)))
        elif isinstance(entry, Setting):
            found.settings.append(entry)
        else:
            inner = path.parent / entry.path
            _check_include(entry, inner, (*around, here))
            _gather(
                inner, found, is_constraint=entry.is_constraint, around=(*around, here), done=done
            )
    done.add((here, is_constraint))


def _folder_of(local: Local, folder: Path) -> Path:
    """Return the folder that a local path is relative to.

    That is the `folder` of its file, or else the nearest one above it where the path leads to a
    package. pip takes the folder that it is called in: `-e .` in requirements/dev.txt is written
    for the folder of the project.
    """
    path = os.path.expanduser(local.path)
    for place in (folder, *Path(os.path.abspath(folder)).parents):
        target = place / path
        files = (target, *(target / name for name in _PROJECT_FILES))
        if any(kind_of(file) == "file" for file in files):
            return place
    return folder


def _check_include(entry: Include, inner: Path, around: tuple[str, ...]) -> None:
    real = os.path.realpath(inner) if kind_of(inner) != "missing" else ""
    if not real:
        raise InvalidInput(
            f"it names the file {entry.path}, which does not exist",
            where=entry.where,
            hint=f"the path is relative to the file that names it: {inner}",
        )
    if real in around:
        names = [os.path.basename(each) for each in (*around[around.index(real) :], real)]
        raise InvalidInput(
            f"the files name each other in a circle: {' -> '.join(names)}",
            where=entry.where,
            hint="remove this line",
        )
    if len(around) >= _DEEPEST:
        raise InvalidInput(
            f"more than {_DEEPEST} files name each other", where=entry.where, hint="name one file"
        )


def _check_name(path: Path) -> None:
    """Refuse a file that is surely of another kind, with advice."""
    name = path.name.lower()
    hint = _HINTS.get(name) or next((hint for ends, hint in _ENDS if name.endswith(ends)), "")
    if _PYLOCK.fullmatch(name):
        hint = "give it as a lock file: pylock = …, or --pylock"
    if hint and kind_of(path) != "missing":
        raise InvalidInput("this is not a requirements file", where=str(path), hint=hint)


def read_names(path: Path, *, variant: str, may_have_hashes: bool) -> tuple[str, ...]:
    """Return the requirements of a file that has nothing else, for a change of a variant.

    Raises:
        InvalidInput: see `read_requirements`.
        InvalidPackages: a line cannot be accepted, or is a setting, constraint or local path; or
            has hashes, unless it may.
    """
    found = gathered(path)
    refused = [
        *((f"the option {each.name}", each.where) for each in found.settings),
        *((f"the constraint {each.line!r}", each.where) for each in found.constraints),
        *((f"the local path {local.path!r}", local.where) for local, _ in found.locals),
        *(
            (f"the hash of {each.line!r}", each.where)
            for each in found.wanted
            if each.hashes and not may_have_hashes
        ),
    ]
    for what, where in refused:
        raise InvalidPackages(
            f"{what} concerns a whole environment, and cannot be added to one",
            where=where,
            hint=f"make the variant again: ray-envs create {variant} -r {path} --replace",
        )
    return tuple(sorted({each.line for each in found.wanted}))


def read_script(path: Path) -> tuple[Asked, str | None]:
    """Return what the block in a script asks for, and the text of the script's lock, if any.

    Raises:
        InvalidInput: a file cannot be read, or the block cannot.
        InvalidPackages: a dependency cannot be accepted.
    """
    asked = from_script(read_text(path), file=str(path))
    lock = path.with_name(f"{path.name}.lock")
    return asked, read_utf8(lock) if kind_of(lock) != "missing" else None


def read_pylock(path: Path) -> Asked:
    """Return what a pylock.toml asks for.

    Raises:
        InvalidInput: the file cannot be read, has another name, or is not of this format.
        InvalidPackages: a package cannot be accepted.
    """
    name = path.name.lower()
    if not _PYLOCK.fullmatch(name) and kind_of(path) == "file":
        hint = _HINTS.get(name, "rename it, or give it as what it is: --requirements, --project")
        raise InvalidInput(
            "the name is neither pylock.toml nor pylock.NAME.toml", where=str(path), hint=hint
        )
    return from_pylock(read_utf8(path), file=str(path))
