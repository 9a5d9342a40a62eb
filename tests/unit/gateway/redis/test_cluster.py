"""The link to a Redis Cluster against nodes that answer as the test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import hiredis
import pytest
from redis.crc import key_slot

from gateway.contracts.redis_address import cluster_seeds, hash_slot, is_cluster
from gateway.redis.cluster import ATTEMPTS_MAX, ClusterLink, link_to
from gateway.redis.link import RedisLink, RedisReplyError, RedisUnavailableError
from tests.helpers import until

pytestmark = pytest.mark.anyio

HALF = 8192
SCRIPT = ("SCRIPT", "LOAD", "return 1")


@dataclass
class Node:
    """Replies OK, with the key to GET; `says` has other replies by key, used up one by one but for the last; None is silence."""

    port: int = 0
    name: bytes = b""
    slots: list[tuple[int, int]] = field(default_factory=list)
    got: list[list[bytes]] = field(default_factory=list)
    says: dict[bytes, list[bytes | None]] = field(default_factory=dict)
    connections: int = 0


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


class Nodes:
    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def map(self) -> bytes:
        ranges = [(first, last, node) for node in self.nodes for first, last in node.slots]
        each = [
            b"*3\r\n:%d\r\n:%d\r\n*3\r\n%s:%d\r\n%s" % (first, last, bulk(node.name), node.port, bulk(b"id"))
            for first, last, node in ranges
        ]
        return b"*%d\r\n" % len(each) + b"".join(each)

    def answer(self, node: Node, command: list[bytes]) -> bytes | None:
        if command[0] == b"CLUSTER":
            return self.map()
        if command[0] not in (b"SELECT", b"PING", b"AUTH"):
            node.got.append(command)
        if command[0] == b"GET":
            replies = node.says.get(command[1])
            if replies:
                return replies.pop(0) if len(replies) > 1 else replies[0]
            return bulk(command[1])
        return b"+OK\r\n"

    def keys(self, i: int) -> list[list[bytes]]:
        """What was asked of node i but for its scripts."""
        return [command for command in self.nodes[i].got if command[0] != b"SCRIPT"]


@asynccontextmanager
async def cluster(*, named: bool = True, seeds: int = 2, probe_s: float = 1.0) -> AsyncIterator[tuple[Nodes, ClusterLink]]:
    """Two nodes with half of the slots each and a third without, and a link that is ready."""
    nodes = Nodes([Node(slots=[(0, HALF - 1)]), Node(slots=[(HALF, 2 * HALF - 1)]), Node()])
    handlers: set[asyncio.Task[None]] = set()
    servers = []

    def serve(node: Node) -> object:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            handlers.add(task)
            commands = hiredis.Reader(notEnoughData=Ellipsis)
            node.connections += 1
            try:
                while data := await reader.read(65_536):
                    commands.feed(data)
                    while (command := commands.gets()) is not Ellipsis:
                        reply = nodes.answer(node, command)
                        if reply is not None:
                            writer.write(reply)
            except ConnectionError:
                pass
            finally:
                node.connections -= 1
                writer.transport.abort()

        return handle

    for node in nodes.nodes:
        server = await asyncio.start_server(serve(node), "127.0.0.1", 0)  # type: ignore[arg-type]
        servers.append(server)
        node.port = server.sockets[0].getsockname()[1]
        node.name = b"127.0.0.1" if named else b""
    link = ClusterLink("redis+cluster://" + ",".join(f"127.0.0.1:{n.port}" for n in nodes.nodes[:seeds]), probe_s)
    link.greeting.append(SCRIPT)
    link.start()
    try:
        await until(lambda: link.ready, 5)
        yield nodes, link
    finally:
        await link.stop()
        for server in servers:
            server.close()
        if handlers:
            await asyncio.wait(handlers, timeout=5)
            await asyncio.sleep(0)


# Keys of the first half of the slots and of the second.
LOW, ALSO_LOW, HIGH = b"{a0}", b"{a4}", b"{a3}"


def get(*keys: bytes) -> list[tuple[int, tuple[str, str]]]:
    return [(hash_slot(key.decode()), ("GET", key.decode())) for key in keys]


def test_the_keys_of_these_tests_lie_where_they_are_meant_to() -> None:
    assert hash_slot(LOW.decode()) < HALF <= hash_slot(HIGH.decode())
    assert hash_slot(ALSO_LOW.decode()) < HALF


@pytest.mark.parametrize("key", ["", "abc", "fg2:{card:ü}:h", "{}", "{}x", "a{b}c{d}", "{{b}}", "a{b", "b}a{", "fg2:i:{t-1}"])
def test_slots_are_those_of_redis(key: str) -> None:
    assert hash_slot(key) == key_slot(key.encode())


def test_a_setting_names_one_redis_or_the_seeds_of_a_cluster() -> None:
    assert not is_cluster("redis://h:1/0")
    assert cluster_seeds("redis+cluster://u:p%40@h1:1, h2,[::1]:3/") == [
        "redis://u:p%40@h1:1",
        "redis://u:p%40@h2",
        "redis://u:p%40@[::1]:3",
    ]
    assert cluster_seeds("rediss+cluster://h:1") == ["rediss://h:1"]
    assert isinstance(link_to("redis://h:1/0", 1.0), RedisLink)
    assert isinstance(link_to("redis+cluster://h:1", 1.0), ClusterLink)


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://",
        "redis+cluster://u:p@",
        "redis+cluster://h:1/2",
        "redis+cluster://:1",
        "redis+cluster://h:x",
        "redis+cluster://h:99999",
        "redis://h:1",
    ],
)
def test_a_url_that_is_no_cluster_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="Cluster"):
        ClusterLink(url, 1.0)


@pytest.mark.parametrize("named", [True, False])
async def test_each_node_is_sent_its_own_in_order_and_replies_are_put_together(named: bool) -> None:
    # A node that doesn't know its own name is the one that was asked: only a cluster of one can be told so.
    async with cluster(named=named, seeds=2 if named else 1) as (nodes, link):
        assert await link.call_all(get(LOW, HIGH, ALSO_LOW, LOW), 5) == [LOW, HIGH, ALSO_LOW, LOW]
        assert nodes.keys(0) == [[b"GET", LOW], [b"GET", ALSO_LOW], [b"GET", LOW]]
        assert nodes.keys(1) == [[b"GET", HIGH]]


async def test_the_other_masters_are_learned_from_one() -> None:
    async with cluster(seeds=1) as (_, link):
        assert await link.call_all(get(HIGH, LOW), 5) == [HIGH, LOW]


async def test_a_slot_that_has_moved_is_followed_and_remembered() -> None:
    async with cluster() as (nodes, link):
        slot = hash_slot(LOW.decode())
        nodes.nodes[0].says[LOW] = [b"-MOVED %d 127.0.0.1:%d\r\n" % (slot, nodes.nodes[2].port)]
        nodes.nodes[0].slots = [(0, slot - 1), (slot + 1, HALF - 1)]
        nodes.nodes[2].slots = [(slot, slot)]
        assert await link.call_all(get(LOW, HIGH), 5) == [LOW, HIGH]
        assert await link.call_all(get(LOW), 5) == [LOW]
        assert nodes.keys(0) == [[b"GET", LOW]]
        assert nodes.keys(2) == [[b"GET", LOW]] * 2
        assert [b"SCRIPT", b"LOAD", b"return 1"] in nodes.nodes[2].got


async def test_a_slot_on_the_move_is_asked_for_where_it_goes_and_not_remembered() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].says[LOW] = [b"-ASK 1 :%d\r\n" % nodes.nodes[1].port]
        assert await link.call_all(get(LOW, HIGH), 5) == [LOW, HIGH]
        assert await link.call_all(get(LOW), 5) == [LOW]
        assert nodes.keys(0) == [[b"GET", LOW]] * 2
        assert nodes.keys(1) == [[b"GET", HIGH], [b"ASKING"], [b"GET", LOW], [b"ASKING"], [b"GET", LOW]]


@pytest.mark.parametrize(
    "error", [b"-TRYAGAIN later\r\n", b"-ERR Script attempted to access a non local key in a cluster node\r\n"]
)
async def test_a_slot_half_moved_is_tried_again_a_few_times(error: bytes) -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].says[LOW] = [error, error, bulk(b"moved")]
        assert await link.call_all(get(LOW, HIGH), 5) == [b"moved", HIGH]
        nodes.nodes[0].got.clear()
        nodes.nodes[0].says[LOW] = [error]
        with pytest.raises(RedisUnavailableError):
            await link.call_all(get(LOW), 5)
        assert len(nodes.keys(0)) == ATTEMPTS_MAX
        assert link.ready


async def test_a_node_that_forgot_the_scripts_is_sent_them_before_the_commands() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].got.clear()
        nodes.nodes[0].says[LOW] = [b"-NOSCRIPT no\r\n", bulk(b"done")]
        assert await link.call_all(get(LOW, ALSO_LOW), 5) == [b"done", ALSO_LOW]
        assert [command[0] for command in nodes.nodes[0].got] == [b"GET", b"GET", b"SCRIPT", b"GET"]


async def test_what_is_no_matter_of_slots_is_the_callers_error() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].says[LOW] = [b"-OOM no memory\r\n"]
        with pytest.raises(RedisReplyError, match="OOM"):
            await link.call_all(get(HIGH, LOW), 5)
        assert await link.call_all(get(HIGH), 5) == [HIGH]


async def test_a_cluster_that_is_down_says_so_and_its_map_is_asked_for_again() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].says[LOW] = [b"-CLUSTERDOWN The cluster is down\r\n"]
        before = link.refreshes
        with pytest.raises(RedisUnavailableError):
            await link.call_all(get(LOW), 5)
        await until(lambda: link.refreshes > before, 5)


async def test_an_abandoned_reply_of_one_node_never_reaches_another_caller() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].says[LOW] = [None, bulk(b"mine")]
        with pytest.raises(RedisUnavailableError):
            await link.call_all(get(HIGH, LOW), 0.01)
        assert not link.ready
        with pytest.raises(RedisUnavailableError):
            await link.call_all(get(HIGH, LOW), 5)
        # The other node has lost nothing.
        assert await link.call_all(get(HIGH), 5) == [HIGH]
        await until(lambda: link.ready, 5)
        assert await link.call_all(get(LOW, HIGH), 5) == [b"mine", HIGH]


async def test_what_nobody_waits_for_is_written_at_once_and_follows_a_slot() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[0].says[LOW] = [b"-MOVED 1 127.0.0.1:%d\r\n" % nodes.nodes[1].port]
        task = link.send_all(get(LOW, HIGH))
        assert await link.call_all(get(HIGH), 5) == [HIGH]
        assert await task == [LOW, HIGH]
        assert nodes.keys(1) == [[b"GET", HIGH], [b"GET", HIGH], [b"GET", LOW]]


async def test_a_node_that_leaves_the_cluster_is_let_go() -> None:
    async with cluster(seeds=1) as (nodes, link):
        assert nodes.nodes[1].connections == 1
        nodes.nodes[1].slots, nodes.nodes[2].slots = [], [(HALF, 2 * HALF - 1)]
        nodes.nodes[1].says[HIGH] = [b"-MOVED 1 127.0.0.1:%d\r\n" % nodes.nodes[2].port]
        before = link.refreshes
        assert await link.call_all(get(HIGH), 5) == [HIGH]
        await until(lambda: link.refreshes > before, 5)
        assert nodes.nodes[1].connections == 1, "it may still owe a reply"
        nodes.nodes[2].says[HIGH] = [b"-CLUSTERDOWN\r\n"]
        with pytest.raises(RedisUnavailableError):
            await link.call_all(get(HIGH), 5)
        await until(lambda: nodes.nodes[1].connections == 0, 5)
        assert link.ready


async def test_a_map_with_holes_does_not_serve() -> None:
    async with cluster() as (nodes, link):
        nodes.nodes[1].slots = [(HALF, 2 * HALF - 2)]
        fresh = ClusterLink(f"redis+cluster://127.0.0.1:{nodes.nodes[0].port}", 1.0)
        fresh.start()
        await until(lambda: nodes.nodes[0].connections == 2, 5)
        for _ in range(20):
            await asyncio.sleep(0)
        assert link.ready
        assert not fresh.ready
        with pytest.raises(RedisUnavailableError):
            await fresh.call_all(get(LOW), 1)
        await fresh.stop()
