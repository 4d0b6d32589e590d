"""An environment's wheels in one file, for clusters without a way to a package index.

A tar file: `bundle.json` (its content and platform), the texts of the project, a stream for each
wheel (`sending`, `receiving`), and `bundle.sha256`. No file is extracted by a name in it.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ray_envs.decisions.packs import CHUNK_BYTES, MadeFor, Manifest
from ray_envs.decisions.parsing import parsed_json
from ray_envs.disk.files import kind_of, storage_errors, sync_folder, unreadable
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.node import sending
from ray_envs.node.uv_cache import UvCache
from ray_envs.validation import Model, validated

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Rises when a reader of the old form would misread the new one.
FORMAT = 1

_HEADER, _TRAILER = "bundle.json", "bundle.sha256"
#: More than any header or text has, in bytes: what is larger is not read into memory.
_MAX_BYTES = 256 * 1024 * 1024
#: A guess: far more than any environment has wheels.
_MAX_MEMBERS = 10_000
_HINT = "write it again with `ray-envs export --bundle`, and compare its size after copying"

#: What `tarfile` raises for damaged headers: not only its own errors.
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)

_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class _Text(Model):
    size: int = Field(ge=0, le=_MAX_BYTES)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Header(Model):
    format: int
    made_for: MadeFor
    #: The version of Ray that the environment holds.
    ray: str
    files: dict[_FileName, _Text]
    wheels: tuple[Manifest, ...]

    @model_validator(mode="after")
    def _is_of_one_machine(self) -> _Header:
        for each in self.wheels:
            if each.wheel.made_for != self.made_for:
                raise ValueError(f"{each.wheel} was prepared for another machine than the bundle")
        return self

    def members(self) -> list[tuple[str, int]]:
        """The names and sizes of what stands between header and trailer, in order."""
        texts = [(name, text.size) for name, text in self.files.items()]
        return texts + [
            (f"wheels/{number:04}-{each.wheel.package.name}", each.offsets[-1])
            for number, each in enumerate(self.wheels)
        ]


class Bundle:
    """An open bundle; see `read_bundle`."""

    def __init__(self, file: IO[bytes], header: _Header, places: Sequence[int]) -> None:
        self._file = file
        self.made_for = header.made_for
        #: The version of Ray that the environment holds.
        self.ray = header.ray
        self.manifests = header.wheels
        #: The texts of the project, by file name.
        self.files: dict[str, bytes] = {}
        for (name, text), place in zip(header.files.items(), places, strict=False):
            file.seek(place)
            content = file.read(text.size)
            if hashlib.sha256(content).hexdigest() != text.sha256:
                raise InvalidInput(f"{name} in it is damaged", hint=_HINT)
            self.files[name] = content
        self._places = dict(
            zip((each.identity for each in header.wheels), places[len(header.files) :], strict=True)
        )

    def chunks(self, manifest: Manifest) -> Iterator[bytes]:
        """The stream of one of the `manifests`. The receiver checks it."""
        place, left = self._places[manifest.identity], manifest.offsets[-1]
        while left:
            with storage_errors("read the bundle"):
                self._file.seek(place)
                chunk = self._file.read(min(left, manifest.chunk_bytes))
            if not chunk:  # the file has become shorter; the receiver raises
                return
            place, left = place + len(chunk), left - len(chunk)
            yield chunk


def write_bundle(
    path: Path,
    cache: UvCache,
    manifests: Iterable[Manifest],
    files: Mapping[str, str | bytes],
    *,
    ray: str,
) -> None:
    """Write a bundle to `path`, completely or not at all; a file there is replaced.

    Raises:
        LockTimeout: the cache is being pruned for longer than it waits.
        StorageFailed: it cannot be written, or a wheel has gone.
    """
    texts = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    header = _Header(
        format=FORMAT,
        made_for=sending.made_here(),
        ray=ray,
        files={
            name: _Text(size=len(text), sha256=hashlib.sha256(text).hexdigest())
            for name, text in texts.items()
        },
        wheels=tuple(manifests),
    )
    head = header.model_dump_json(indent=1).encode()
    streams: list[IO[bytes]] = [io.BytesIO(text) for text in texts.values()]
    streams += [io.BufferedReader(_Stream(cache, each), CHUNK_BYTES) for each in header.wheels]
    scratch = None
    try:
        with cache.in_use():
            fd, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(fd, "wb") as file:
                _write(file, header, head, streams)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
            sync_folder(path.parent)
    except OSError as exc:
        raise StorageFailed(
            f"the bundle cannot be written: {exc.strerror or exc}",
            where=str(path),
            hint="name a file in a folder that exists, is writable and has room",
        ) from exc
    finally:
        if scratch is not None:
            with suppress(OSError):  # it has its name by now
                os.unlink(scratch)


def _write(file: IO[bytes], header: _Header, head: bytes, streams: Iterable[IO[bytes]]) -> None:
    """Write the members of a bundle: its header, its texts and wheels, and the header's hash."""
    digest = hashlib.sha256(head).hexdigest().encode() + b"\n"
    with tarfile.open(fileobj=file, mode="w:") as archive:
        _add(archive, _HEADER, len(head), io.BytesIO(head))
        for (name, size), stream in zip(header.members(), streams, strict=True):
            _add(archive, name, size, stream)
        _add(archive, _TRAILER, len(digest), io.BytesIO(digest))


