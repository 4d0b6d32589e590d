"""Reads a uv.lock: what it installs on a platform, and the key of that environment.

`resolving` makes the project that uv locks; the manager's `registry` keeps the texts. The format of
`uv.lock` is version 1 of uv's, markers from PEP 508, wheel names from the packaging specifications.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ray_envs.decisions.choices import Choice, LockMarkers, check_lock_choice
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.errors import InvalidInput, InvalidPackages, ResolutionFailed
from ray_envs.models import RAY_GROUP, Installed, Platform, Target

#: A package of a lock and one of its extras; "" for the package without any.
End = tuple[dict[str, Any], str]


def installed(
    lock: str, platform: Platform, *, extras: Iterable[str] = (), groups: Iterable[str] = ()
) -> tuple[Installed, ...]:
    """Return what uv installs from `lock` on `platform`, by name, without the project itself.

    Raises:
        InvalidInput: `lock` is not the uv.lock of a project.
        ResolutionFailed: a package has no file for this platform, or no hash pins its content; the
            project is not for this platform; extras and groups exclude each other; or they need
            two versions of a package.
    """
    wanted_extras = {str(canonicalize_name(name)) for name in extras}
    wanted_groups = {str(canonicalize_name(name)) for name in (RAY_GROUP, *groups)}
    return _found(lock, platform, wanted_extras, wanted_groups)


def _found(
    lock: str, platform: Platform, extras: set[str], groups: set[str]
) -> tuple[Installed, ...]:
    data = parsed_toml(lock, where="uv.lock")
    _check_supported(data, platform)
    packages = _walk(data, platform, extras, groups)
    _check_versions(packages)
    best_wheel = _wheel_chooser(platform)
    found = [_installed(package, platform, best_wheel) for package in packages]
    return tuple(sorted(found, key=lambda item: (item.name, item.version)))


def check_hashes(
    lock: str,
    platform: Platform,
    hashes: Mapping[str, Collection[str]],
    *,
    extras: Iterable[str] = (),
    groups: Iterable[str] = (),
) -> None:
    """Check that `lock` installs only files with the `hashes` of a definition, if it has any.

    What only the cluster's Ray needs does not count: the file with the hashes does not name it.

    Raises:
        InvalidPackages: a package has another file, or none of the hashes is for it.
        InvalidInput, ResolutionFailed: see `installed`.
    """
    if not hashes:
        return
    wanted_extras = {str(canonicalize_name(name)) for name in extras}
    wanted_groups = {str(canonicalize_name(name)) for name in groups} - {RAY_GROUP}
    wrong = [
        package
        for package in _found(lock, platform, wanted_extras, wanted_groups)
        if package.pin not in hashes.get(package.name, ())
    ]
    if wrong:
        names = ", ".join(package.name for package in wrong)
        raise InvalidPackages(
            f"the locked files of these packages are not among the hashes: {names}",
            where="hashes",
            detail="\n".join(
                f"{package.name} {package.version}: {package.pin} is locked, and "
                + (
                    "it is none of the given hashes"
                    if hashes.get(package.name)
                    else "no hash is given"
                )
                for package in wrong
            ),
            hint="compile the file again with `uv pip compile --generate-hashes`, and create the "
            "variant with it (--replace)",
        )


def moved_pins(
    before: str, after: str, platform: Platform, *, ignored: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the packages that `after` installs in another version than `before`.

    Names in `ignored` are not compared: local packages have the version of now.

    Returns:
        Lines such as "packaging 21.0 -> 26.3", sorted. A package that `before` does not have is
        not listed.

    Raises `InvalidInput`: one of the texts is not a uv.lock.
    """
    markers = LockMarkers(platform)
    old: dict[str, list[str]] = {}
    for package in parsed_toml(before, where="uv.lock").get("package", []):
        if _is_used(package, markers, None):
            old.setdefault(package["name"], []).append(package.get("version", ""))
    moved = []
    for package in _walk(parsed_toml(after, where="uv.lock"), platform, None, None):
        versions, version = old.get(package["name"]), package.get("version", "")
        if versions is not None and version not in versions and package["name"] not in ignored:
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
    data = parsed_toml(lock, where="uv.lock")
    packages = data.get("package", [])
    if (
        not isinstance(data.get("version"), int)
        or not isinstance(packages, list)
        or not all(map(_is_package, packages))
    ):
        raise InvalidInput(
            "this is no lock file of uv", where="uv.lock", hint="make one with `uv lock`"
        )


