"""A Redis Cluster as one link: it knows which node serves which slot, and keeps a `RedisLink` to each master.

Commands for several nodes are written at once and read node by node, so a batch costs one round trip however many nodes it touches.
The map of slots comes from CLUSTER SLOTS of any node: at the start, when a node says MOVED, when a node is lost, and now and then.
What is on the move is followed: such a command is sent again, a few times within its deadline. Used by gateway/redis/backend.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gateway.contracts.redis_address import CLUSTER_SLOTS, REDIS_PORT, cluster_seeds, is_cluster
from gateway.redis.link import Argument, RedisLink, RedisReplyError, RedisUnavailableError, Sent, replies_of

log = logging.getLogger(__name__)

REFRESH_TIMEOUT_S = 1.0
# The map is asked for again this long after the last time: in a cluster that is well, in one that isn't, and at the very least.
REFRESH_EVERY_S = 15.0
REFRESH_LOST_S = 0.25
REFRESH_PAUSE_S = 0.05
# How often a command is written before its slot is given up as being on the move, and the pause where asking again at once is in vain.
ATTEMPTS_MAX = 6
ATTEMPT_PAUSE_S = 0.003
RECORD_TIMEOUT_S = 1.0
# What a node says while it can't serve a slot at all: nothing is wrong with the command.
DOWN = frozenset({"CLUSTERDOWN", "LOADING", "MASTERDOWN"})
# What a node says in the middle of a slot's migration, when it has some of a script's keys and the other node has the rest.
TRY_AGAIN = "TRYAGAIN"
NOT_HERE = "non local key"

# A command and the slot of its keys.
Keyed = tuple[int, Sequence[Argument]]
Address = tuple[str, int]


@dataclass(slots=True)
class _Due:
    """Commands to write, by their index: to which link, and whether ASKING comes first."""

    items: list[tuple[int, RedisLink, bool]] = field(default_factory=list)
    # Links that have forgotten the scripts.
    forgetful: set[RedisLink] = field(default_factory=set)
    pause: bool = False


class ClusterLink:
    """Keeps links to all masters of `url` (redis+cluster://[[user]:password@]host:port,...) while started.

    `probe_s` and `greeting` are those of each `RedisLink`.
    """

    def __init__(self, url: str, probe_s: float) -> None:
        self._seed_urls = cluster_seeds(url)
        self._probe_s = probe_s
        self._links: dict[Address, RedisLink] = {}
        self._addresses: dict[RedisLink, Address] = {}
        self._slots: list[RedisLink | None] = [None] * CLUSTER_SLOTS
        self._masters: frozenset[RedisLink] = frozenset()
        self._covered = False
        self._unneeded: set[RedisLink] = set()
        self._stale = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: str | None = None
        self.refreshes = 0
        self.greeting: list[tuple[Argument, ...]] = []
        self._seeds = [_address_of(seed) for seed in self._seed_urls]

    @property
    def ready(self) -> bool:
        """True when every slot has a master, and each of them a standing connection."""
        return self._covered and all(link.ready for link in self._masters)

    @property
    def nodes(self) -> list[RedisLink]:
        """The links to all nodes that are known."""
        return list(self._links.values())

    def start(self) -> None:
        """Begin to connect. The link serves when `ready` is True."""
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        for link in list(self._links.values()):
            await link.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def call_all(self, commands: Sequence[Keyed], timeout_s: float) -> list[Any]:
        """The replies to `commands`, in their order; a node executes its own in that order too.

        Raises `RedisUnavailableError`, or `RedisReplyError` for the first that failed; others may have been executed.
        """
        loop = asyncio.get_running_loop()
        due = self._first(commands)
        return await self._finish(commands, due, self._write(commands, due), loop.time() + timeout_s)

    def send_all(self, commands: Sequence[Keyed]) -> asyncio.Task[list[Any]]:
        """Write `commands` at once; the task reads their replies and follows the slots. Nobody has to wait for it.

        Raises `RedisUnavailableError`.
        """
        due = self._first(commands)
        sent = self._write(commands, due)
        deadline_s = asyncio.get_running_loop().time() + RECORD_TIMEOUT_S
        task = asyncio.create_task(self._finish(commands, due, sent, deadline_s))
        self._hold(task)
        return task

    def _first(self, commands: Sequence[Keyed]) -> _Due:
        """Where the map says. Raises `RedisUnavailableError` when one of the nodes has no connection: then nothing is written."""
        slots = self._slots
        items: list[tuple[int, RedisLink, bool]] = []
        for i, (slot, _) in enumerate(commands):
            link = slots[slot]
            if link is None:
                raise RedisUnavailableError("no connection")
            items.append((i, link, False))
        if not all(link.ready for link in {link for _, link, _ in items}):
            self._stale.set()
            raise RedisUnavailableError("no connection")
        return _Due(items)

    def _write(self, commands: Sequence[Keyed], due: _Due) -> list[tuple[Sent, list[int]]]:
        """What was sent, with the index of each command, -1 for what comes before a command."""
        by_link: dict[RedisLink, tuple[list[Sequence[Argument]], list[int]]] = {}
        for i, link, asking in due.items:
            found = by_link.get(link)
            if found is None:
                greeting = self.greeting if link in due.forgetful else []
                found = by_link[link] = ([*greeting], [-1] * len(greeting))
            batch, indices = found
            if asking:
                batch.append(("ASKING",))
                indices.append(-1)
            batch.append(commands[i][1])
            indices.append(i)
        return [(link.send(batch), indices) for link, (batch, indices) in by_link.items()]

    async def _finish(
        self, commands: Sequence[Keyed], due: _Due, sent: list[tuple[Sent, list[int]]], deadline_s: float
    ) -> list[Any]:
        loop = asyncio.get_running_loop()
        replies: list[Any] = [None] * len(commands)
        for _ in range(ATTEMPTS_MAX):
            try:
                answers = await replies_of([each for each, _ in sent], deadline_s - loop.time()) if sent else []
            except RedisUnavailableError:
                self._stale.set()
                raise
            due = self._sort(commands, due, sent, answers, replies)
            if not due.items:
                return replies
            if due.pause:
                await asyncio.sleep(ATTEMPT_PAUSE_S)
            if loop.time() >= deadline_s:
                break
            sent = self._write(commands, _Due([item for item in due.items if item[1].ready], due.forgetful))
        raise RedisUnavailableError("the slots are on the move")

    def _sort(
        self,
        commands: Sequence[Keyed],
        due: _Due,
        sent: list[tuple[Sent, list[int]]],
        answers: list[list[Any]],
        replies: list[Any],
    ) -> _Due:
        """Fill in `replies`; what is to be written again. Raises `RedisUnavailableError`, `RedisReplyError`."""
        again = _Due()
        written: set[int] = set()
        for (each, indices), answer in zip(sent, answers, strict=True):
            written.update(indices)
            for i, reply in zip(indices, answer, strict=True):
                if i < 0:
                    continue
                if isinstance(reply, RedisReplyError):
                    self._redirect(i, commands[i][0], each.link, reply, again)
                else:
                    replies[i] = reply
        # A node that was named by another had no connection yet.
        waiting = [item for item in due.items if item[0] not in written]
        again.items = sorted([*again.items, *waiting], key=lambda item: item[0])
        again.pause = again.pause or any(not link.ready for _, link, _ in again.items)
        return again

    def _redirect(self, i: int, slot: int, link: RedisLink, error: RedisReplyError, again: _Due) -> None:
        text = str(error)
        kind, _, rest = text.partition(" ")
        if kind in ("MOVED", "ASK"):
            host, _, port = rest.rpartition(" ")[2].rpartition(":")
            target = self._link_at(host or link.host, int(port))
            if kind == "MOVED":
                self._slots[slot] = target
                self._stale.set()
            again.items.append((i, target, kind == "ASK"))
        elif kind == "NOSCRIPT":
            again.forgetful.add(link)
            again.items.append((i, link, False))
        elif kind == TRY_AGAIN or NOT_HERE in text:
            again.pause = True
            again.items.append((i, link, False))
        elif kind in DOWN:
            self._stale.set()
            raise RedisUnavailableError(text) from error
        else:
            raise error

    def _link_at(self, host: str, port: int) -> RedisLink:
        """The link to a node, which is started when it is new."""
        link = self._links.get((host, port))
        if link is None:
            seed = urlsplit(self._seed_urls[0])
            before, at, _ = seed.netloc.rpartition("@")
            named = f"[{host}]" if ":" in host else host
            link = RedisLink(f"{seed.scheme}://{before}{at}{named}:{port}", self._probe_s)
            link.greeting = self.greeting
            self._links[host, port] = link
            self._addresses[link] = (host, port)
            link.start()
        return link

    async def _keep(self) -> None:
        """Asks for the map: often until there is one, and whenever there is reason to."""
        for host, port in self._seeds:
            self._link_at(host, port)
        while True:
            await self._refresh()
            await asyncio.sleep(REFRESH_PAUSE_S)
            if not self._covered:
                continue
            try:
                async with asyncio.timeout(REFRESH_EVERY_S if self.ready else REFRESH_LOST_S):
                    await self._stale.wait()
            except TimeoutError:
                continue

    async def _refresh(self) -> None:
        """Take the map from the first node that has all of it. Each time another node is asked first."""
        self._stale.clear()
        ready = [link for link in self._links.values() if link.ready]
        turn = self.refreshes % max(1, len(ready))
        for link in ready[turn:] + ready[:turn]:
            try:
                ranges = await link.call(("CLUSTER", "SLOTS"), REFRESH_TIMEOUT_S)
            except RedisUnavailableError:
                continue
            except RedisReplyError as exc:
                self._tell(f"a node can't tell its slots: {exc}")
                continue
            if self._adopt(ranges, link.host):
                self.refreshes += 1
                self._tell(f"a cluster of {len(self._masters)} masters")
                return

    def _adopt(self, ranges: Iterable[Sequence[Any]], asked_host: str) -> bool:
        """Take over a map, unless slots are missing in it; True when it has them all."""
        slots: list[RedisLink | None] = [None] * CLUSTER_SLOTS
        for first, last, (host, port, *_), *_ in ranges:
            # A node that doesn't know its own name leaves it out: it is the one that was asked.
            link = self._link_at(asked_host if not host else host.decode(), port)
            slots[first : last + 1] = [link] * (last + 1 - first)
        if None in slots:
            self._tell("slots without a master")
            return False
        self._slots, self._covered = slots, True
        self._masters = frozenset(link for link in slots if link is not None)
        # A node that left may still owe a reply: it goes when it is in no map for the second time.
        unneeded = {link for address, link in self._links.items() if link not in self._masters and address not in self._seeds}
        for link in unneeded & self._unneeded:
            del self._links[self._addresses.pop(link)]
            self._hold(asyncio.create_task(link.stop()))
        self._unneeded = unneeded - self._unneeded
        return True

    def _tell(self, what: str) -> None:
        """Log what changed, once."""
        if what != self._told:
            self._told = what
            log.info("redis: %s", what)

    def _hold(self, task: asyncio.Task[Any]) -> None:
        """Keep a task that nobody waits for until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _address_of(url: str) -> Address:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or REDIS_PORT


def link_to(url: str, probe_s: float) -> RedisLink | ClusterLink:
    """The link that the setting `redis_url` asks for, not started. Raises ValueError."""
    return ClusterLink(url, probe_s) if is_cluster(url) else RedisLink(url, probe_s)
