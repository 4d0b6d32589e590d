"""How agents of two nodes call each other and exchange data."""

from __future__ import annotations

import asyncio
from typing import Any

from ray_envs.cluster.calls import Call, unwrapped
from ray_envs.cluster.connecting import NAMESPACE
from ray_envs.errors import ManagerUnavailable, RayEnvsError


class RayPeers:
    """Calls the agents of other nodes, and sends bytes as Ray objects; see `exchange.Peers`."""

    def peer(self, node_id: str) -> Call:
        who = f"the NodeAgent of node {node_id[:12]}"

        async def call(verb: str, **arguments: Any) -> Any:
            import ray

            try:
                handle = ray.get_actor(f"NodeAgent:{node_id}", namespace=NAMESPACE)
            except ValueError:
                raise ManagerUnavailable(f"{who} is not running") from None
            try:
                return await getattr(handle, verb).remote(**arguments)
            except Exception as exc:
                raise _of_peer(exc, who) from exc

        return call

    async def put(self, data: bytes) -> Any:
        import ray

        return await asyncio.to_thread(ray.put, data)

    async def take(self, ref: Any) -> bytes:
        try:
            return bytes(await ref)
        except Exception as exc:
            raise _of_peer(exc, "another node") from exc


def _of_peer(exc: Exception, who: str) -> BaseException:
    """Return what another node raised, as an error of ours."""
    error = unwrapped(exc, who)
    if isinstance(error, RayEnvsError):
        return error
    # Such as a bad disk or a full object store: another node may work.
    return ManagerUnavailable(f"{who} failed: {getattr(exc, 'cause', exc)!r}")
