"""Wheels from node to node: one agent sends, others receive, in pieces, through Ray objects.

Decides which peers are asked in which order, also when a sender dies in the middle. `packs`
describes what is sent, `sending` and `receiving` read and write it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ray_envs.cluster.calls import Call
from ray_envs.decisions.packs import Manifest, Wheel, why_not
from ray_envs.disk import local_wheels
from ray_envs.errors import InvalidInput, ManagerUnavailable, RayEnvsError, StorageFailed, UvFailed
from ray_envs.models import Installed
from ray_envs.node import receiving, sending
from ray_envs.node.receiving import Receiving
from ray_envs.node.uv_cache import UvCache
from ray_envs.specs import LocalWheel
from ray_envs.validation import validated

#: How many pieces a sender keeps in Ray's object store for further receivers.
_KEPT_CHUNKS = 16
#: How many manifests a sender remembers between two pieces.
_KEPT_MANIFESTS = 64
#: How many wheels a node receives at once; each with one piece on its way, and one being written.
_AT_ONCE = 3
#: How long a sender may take to answer. Large wheels are hashed before their first piece.
_PATIENCE_S = 120.0

Say = Callable[[str], None]


class Peers(Protocol):
    """How agents reach each other, and share what several of them want."""

    def peer(self, node_id: str) -> Call:
        """A function that calls a verb of another node's agent."""

    async def put(self, data: bytes) -> Any:
        """Something small that stands for `data`, and that other nodes can be sent."""

    async def take(self, ref: Any) -> bytes:
        """The data that `ref` stands for."""


