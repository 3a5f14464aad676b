"""Whether the decode services serve, as grpc.health.v1 has it: asked without anybody's token, at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cairn.client.health import ask_health_async
from cairn.client.transport import AsyncChannel, Peer, Tls

ASK_S = 2.0  # for one answer
REMEMBERED_S = 1.0


class Upstream:
    """All decode services. Belongs to the event loop of its first question."""

    def __init__(self, addresses: Sequence[str], tls: Tls) -> None:
        self._peers = [Peer("decode", address, tls) for address in addresses]
        self._channels: list[AsyncChannel] = []
        self._asked_at = -REMEMBERED_S
        self._serving = False
        self._asking = asyncio.Lock()

    async def serving(self) -> bool:
        """Whether one of them serves."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= REMEMBERED_S:
                self._channels = self._channels or [peer.open_async_channel() for peer in self._peers]
                pairs = zip(self._channels, self._peers, strict=True)
                said = await asyncio.gather(*(ask_health_async(channel, peer, ASK_S) for channel, peer in pairs))
                self._serving = any(status == "SERVING" for status, _ in said)
                self._asked_at = time.monotonic()
            return self._serving

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)
