"""Checks what a spec asks for: requirement strings (PEP 508) and a Python version.

`resolving` writes them into the project that uv locks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from ray_envs.decisions.credentials import check_credentials
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import Target

COMMIT = re.compile(r"[0-9a-fA-F]{40}")
LOCAL_HINT = (
    "give its folder as a project, or as a path in [tool.uv.sources] of one, to `ray-envs create` "
    "or a provider, which build its wheel; or publish a wheel to a package index"
)
_OPTION_HINTS = (
    (
        ("-e", "--editable"),
        "write the path alone, such as ./folder: the package is built as it is now",
    ),
    (("-r", "--requirement"), 'give the file as `requirements = "…"`'),
    (
        ("-c", "--constraint"),
        "write it into a requirements file, or into [tool.uv] constraint-dependencies",
    ),
    (
        ("-i", "--index-url", "--extra-index-url", "--default-index", "--index", "-f"),
        "write it into a requirements file, set UV_DEFAULT_INDEX or UV_INDEX in the environment of "
        "the cluster's nodes, or write [[tool.uv.index]] in a project",
    ),
)


def requirement_lines(
    text_or_lines: str | Iterable[str], *, where: str = "packages"
) -> tuple[str, ...]:
    """Return the requirements of a text in canonical form: sorted, each once.

    Args:
        text_or_lines: a requirements text, or its lines. Blank lines and comments are dropped, a
            backslash at the end continues a line, and "numpy,pandas" is two requirements.
        where: the file or option that holds them, for messages.

    Raises:
        InvalidPackages: an entry is an option, a local path, a repository without a commit, or
            malformed, or has credentials in its URL.
    """
    entries = (part for entry in _entries(text_or_lines) for part in parts_of(entry))
    return tuple(sorted({requirement_line(entry, where=where) for entry in entries}))


def check_python(wanted: str | None, target: Target, *, where: str) -> None:
    """Check that `wanted` admits the cluster's interpreter.

    Raises `InvalidInput`: it excludes that interpreter, or is neither a version nor a specifier.
    """
    if wanted is None:
        return
    text = wanted.strip()
    if re.fullmatch(r"\d+(\.\d+){0,2}", text):
        parts = text.split(".")
        is_admitted = target.python.split(".")[: len(parts)] == parts
    else:
        try:
            # An empty specifier would admit every Python, which a user cannot mean.
            is_admitted = SpecifierSet(text or "?").contains(target.python, prereleases=True)
        except InvalidSpecifier:
            raise InvalidInput(
                f"{wanted!r} is neither a Python version nor a specifier",
                where=where,
                hint="write it like 3.11, 3.11.7 or >=3.11,<3.13",
            ) from None
    if not is_admitted:
        raise InvalidInput(
            f"Python {wanted} is asked for, and the cluster runs Python {target.python}",
            where=where,
            hint=f"ask for {target.python_minor} or leave it out; Ray needs the same Python "
            "everywhere, so another version needs another cluster",
        )


def _entries(text_or_lines: str | Iterable[str]) -> Iterator[str]:
    """Yield the entries of a requirements text, without comments, with continued lines joined."""
    texts = [text_or_lines] if isinstance(text_or_lines, str) else text_or_lines
    pending = ""
    for line in (line for text in texts for line in text.lstrip("\ufeff").splitlines()):
        # As in pip, a backslash does not continue a comment.
        is_comment = line.lstrip().startswith("#")
        if line.endswith("\\") and not is_comment:
            pending += line[:-1]
            continue
        entry = re.sub(r"(^|\s+)#.*", "", pending + ("" if is_comment else line)).strip()
        pending = ""
        if entry:
            yield entry
    if pending.strip():
        yield pending.strip()


def parts_of(entry: str) -> list[str]:
    """Return the requirements of an entry: if it is none itself, its parts between commas."""
    try:
        Requirement(entry)
    except InvalidRequirement:
        if not re.search(r"\s", entry):
            # A comma inside brackets separates extras, not requirements.
            return [part for part in re.split(r",(?![^\[]*\])", entry) if part] or [entry]
    return [entry]


def requirement_line(entry: str, *, where: str) -> str:
    """Return `entry` in canonical form; raise like `requirement_lines`."""
    # This comes first, so that no later message can repeat a secret.
    check_credentials(entry, InvalidPackages, where=where)

    def refused(what: str, hint: str = "") -> InvalidPackages:
        return InvalidPackages(f"{entry!r} {what}", hint=hint, where=where)

    if entry.startswith("-"):
        option, value = re.findall(r"(--[^=\s]+|-.?)[=\s]*(.*)", entry)[0]
        hints = [hint for names, hint in _OPTION_HINTS if option in names]
        hint = (hints or ["leave it out"])[0].replace("…", value)
        raise refused("is an option, not a requirement", hint)
    if re.search(r"\s--[a-z]", entry):
        is_hash = "--hash" in entry
        raise refused(
            "has options of its own",
            "drop the hashes: uv.lock pins every file by its hash" if is_hash else "leave them out",
        )
    head = entry.partition(";")[0].strip()
    is_path = re.match(r"\.|/|~|\\|[A-Za-z]:\\", head) or ("@" not in head and "/" in head)
    is_file = head.lower().endswith((".whl", ".tar.gz", ".zip"))
    if "://" not in head and (is_path or is_file):
        raise refused("is a local path, and other nodes do not have it", LOCAL_HINT)
    try:
        requirement = Requirement(entry)
    except InvalidRequirement as exc:
        if re.match(r"[A-Za-z+]+://", entry):
            raise refused("does not say what it is", 'write "name @ URL"') from None
        reason = str(exc).splitlines()[0]
        raise refused(f"is not a requirement: {reason}", 'write it like "numpy>=1.26"') from None
    if requirement.url is not None:
        problem = _url_problem(requirement.url)
        if problem:
            raise refused(*problem)
    requirement.name = canonicalize_name(requirement.name)
    requirement.extras = {canonicalize_name(extra) for extra in requirement.extras}
    return str(requirement)


def _url_problem(url: str) -> tuple[str, str] | None:
    """Return what is wrong with the URL of a requirement, and a hint; None if it is accepted."""
    scheme, is_absolute, rest = url.partition("://")
    scheme = scheme.lower()
    if not is_absolute or scheme.endswith("file"):
        return "is a local path, and other nodes do not have it", LOCAL_HINT
    if scheme in ("git+https", "git+http", "git+ssh"):
        revision = rest.split("#")[0].rpartition("@")[2]
        if COMMIT.fullmatch(revision):
            return None
        return "may change: it names no commit", "write git+https://…@<commit>, all 40 characters"
    if scheme not in ("https", "http"):
        return f"uses {scheme}, which is not supported", "use https or git+https"
    return None