@contextmanager
def read_bundle(path: Path) -> Iterator[Bundle]:
    """Open a bundle. Its texts are checked; its wheels are, when they are received.

    Raises:
        InvalidInput: there is no such file, it is no bundle, it is damaged or incomplete, or a
            newer ray_envs wrote it. The error names the file, also where it comes from receiving
            one of the wheels inside the block.
    """
    kind = kind_of(path)
    if kind != "file":
        what = "does not exist" if kind == "missing" else "is no regular file"
        raise InvalidInput(f"the bundle {what}", where=str(path), hint="name a bundle's file")
    with ExitStack() as exits:
        try:
            try:
                file = exits.enter_context(path.open("rb"))
                bundle = _opened(file, exits.enter_context(tarfile.open(fileobj=file, mode="r:")))
            except _DAMAGED as exc:
                reason = f"this is no bundle, or not all of it: {exc}"
                raise InvalidInput(reason, hint=_HINT) from exc
            except OSError as exc:
                raise unreadable(path, exc) from exc
            yield bundle
        except InvalidInput as exc:
            raise exc.about(where=str(path)) from exc


def _opened(file: IO[bytes], archive: tarfile.TarFile) -> Bundle:
    following = _members(archive)
    first = next(following, None)
    if first is None or first.name != _HEADER or first.size > _MAX_BYTES:
        raise InvalidInput("this is no bundle of ray_envs", hint=_HINT)
    file.seek(first.offset_data)
    head = file.read(first.size)
    try:
        data = parsed_json(head, where=_HEADER)
        found = data["format"]
    except (InvalidInput, KeyError, TypeError):
        raise InvalidInput(f"{_HEADER} in it is damaged", hint=_HINT) from None
    if found != FORMAT:
        raise InvalidInput(
            f"it has the format {found!r}; this ray_envs reads {FORMAT}",
            hint="update ray_envs here, or write the bundle with this version of it",
        )
    members = [first, *following]
    if members[-1].name != _TRAILER:
        raise InvalidInput("the bundle is incomplete", hint=_HINT)
    file.seek(members[-1].offset_data)
    if file.read(64) != hashlib.sha256(head).hexdigest().encode():
        raise InvalidInput(f"{_HEADER} in it is damaged", hint=_HINT)
    header = validated(_Header, data, where="")
    inner = members[1:-1]
    if [(each.name, each.size) for each in inner if each.isreg()] != header.members():
        raise InvalidInput(f"it does not hold what its {_HEADER} says", hint=_HINT)
    return Bundle(file, header, [each.offset_data for each in inner])


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members; `tarfile` alone would go back by a negative size, and never end."""
    for count, member in enumerate(iter(archive.next, None)):
        if member.size < 0 or archive.offset <= member.offset:
            raise tarfile.ReadError("a member ends before it begins")
        if count == _MAX_MEMBERS:
            raise tarfile.ReadError(f"it has more than {_MAX_MEMBERS} members")
        yield member


def _add(archive: tarfile.TarFile, name: str, size: int, stream: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    archive.addfile(info, stream)


class _Stream(io.RawIOBase):
    """The stream of a wheel, as a file to be read."""

    def __init__(self, cache: UvCache, manifest: Manifest) -> None:
        self._cache, self._manifest, self._offset = cache, manifest, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        part = sending.read_range(self._cache, self._manifest, self._offset, len(view))
        view[: len(part)] = part
        self._offset += len(part)
        return len(part)
