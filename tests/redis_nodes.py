"""A real Redis Cluster of three masters on this machine, whose nodes can be hung, killed, emptied and given each other's slots."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from deploy.ports import free_ports
from deploy.toolchain import find_redis
from gateway.contracts.redis_address import CLUSTER_SLOTS
from tests.helpers import HOST, wait_until

NODES = 3
NODE_TIMEOUT_MS = 2000
START_WITHIN_S = 20


@dataclass
class Node:
    port: int
    bus_port: int
    process: subprocess.Popen[bytes]
    client: redis.Redis

    def ask(self, *arguments: Any) -> Any:
        """One command's reply, as Redis gives it."""
        return self.client.execute_command(*arguments)  # type: ignore[no-untyped-call]

    @property
    def node_id(self) -> str:
        return str(self.ask("CLUSTER", "MYID").decode())

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def info(self) -> dict[str, str]:
        found = self.ask("CLUSTER INFO")
        return {str(key): str(value) for key, value in found.items()}

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The process hangs meanwhile: its sockets stand and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@dataclass
class Cluster:
    """`nodes` are the masters, and then the replica if there is one."""

    nodes: list[Node]
    password: str = ""

    @property
    def url(self) -> str:
        user = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis+cluster://{user}" + ",".join(f"{HOST}:{node.port}" for node in self.nodes)

    def well(self) -> bool:
        return all(
            info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(len(self.nodes))
            for info in (node.info() for node in self.nodes)
        )

    def owner(self, slot: int) -> Node:
        """The node that says of itself that it serves `slot`."""
        return next(node for node in self.nodes if self._served_by(node, slot) == node.port)

    @staticmethod
    def _served_by(node: Node, slot: int) -> int:
        """The port of the node that serves `slot`, as `node` sees it."""
        return next(int(port) for first, last, (_, port, *_), *_ in node.ask("CLUSTER", "SLOTS") if first <= slot <= last)

    def replicate(self, replica: Node, master: Node) -> None:
        """Make an empty node the replica of a master, and wait until it has all of its data."""
        # The node must have heard of its master first.
        wait_until(lambda: self.well() and self._knows(replica, master), START_WITHIN_S, "the replica knows its master")
        replica.ask("CLUSTER", "REPLICATE", master.node_id)

        def follows() -> bool:
            return replica.client.info("replication").get("master_link_status") == "up"

        wait_until(follows, START_WITHIN_S, "the replica follows its master")

    @staticmethod
    def _knows(node: Node, other: Node) -> bool:
        return other.node_id in str(node.ask("CLUSTER NODES"))

    def other(self, node: Node) -> Node:
        return next(n for n in self.nodes if n is not node)

    def open_slot(self, slot: int, source: Node, target: Node) -> None:
        """Begin to migrate a slot: no key is moved yet."""
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.node_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.node_id)

    def move_keys(self, slot: int, source: Node, target: Node) -> None:
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)

    def close_slot(self, slot: int, target: Node) -> None:
        """The slot is the target's, which all nodes are told. Returns when they agree, for the next move needs them to."""
        for node in sorted(self.nodes, key=lambda n: n is not target):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.node_id)

        def agreed() -> bool:
            epochs = {node.info()["cluster_current_epoch"] for node in self.nodes}
            return len(epochs) == 1 and all(self._served_by(node, slot) == target.port for node in self.nodes)

        wait_until(agreed, START_WITHIN_S, "the nodes agree on a slot's new owner")

    def move_slot(self, slot: int, target: Node) -> None:
        source = self.owner(slot)
        if source is target:
            return
        self.open_slot(slot, source, target)
        self.move_keys(slot, source, target)
        self.close_slot(slot, target)


@contextlib.contextmanager
def running_cluster(folder: Path, replicas: int = 0, password: str = "") -> Iterator[Cluster]:
    """Three masters that share the slots evenly, and replicas of the first. At the end they are gone whatever happened."""
    count = NODES + replicas
    ports = free_ports(2 * count)
    nodes: list[Node] = []
    try:
        for port, bus_port in zip(ports[:count], ports[count:], strict=True):
            directory = folder / str(port)
            directory.mkdir()
            options = {
                "port": port,
                "bind": HOST,
                "save": "",
                "dir": directory,
                "cluster-enabled": "yes",
                "cluster-port": bus_port,
                "cluster-node-timeout": NODE_TIMEOUT_MS,
            }
            if password:
                options |= {"requirepass": password, "masterauth": password}
            command = [str(find_redis()), *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            nodes.append(Node(port, bus_port, process, redis.Redis(host=HOST, port=port, password=password or None)))
        for i, node in enumerate(nodes):
            wait_until(node.answers, START_WITHIN_S, "a node of the cluster starts")
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            if i < NODES:
                node.ask("CLUSTER", "ADDSLOTSRANGE", CLUSTER_SLOTS * i // NODES, CLUSTER_SLOTS * (i + 1) // NODES - 1)
        for node in nodes[1:]:
            nodes[0].ask("CLUSTER", "MEET", HOST, node.port, node.bus_port)
        cluster = Cluster(nodes, password)
        wait_until(cluster.well, START_WITHIN_S, "the cluster is well")
        for node in nodes[NODES:]:
            cluster.replicate(node, nodes[0])
        yield cluster
    finally:
        for node in nodes:
            node.client.close()
            node.process.send_signal(signal.SIGCONT)
            node.process.terminate()
        for node in nodes:
            node.process.wait(20)
