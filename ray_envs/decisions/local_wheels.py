"""What a wheel of local files is: its description, its one archive, its place in a definition.

Under a root it lies at `wheels/<sha256>/<file name>`, so that the path from the scratch folder of
any project below that root is the same on every node. An export has it at `wheels/<file name>`.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.metadata import RawMetadata, parse_email
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ray_envs.errors import InvalidInput
from ray_envs.specs import LocalWheel

#: The size limit of a local wheel, in bytes. A guess: code is kilobytes, and each node gets it.
LIMIT_BYTES = 100 * 1024 * 1024
#: The earliest moment that a zip archive can hold; also as seconds since 1970, for build back ends.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
SOURCE_DATE_EPOCH = 315532800

#: What `zipfile` raises for damaged archives.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, ValueError, EOFError,
    NotImplementedError, KeyError, RuntimeError,
)  # fmt: skip
#: Far more bytes than the metadata of any package has.
_MOST_METADATA = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Described:
    """A wheel, and what its metadata says."""

    wheel: LocalWheel
    requires: tuple[str, ...]
    extras: tuple[str, ...]


def described(filename: str, content: bytes, *, where: str) -> Described:
    """Return what the wheel `content` is, with its content.

    Raises `InvalidInput`: it is no wheel, or larger than `LIMIT_BYTES`.
    """
    metadata = _metadata(filename, content, where=where)
    wheel = LocalWheel(
        name=str(canonicalize_name(metadata.get("name", ""))),
        version=metadata.get("version", ""),
        filename=filename,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        content=content,
    )
    return Described(
        wheel, tuple(metadata.get("requires_dist", ())), tuple(metadata.get("provides_extra", ()))
    )


def normalised(content: bytes, *, where: str) -> bytes:
    """Return the one archive of a wheel's files: equal files give equal bytes.

    Names are sorted, time stamps and modes are fixed, nothing is compressed.

    Raises `InvalidInput`: `content` is no zip archive, or its files have more than `LIMIT_BYTES`.
    """
    packed = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
            files = sorted((each for each in old.infolist() if not each.is_dir()), key=_by_name)
            check_size(sum(each.file_size for each in files), where=where)
            for each in files:
                entry = zipfile.ZipInfo(each.filename, _ZIP_EPOCH)
                entry.create_system = 3  # Unix, whatever this machine is
                is_executable = (each.external_attr >> 16) & 0o111
                entry.external_attr = (stat.S_IFREG | (0o755 if is_executable else 0o644)) << 16
                new.writestr(entry, old.read(each))
    except _DAMAGED as exc:
        raise InvalidInput(f"this is no wheel: {exc}", where=where) from None
    return packed.getvalue()


def check_size(size: int, *, where: str) -> None:
    """Raise `InvalidInput` if a wheel has more than `LIMIT_BYTES`."""
    if size > LIMIT_BYTES:
        raise InvalidInput(
            f"the wheel has {size / 2**20:.1f} MiB, more than {LIMIT_BYTES // 2**20} MiB",
            where=where,
            hint="keep data outside the package, or publish the wheel to a package index",
        )


def check_content(wheel: LocalWheel, content: bytes) -> None:
    """Raise `InvalidInput` if `content` is not the wheel that `wheel` describes."""
    if len(content) != wheel.size or hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise InvalidInput(
            f"the content of {wheel.filename} is not what its definition says",
            hint="export or create the variant again",
        )
    found = described(wheel.filename, content, where=wheel.filename).wheel
    if found.name != wheel.name:
        raise InvalidInput(f"{wheel.filename} holds {found.name}, not {wheel.name}")


def in_export(text: str, wheels: Iterable[LocalWheel]) -> str:
    """Return a text of a definition with the places that its wheels have in an export.

    uv writes their paths in several forms into the formats of other tools.
    """
    for wheel in wheels:
        place = re.escape(f"wheels/{wheel.sha256}/{wheel.filename}")
        text = re.sub(rf"[^\s\"'=]*{place}", f"wheels/{wheel.filename}", text)
    return text


def from_export(text: str, wheels: Iterable[LocalWheel]) -> str:
    """The reverse of `in_export`."""
    for wheel in wheels:
        text = text.replace(f'"wheels/{wheel.filename}"', f'"{wheel.path}"')
    return text


def _metadata(filename: str, content: bytes, *, where: str) -> RawMetadata:
    check_size(len(content), where=where)
    try:
        name, version, _, _ = parse_wheel_filename(filename)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = [
                each
                for each in archive.infolist()
                if each.filename.endswith(".dist-info/METADATA") and each.filename.count("/") == 1
            ]
            is_read = len(found) == 1 and found[0].file_size <= _MOST_METADATA
            text = archive.read(found[0]) if is_read else b""
    except InvalidWheelFilename as exc:
        raise InvalidInput(
            str(exc), where=where, hint="keep the name that its builder gave"
        ) from None
    except _DAMAGED as exc:
        raise InvalidInput(f"this is no wheel: {exc}", where=where) from None
    metadata, _ = parse_email(text)
    if canonicalize_name(metadata.get("name", "")) != name:
        raise InvalidInput(
            f"this is no wheel of {name} {version}: its metadata does not name it", where=where
        )
    return metadata


def _by_name(info: zipfile.ZipInfo) -> str:
    return info.filename
