"""Reads a uv.lock: what it installs on a platform, and the key of that environment.

`resolving` makes the project that uv locks; the manager's `registry` keeps the texts. The format of
`uv.lock` is version 1 of uv's, markers from PEP 508, wheel names from the packaging specifications.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from packaging.markers import Marker
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ray_envs.decisions.parsing import parsed_toml
from ray_envs.errors import InvalidInput, ResolutionFailed
from ray_envs.models import RAY_GROUP, Installed, Platform, Target


def installed(
    lock: str, platform: Platform, *, extras: Iterable[str] = (), groups: Iterable[str] = ()
) -> tuple[Installed, ...]:
    """Return what uv installs from `lock` on `platform`, by name, without the project itself.

    Raises:
        InvalidInput: `lock` is not the uv.lock of a project.
        ResolutionFailed: a package has no file for this platform, or no hash pins its content.
    """
    wanted_extras = {str(canonicalize_name(name)) for name in extras}
    wanted_groups = {str(canonicalize_name(name)) for name in (RAY_GROUP, *groups)}
    packages = _walk(parsed_toml(lock, where="uv.lock"), platform, wanted_extras, wanted_groups)
    best_wheel = _wheel_chooser(platform)
    found = [_installed(package, platform, best_wheel) for package in packages]
    return tuple(sorted(found, key=lambda item: (item.name, item.version)))


def moved_pins(before: str, after: str, platform: Platform) -> tuple[str, ...]:
    """Return the packages that `after` installs in another version than `before`.

    Returns:
        Lines such as "packaging 21.0 -> 26.3", sorted. A package that `before` does not have is
        not listed.

    Raises `InvalidInput`: one of the texts is not a uv.lock.
    """
    holds = _marker_evaluator(platform)
    old: dict[str, list[str]] = {}
    for package in parsed_toml(before, where="uv.lock").get("package", []):
        if _is_used(package, holds):
            old.setdefault(package["name"], []).append(package.get("version", ""))
    moved = []
    for package in _walk(parsed_toml(after, where="uv.lock"), platform, None, None):
        versions, version = old.get(package["name"]), package.get("version", "")
        if versions is not None and version not in versions:
            moved.append(f"{package['name']} {' or '.join(sorted(versions))} -> {version}")
    return tuple(sorted(moved))


def key_of(
    packages: Iterable[Installed], target: Target, platform: Platform, *, build_options: str = ""
) -> str:
    """Return the key of the environment that holds `packages`: 32 hex characters.

    The key depends on the installed files, in any order, not on the definition: variants that
    install the same files share one environment.
    """
    pins = sorted([item.name, item.version, item.pin] for item in packages)
    parts = [pins, target.python, target.ray, platform.name, build_options]
    text = json.dumps(parts, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def lock_sha256(lock: str) -> str:
    """Return the sha256 (hex) of the text of a lock."""
    return hashlib.sha256(lock.encode()).hexdigest()


def check_lock(lock: str) -> None:
    """Check that a text is a uv.lock, before uv uses it; raise `InvalidInput` if not."""
    if not isinstance(parsed_toml(lock, where="uv.lock").get("version"), int):
        raise InvalidInput(
            "this is no lock file of uv", where="uv.lock", hint="make one with `uv lock`"
        )


def _marker_evaluator(platform: Platform) -> Callable[[str], bool]:
    """Return a function that evaluates a marker on `platform`; each marker is parsed once."""
    environment = {**platform.markers, "extra": ""}
    known: dict[str, bool] = {"": True}

    def holds(marker: str) -> bool:
        if marker not in known:
            known[marker] = Marker(marker).evaluate(environment)
        return known[marker]

    return holds


def _is_used(package: Mapping[str, Any], holds: Callable[[str], bool]) -> bool:
    """Whether a package entry applies to the platform; a lock may have several of one name."""
    markers = package.get("resolution-markers")
    return not markers or any(holds(marker) for marker in markers)


def _walk(
    lock: Mapping[str, Any], platform: Platform, extras: set[str] | None, groups: set[str] | None
) -> list[dict[str, Any]]:
    """Return what the root of `lock` needs on `platform`; None means all extras or groups."""
    holds = _marker_evaluator(platform)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for package in lock.get("package", []):
        by_name.setdefault(package["name"], []).append(package)
    for root in lock.get("package", []):
        if root.get("source") in ({"virtual": "."}, {"editable": "."}):
            break
    else:
        raise InvalidInput("there is no project in the lock", where="uv.lock", hint="run `uv lock`")

    def chosen(edge: Mapping[str, Any]) -> dict[str, Any]:
        found = by_name.get(edge["name"], [])
        for field in ("version", "source"):
            if len(found) > 1 and field in edge:
                found = [package for package in found if package.get(field) == edge[field]]
        used = [package for package in found if _is_used(package, holds)] or found
        if not used:
            raise InvalidInput(f"{edge['name']} is missing", where="uv.lock", hint="run `uv lock`")
        return used[0]

    edges = list(root.get("dependencies", []))
    for table, wanted in (("optional-dependencies", extras), ("dev-dependencies", groups)):
        for name, more in root.get(table, {}).items():
            if wanted is None or canonicalize_name(name) in wanted:
                edges += more
    seen: dict[tuple[int, str], dict[str, Any]] = {(id(root), ""): root}
    while edges:
        edge = edges.pop()
        if not holds(edge.get("marker", "")):
            continue
        package = chosen(edge)
        for extra in ("", *edge.get("extra", ())):
            if (id(package), extra) not in seen:
                seen[id(package), extra] = package
                optional = package.get("optional-dependencies", {})
                edges += optional.get(extra, []) if extra else package.get("dependencies", [])
    return [package for (_, extra), package in seen.items() if not extra and package is not root]


def _wheel_chooser(
    platform: Platform,
) -> Callable[[Iterable[Mapping[str, Any]]], Mapping[str, Any] | None]:
    """Return a function that picks the wheel that uv installs on `platform`, or None."""
    rank = {tag: index for index, tag in enumerate(platform.tags)}
    parts = [set(column) for column in zip(*(tag.split("-") for tag in rank), strict=True)]

    def choose(wheels: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        best: tuple[Any, ...] | None = None
        found = None
        for wheel in wheels:
            name = unquote(wheel.get("filename") or wheel.get("url") or wheel.get("path") or "")
            name = name.split("#")[0].rpartition("/")[2]
            # Most wheels are for other platforms. Parsing a name is slow: look at its parts first.
            columns = name.removesuffix(".whl").rsplit("-", 3)[1:]
            if any(
                known.isdisjoint(c.split(".")) for known, c in zip(parts, columns, strict=False)
            ):
                continue
            try:
                _, _, build, tags = parse_wheel_filename(name)
            except InvalidWheelFilename:
                continue
            ranks = [rank[str(tag)] for tag in tags if str(tag) in rank]
            if ranks and (best is None or (-min(ranks), build) > best):
                best, found = (-min(ranks), build), wheel
        return found

    return choose


def _installed(
    package: Mapping[str, Any],
    platform: Platform,
    best_wheel: Callable[[Iterable[Mapping[str, Any]]], Mapping[str, Any] | None],
) -> Installed:
    name, version = package["name"], package.get("version", "")
    source = package.get("source", {})
    wheel = best_wheel(package.get("wheels", ()))
    pin = ""
    if wheel is not None:
        pin = wheel.get("hash", "")
    elif "sdist" in package:
        pin = package["sdist"].get("hash", "")
    elif "git" in source:
        url, _, commit = source["git"].partition("#")
        folder = re.search(r"[?&](subdirectory=[^&]+)", url)
        pin = f"git:{commit}" + (f":{folder[1]}" if folder else "")
    elif "url" in source:
        pin = source["url"].partition("#")[2].replace("=", ":")
    if not pin:
        raise ResolutionFailed(
            f"{name} {version} has no wheel and no source archive for {platform.name} "
            "whose content is pinned",
            where="uv.lock",
            hint="choose a version that has one, or exclude the package here with a marker",
        )
    return Installed(name=name, version=version, pin=pin, is_built=wheel is None)
