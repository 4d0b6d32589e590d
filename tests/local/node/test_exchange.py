"""What a node asks of others for its wheels, where a sender is silent, strange or ill.

Ray's part is that of `cluster.RayPeers`; here two caches on one disk speak through plain functions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ray_envs.cluster.calls import Call
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.manager import exports
from ray_envs.models import Installed
from ray_envs.node import bundles, exchange, receiving
from ray_envs.node.exchange import Exchange
from ray_envs.node.store import Store
from ray_envs.node.uv_cache import UvCache
from ray_envs.settings import Settings
from tests.local.node.test_transfer import Sender, built

__all__ = ["built"]  # the fixture of the wheels' sender

Change = Callable[[str, dict[str, Any]], Any]


class Nodes:
    """The peers of one node: by name, each an `Exchange`, and what becomes of calls to it."""

    def __init__(self, senders: dict[str, tuple[Exchange, Change | None]]) -> None:
        self._senders = senders
        self.asked: list[tuple[str, str]] = []

    def peer(self, node_id: str) -> Call:
        sender, change = self._senders[node_id]

        async def call(verb: str, **arguments: Any) -> Any:
            self.asked.append((node_id, verb))
            if change is not None:
                changed = change(verb, arguments)
                if changed is not None:
                    return await changed if asyncio.isfuture(changed) else changed
            return await getattr(sender, verb)(**arguments)

        return call

    async def put(self, data: bytes) -> Any:
        return data

    async def take(self, ref: Any) -> bytes:
        return bytes(ref)


def fetched(
    sender: Sender, folder: Path, change: Change
) -> tuple[list[str], Nodes, tuple[Installed, ...]]:
    """What a node without anything says, that asks an odd sender first and then a good one."""

    async def main() -> tuple[list[str], Nodes]:
        nodes = Nodes({})
        nodes._senders = {
            "odd": (Exchange(sender.cache, nodes), change),
            "good": (Exchange(sender.cache, nodes), None),
        }
        here = Exchange(UvCache(folder / "cache"), nodes)
        return await here.fetch(sender.packages, ["odd", "good"], lambda _: None), nodes

    said, nodes = asyncio.run(main())
    return said, nodes, sender.packages


def test_a_sender_that_is_silent_is_asked_for_nothing_more(
    built: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(exchange, "_AT_ONCE", 1)

    def silent(verb: str, arguments: dict[str, Any]) -> Any:
        return asyncio.get_running_loop().create_future() if verb == "chunk" else None

    began = time.monotonic()
    said, nodes, packages = fetched(built, tmp_path, silent)
    assert said == []
    assert nodes.asked.count(("odd", "manifest")) == 1
    assert nodes.asked.count(("good", "manifest")) == len(packages)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("what", ["an unknown field", "another wheel", "what nobody asked for"])
def test_a_sender_that_answers_strangely_is_passed_over(
    built: Sender, tmp_path: Path, what: str
) -> None:
    def strange(verb: str, arguments: dict[str, Any]) -> Any:
        async def offers() -> Any:
            told = await Exchange(built.cache, Nodes({})).offers(**arguments)
            if what == "an unknown field":
                return [{**each, "newer": 1} for each in told]
            return [{**each, "package": {**each["package"], "name": "foreign"}} for each in told]

        async def manifest() -> Any:
            sender = Exchange(built.cache, Nodes({}))
            [other] = await sender.offers([built.packages[0].model_dump(mode="json")])
            return await sender.manifest(other)

        if verb == "offers" and what != "another wheel":
            return asyncio.ensure_future(offers())
        if verb == "manifest" and what == "another wheel":
            return asyncio.ensure_future(manifest())
        return None

    said, nodes, packages = fetched(built, tmp_path, strange)
    assert said == []
    taken = 1 if what == "another wheel" else 0  # the one that it has sent for itself
    assert nodes.asked.count(("good", "manifest")) == len(packages) - taken


def test_an_ill_disk_of_a_sender_is_not_taken_for_this_nodes_own(
    built: Sender, tmp_path: Path
) -> None:
    def ill(verb: str, arguments: dict[str, Any]) -> Any:
        if verb == "manifest":
            raise StorageFailed("read: input/output error")
        return None

    said, nodes, packages = fetched(built, tmp_path, ill)
    assert said == []
    assert nodes.asked.count(("odd", "manifest")) == len(packages)


def test_a_bundle_with_a_wheel_that_its_lock_does_not_name_is_refused(
    built: Sender, tmp_path: Path
) -> None:
    """Another variant would find it in the cache, and run it."""
    lock = (built.project / "uv.lock").read_text()
    texts = {
        "pyproject.toml": (built.project / "pyproject.toml").read_text(),
        "uv.lock": lock,
        "options.json": "{}",
    }
    manifests = [built.manifest(package.name) for package in built.packages]
    store = Store(Settings(root=tmp_path / "root"))
    bundles.write_bundle(tmp_path / "good", built.cache, manifests, texts, ray=version("ray"))
    assert set(exports.take_bundle(tmp_path / "good", store)) == set(texts)

    texts["uv.lock"] = lock.replace('    { name = "tabulate" },\n', "", 1)
    assert texts["uv.lock"] != lock
    bundles.write_bundle(tmp_path / "evil", built.cache, manifests, texts, ray=version("ray"))
    other = Store(Settings(root=tmp_path / "other"))
    with pytest.raises(InvalidInput, match="tabulate that its lock does not name"):
        exports.take_bundle(tmp_path / "evil", other)
    assert receiving.missing(UvCache(other.cache), [built.package("tabulate")])