class Exchange:
    """The wheels of one node's uv cache, given to other nodes and taken from them."""

    def __init__(self, cache: UvCache, peers: Peers) -> None:
        self._cache = cache
        self._peers = peers
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._chunks: OrderedDict[tuple[str, int], asyncio.Task[Any]] = OrderedDict()

    async def offers(self, packages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The packages that this node can send."""
        asked = [Installed.model_validate(package) for package in packages]
        wheels = await asyncio.to_thread(sending.offers, self._cache, asked)
        return [wheel.model_dump(mode="json") for wheel in wheels]

    async def manifest(self, wheel: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest of one of the `offers`."""
        asked = Wheel.model_validate(wheel)
        made = await asyncio.to_thread(sending.manifest, self._cache, asked)
        self._manifests[made.identity] = made
        if len(self._manifests) > _KEPT_MANIFESTS:
            self._manifests.popitem(last=False)
        return made.model_dump(mode="json")

    async def chunk(self, wheel: Mapping[str, Any], identity: str, number: int) -> list[Any]:
        """A piece of what the manifest of that identity describes, as a reference in a list.

        A second request for the same piece soon after gets the same reference: Ray then takes it
        from any node that has it already.
        """
        if identity not in self._manifests:  # this process is younger than the manifest
            await self.manifest(wheel)
        made = self._manifests.get(identity)
        if made is None:
            raise StorageFailed("the wheel is another one than was offered", hint="ask again")
        return await self._shared(
            (identity, number), lambda: sending.read_chunk(self._cache, made, number)
        )

    async def local_wheel(self, wheel: Mapping[str, Any]) -> list[Any]:
        """The whole of a local package, as a reference in a list."""
        asked = LocalWheel.model_validate(wheel)
        root = self._cache.folder.parent
        return [await self._put(lambda: local_wheels.read(root, asked))]

    async def _shared(self, place: tuple[str, int], read: Callable[[], bytes]) -> list[Any]:
        """What `read` returns, as a reference that further receivers get too."""
        if place not in self._chunks:
            self._chunks[place] = asyncio.ensure_future(self._put(read))
            if len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        task = self._chunks[place]
        try:
            return [await asyncio.shield(task)]
        except Exception:
            self._chunks.pop(place, None)
            raise

    async def _put(self, read: Callable[[], bytes]) -> Any:
        return await self._peers.put(await asyncio.to_thread(read))

    async def fetch_local(self, wheel: LocalWheel, peers: Iterable[str]) -> bytes:
        """Take a local package from the first of `peers` that gives it.

        Raises `UvFailed`: none does.
        """
        reasons = []
        for node_id in peers:
            try:
                call = self._peers.peer(node_id)
                told = await _soon(call("local_wheel", wheel=wheel.model_dump(mode="json")))
                return await _soon(self._peers.take(told[0]))  # type: ignore[no-any-return]
            except RayEnvsError as exc:
                reasons.append(f"node {node_id[:12]}: {exc}")
        raise UvFailed(
            f"no other node gave the local package {wheel.filename}",
            detail="\n".join(reasons),
            hint="create the variant again from its files, if the head has lost them",
        )

    async def fetch(
        self, packages: Iterable[Installed], peers: Iterable[str], say: Say
    ) -> list[str]:
        """Take from `peers`, one after the other, what this node lacks of `packages`.

        Returns the reason why wheels are still missing, in words; empty if none is.

        Raises `StorageFailed`: this node's disk cannot be written.
        """
        reasons: list[str] = []
        lacking = await asyncio.to_thread(receiving.missing, self._cache, packages)
        for node_id in peers:
            if not lacking:
                break
            try:
                reasons += await self._fetch_from(node_id, lacking, say)
            except StorageFailed:
                raise
            except RayEnvsError as exc:
                reasons.append(f"node {node_id[:12]}: {exc}")
            lacking = await asyncio.to_thread(receiving.missing, self._cache, lacking)
        if not lacking:
            return []
        names = ", ".join(package.name for package in lacking[:5])
        return [*reasons, f"no other node gave {names}" + (", …" if len(lacking) > 5 else "")]

    async def lacking(self, packages: Iterable[Installed]) -> list[Installed]:
        """The packages that uv would not find in this node's cache."""
        return await asyncio.to_thread(receiving.missing, self._cache, packages)

    async def _fetch_from(self, node_id: str, lacking: list[Installed], say: Say) -> list[str]:
        call = self._peers.peer(node_id)
        asked = [package.model_dump(mode="json") for package in lacking]
        told = await _soon(call("offers", packages=asked))
        wheels = [validated(Wheel, each, where=f"node {node_id[:12]}") for each in told]
        wheels = [wheel for wheel in wheels if wheel.package in lacking]
        total, done, is_silent, reasons = sum(wheel.total_bytes for wheel in wheels), 0, False, []
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(wheel: Wheel) -> None:
            nonlocal done, is_silent
            reason = why_not(wheel, sending.made_here())
            if reason:
                reasons.append(reason)
                return
            async with slots:
                if is_silent:  # the next node is asked for it
                    return
                try:
                    async for size in self._receive(call, wheel):
                        done += size
                        say(f"{wheel} from node {node_id[:12]}: {_mib(done)} of {_mib(total)} MiB")
                except StorageFailed:  # this node's own disk: no other sender helps
                    raise
                except RayEnvsError as exc:
                    is_silent = is_silent or isinstance(exc, ManagerUnavailable)
                    reasons.append(f"node {node_id[:12]}: {exc}")

        receiving = [asyncio.ensure_future(one(wheel)) for wheel in wheels]
        try:
            await asyncio.gather(*receiving)
        finally:
            for task in receiving:
                task.cancel()
            await asyncio.gather(*receiving, return_exceptions=True)
        return reasons

    async def _receive(self, call: Call, wheel: Wheel) -> Any:
        """Take one wheel, a piece ahead of what is written; yields how many bytes have come."""
        plain = wheel.model_dump(mode="json")
        made = Manifest.parse(await _soon(call("manifest", wheel=plain)))
        if made.wheel.package != wheel.package:
            raise InvalidInput(f"it sends {made.wheel} for {wheel}")

        async def piece(number: int) -> bytes:
            told = await call("chunk", wheel=plain, identity=made.identity, number=number)
            return await self._peers.take(told[0])

        receiving = await asyncio.to_thread(Receiving(self._cache, made).__enter__)
        ahead: asyncio.Task[bytes] | None = None
        try:
            for number in range(made.chunk_count):
                task = ahead or asyncio.ensure_future(piece(number))
                following = number + 1 < made.chunk_count
                ahead = asyncio.ensure_future(piece(number + 1)) if following else None
                data = await _soon(task)
                await asyncio.to_thread(receiving.write, data)
                yield len(data)
            await asyncio.to_thread(receiving.commit)
        finally:
            if ahead is not None:
                ahead.cancel()
            await asyncio.to_thread(receiving.__exit__)


async def _soon(asked: Any) -> Any:
    """What a sender answers, unless it takes too long: a link may be cut, and Ray waits for it.

    Raises:
        ManagerUnavailable: it does not answer; it is not asked again.
        InvalidInput: it cannot give this: another one may.
    """
    try:
        return await asyncio.wait_for(asked, _PATIENCE_S)
    except (TimeoutError, asyncio.TimeoutError):
        raise ManagerUnavailable(f"it did not answer within {_PATIENCE_S:g} s") from None
    except StorageFailed as exc:  # the sender's disk, not ours
        raise InvalidInput(exc.message, detail=exc.detail) from exc


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"
