"""How every node learns what the cluster is: the view, and of a large cluster the news before it.

A view grows with the number of nodes, and so does the number of its readers: to send it to all at once is work and
memory in proportion to the square. So bytes are budgeted, and the news, which have one size, go first. Knows nothing of
how a view is made.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from tpdist.control.channel import AsyncRouter
from tpdist.control.messages import ClusterState
from tpdist.control.view import news_of

AT_ONCE_BYTES = 1 << 20
PUBLISH_BYTES_PER_S = 5e6
REFRESH_BYTES_PER_S = 2e6
OWN_HEARTBEATS = 5


class Publisher:
    """`everybody` are the sockets of those who are to know, the head's own node first; `view` is what they are told."""

    def __init__(
        self,
        router: AsyncRouter,
        *,
        everybody: Callable[[], Sequence[bytes]],
        view: Callable[[], ClusterState],
        heartbeat_interval_s: float,
    ) -> None:
        self._router = router
        self._everybody = everybody
        self._view = view
        self._heartbeat_interval_s = heartbeat_interval_s
        self._news = asyncio.Event()

    def tell(self) -> None:
        """There are news."""
        self._news.set()

    async def run(self) -> None:
        """Send the view to every node on news, and now and then for steps and ages.

        Where it is too large for all at once, they get the news alone first, and then the view, a few of them at a
        time: the head's own node, then those that have waited longest.
        """
        waiting: list[bytes] = []
        total_bytes = 0
        while True:
            if not waiting:
                await self._wait(total_bytes / REFRESH_BYTES_PER_S)
            sent_bytes = 0
            if not waiting or self._news.is_set():
                self._news.clear()
                view, everybody = self._view(), self._everybody()
                frame = self._router.frame_of(view)
                first = {*everybody[:1], *waiting}
                waiting = sorted(everybody, key=lambda identity: identity not in first)
                total_bytes = len(everybody) * len(frame)
                if total_bytes > AT_ONCE_BYTES:
                    news = self._router.frame_of(news_of(view))
                    self._router.send_frame(everybody, news)
                    sent_bytes = len(everybody) * len(news)
            num_next = max(1, AT_ONCE_BYTES // len(frame))
            self._router.send_frame(waiting[:num_next], frame)
            sent_bytes += len(waiting[:num_next]) * len(frame)
            waiting = waiting[num_next:]
            await asyncio.sleep(sent_bytes / PUBLISH_BYTES_PER_S)

    async def _wait(self, refresh_s: float) -> None:
        """Until there are news, or the view is due again. Meanwhile the head's own node is shown it more often."""
        until = time.monotonic() + max(refresh_s, self._heartbeat_interval_s)
        while (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, OWN_HEARTBEATS * self._heartbeat_interval_s)):
                    await self._news.wait()
                    return
            await self._router.send_all(self._everybody()[:1], self._view())