def _is_package(entry: Any) -> bool:
    """Whether an entry of a lock has the form of a package, as far as all are read here."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    markers = entry.get("resolution-markers", [])
    is_marked = isinstance(markers, list) and all(isinstance(each, str) for each in markers)
    return is_marked and isinstance(entry.get("version", ""), str)


def _check_supported(lock: Mapping[str, Any], platform: Platform) -> None:
    """Refuse a lock of a project whose `[tool.uv] environments` leave this platform out."""
    supported, markers = lock.get("supported-markers", []), LockMarkers(platform)
    if supported and not any(markers.hold(marker, ()) for marker in supported):
        here = platform.markers.get("sys_platform", "")
        raise ResolutionFailed(
            f"the project is not for {platform.name}: environments = {json.dumps(supported)}",
            where="pyproject.toml: tool.uv.environments",
            hint=f"add an entry that holds here, such as \"sys_platform == '{here}'\", "
            "or remove the list",
        )


def _check_versions(packages: Iterable[Mapping[str, Any]]) -> None:
    """Refuse two versions of one package: uv 0.13 finds that for some sets of conflicts."""
    versions: dict[str, str] = {}
    for package in packages:
        name, version = package["name"], package.get("version", "")
        if name in versions:
            raise ResolutionFailed(
                f"{name} would be installed twice, as {versions[name]} and {version}",
                where="uv.lock",
                hint="the chosen extras and groups need both: list them in [tool.uv] conflicts, or "
                "change what they ask for",
            )
        versions[name] = version


def _is_used(
    package: Mapping[str, Any], markers: LockMarkers, active: Collection[str] | None
) -> bool:
    """Whether a package entry applies to the platform; a lock may have several of one name."""
    ours = package.get("resolution-markers")
    return not ours or any(markers.hold(marker, active) for marker in ours)


def _walk(
    lock: Mapping[str, Any], platform: Platform, extras: set[str] | None, groups: set[str] | None
) -> list[dict[str, Any]]:
    """Return what the root of `lock` needs on `platform`; None means all extras and groups.

    Raises:
        InvalidInput: `lock` is not the uv.lock of a project.
        ResolutionFailed: extras and groups that are needed exclude each other.
    """
    for root in lock.get("package", []):
        if root.get("source") in ({"virtual": "."}, {"editable": "."}):
            break
    else:
        raise InvalidInput("there is no project in the lock", where="uv.lock", hint="run `uv lock`")
    graph, name = _Graph(lock, platform), root["name"]
    optional = _wanted(root.get("optional-dependencies", {}), extras)
    grouped = _wanted(root.get("dev-dependencies", {}), groups)
    active: set[str] | None = None
    if extras is not None and groups is not None:
        # To uv, what has no requirements, and so no table in a lock, is never active. It can
        # exclude others nevertheless.
        chosen = {Choice(name, "project").in_lock}
        chosen |= {Choice(name, "extra", extra).in_lock for extra in extras}
        chosen |= {Choice(name, "group", group).in_lock for group in groups}
        check_lock_choice(lock, chosen)
        active = {Choice(name, "project").in_lock}
        active |= {Choice(name, "extra", extra).in_lock for extra in optional}
        active |= {Choice(name, "group", group).in_lock for group in grouped}
    has_conflicts = active is not None and bool(lock.get("conflicts"))
    starts: list[End] = [(root, ""), *((root, extra) for extra in optional)]
    for edge in itertools.chain(*grouped.values()):
        starts += graph.ends(edge, active, learns=has_conflicts)
    if active is not None and has_conflicts:
        # Packages ask for extras, too, and edges ask which are active: find all of them first.
        graph.needed(starts, active, learns=True)
        check_lock_choice(lock, active)
    return [package for package in graph.needed(starts, active) if package is not root]


def _wanted(table: Mapping[str, Any], wanted: set[str] | None) -> dict[str, list[Any]]:
    return {
        str(canonicalize_name(name)): edges
        for name, edges in table.items()
        if wanted is None or canonicalize_name(name) in wanted
    }


class _Graph:
    """The packages of a lock, and the edges between them that hold on a platform.

    The order in which edges are followed is that of uv 0.13, in `Installable::to_resolution`.
    """

    def __init__(self, lock: Mapping[str, Any], platform: Platform) -> None:
        self._markers = LockMarkers(platform)
        self._by_name: dict[str, list[dict[str, Any]]] = {}
        for package in lock.get("package", []):
            self._by_name.setdefault(package["name"], []).append(package)

    def needed(
        self, starts: Iterable[End], active: set[str] | None, *, learns: bool = False
    ) -> list[dict[str, Any]]:
        """Return the packages that `starts` need, themselves included.

        With `learns`, each extra that an edge asks for is added to `active`.
        """
        queue = deque(starts)
        seen = {(id(package), extra): package for package, extra in queue}
        while queue:
            package, extra = queue.popleft()
            optional = package.get("optional-dependencies", {})
            for edge in optional.get(extra, []) if extra else package.get("dependencies", []):
                for end in self.ends(edge, active, learns=learns):
                    if (id(end[0]), end[1]) not in seen:
                        seen[id(end[0]), end[1]] = end[0]
                        queue.append(end)
        return [package for (_, extra), package in seen.items() if not extra]

    def ends(
        self, edge: Mapping[str, Any], active: set[str] | None, *, learns: bool = False
    ) -> list[End]:
        """Return the package of an edge, alone and with each extra; nothing if it does not hold."""
        extras = edge.get("extra", ())
        if learns and active is not None:
            asked = {Choice(edge["name"], "extra", extra).in_lock for extra in extras}
            if not self._markers.hold(edge.get("marker", ""), active | asked):
                return []
            active |= asked
        elif not self._markers.hold(edge.get("marker", ""), active):
            return []
        package = self._package(edge, active)
        return [(package, ""), *((package, extra) for extra in extras)]

    def _package(self, edge: Mapping[str, Any], active: set[str] | None) -> dict[str, Any]:
        found = self._by_name.get(edge["name"], [])
        for field in ("version", "source"):
            if len(found) > 1 and field in edge:
                found = [package for package in found if package.get(field) == edge[field]]
        used = [each for each in found if _is_used(each, self._markers, active)] or found
        if not used:
            raise InvalidInput(f"{edge['name']} is missing", where="uv.lock", hint="run `uv lock`")
        return used[0]


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
