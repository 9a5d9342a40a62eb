"""One metrics endpoint for several workers: whoever is asked asks the others and answers with the sum.

The workers of a supervisor share a directory. Each answers on a Unix socket there, `NAME.sock`, and leaves its last values as `NAME.last`
when it ends; who collects writes down what it was told, so that a worker that is killed loses only what it counted since. The
supervisor folds what ended workers left into the file `departed`: a counter never goes down because a worker was replaced.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gateway.contracts.metrics import GATEWAY, Over

log = logging.getLogger(__name__)

SOCKET, LAST, DEPARTED = ".sock", ".last", "departed"
ASK_TIMEOUT_S = 1.0
ANSWER_BYTES_MAX = 16 * 1024 * 1024
SMALLEST = frozenset(metric.name for metric in GATEWAY if metric.over is Over.LEAST)
LARGEST = frozenset(metric.name for metric in GATEWAY if metric.over is Over.MOST)
_GAUGE = "gauge"


class Family(msgspec.Struct):
    """One metric. `values` by the sample's name and its labels."""

    kind: str
    doc: str
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float]


Families = dict[str, Family]


class Departed(msgspec.Struct):
    """What the workers named have counted before they ended."""

    names: list[str]
    families: list[tuple[str, str, str, list[tuple[str, list[tuple[str, str]], float]]]]


Packed = list[tuple[str, str, str, list[tuple[str, list[tuple[str, str]], float]]]]
_packed = msgspec.msgpack.Decoder(Packed)
_departed = msgspec.msgpack.Decoder(Departed)


def families_of(metrics: Iterable[Metric]) -> Families:
    found: Families = {}
    for metric in metrics:
        values = {(s.name, tuple(s.labels.items())): s.value for s in metric.samples}
        found[metric.name] = Family(metric.type, metric.documentation, values)
    return found


def pack(families: Families) -> Packed:
    return [(n, f.kind, f.doc, [(s, list(labels), v) for (s, labels), v in f.values.items()]) for n, f in families.items()]


def unpack(packed: Packed) -> Families:
    return {
        name: Family(kind, doc, {(s, tuple((k, v) for k, v in labels)): value for s, labels, value in values})
        for name, kind, doc, values in packed
    }


def merged(running: Sequence[Families], departed: Sequence[Families]) -> Families:
    """Counters and histograms of all, gauges of those that run."""
    total: Families = {}
    for families, runs in [*((f, True) for f in running), *((f, False) for f in departed)]:
        for name, family in families.items():
            if family.kind == _GAUGE and not runs:
                continue
            into = total.setdefault(name, Family(family.kind, family.doc, {})).values
            for key, value in family.values.items():
                before = into.get(key)
                if before is None:
                    into[key] = value
                elif name in SMALLEST:
                    into[key] = min(before, value)
                elif name in LARGEST:
                    into[key] = max(before, value)
                else:
                    into[key] = before + value
    return total


class _Rendered(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for name, family in self._families.items():
            metric = Metric(name, family.doc, family.kind)
            for (sample, labels), value in family.values.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric


def text_of(families: Families) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Rendered(families))
    return generate_latest(registry)


class WorkerMetrics:
    """One worker's part. `name` is unique among the workers that ever used `directory`."""

    def __init__(self, registry: CollectorRegistry, directory: Path, name: str) -> None:
        self._registry = registry
        self._directory = directory
        self._name = name
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._tell, self._directory / (self._name + SOCKET))

    async def stop(self) -> None:
        """Leave the last values behind."""
        if self._server is not None:
            self._server.close()
            _write(self._directory / (self._name + LAST), self._own())
            (self._directory / (self._name + SOCKET)).unlink(missing_ok=True)

    async def text(self) -> bytes:
        """The sum over all workers, in the exposition format of Prometheus."""
        return await asyncio.to_thread(text_of, await self.families())

    async def families(self) -> Families:
        """The sum over all workers."""
        own = families_of(self._registry.collect())
        others = [p for p in self._directory.glob("*" + SOCKET) if p.stem != self._name]
        answers = await asyncio.gather(*[self._ask(path) for path in others])
        told = {path.stem: answer for path, answer in zip(others, answers, strict=True) if answer is not None}
        return await asyncio.to_thread(self._summed, own, told)

    def _own(self) -> bytes:
        return msgspec.msgpack.encode(pack(families_of(self._registry.collect())))

    async def _tell(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(self._own())
            writer.write_eof()
            await writer.drain()
        except OSError:
            log.debug("metrics: the worker that asked is gone")
        finally:
            writer.close()

    async def _ask(self, path: Path) -> bytes | None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path)
                try:
                    return await reader.read(-1)
                finally:
                    writer.close()
        except (OSError, TimeoutError) as exc:
            log.warning("metrics: worker %s doesn't answer (%r)", path.stem, exc)
            return None

    def _summed(self, own: Families, told: dict[str, bytes]) -> Families:
        running = [own]
        _write(self._directory / (self._name + LAST), msgspec.msgpack.encode(pack(own)))
        for name, answer in told.items():
            running.append(unpack(_packed.decode(answer)))
            _write(self._directory / (name + LAST), answer)
        gone = departed_in(self._directory)
        accounted = {self._name, *told, *gone.names}
        left = [path for path in self._directory.glob("*" + LAST) if path.stem not in accounted]
        ended = [unpack(gone.families), *(unpack(_packed.decode(path.read_bytes())) for path in left)]
        return merged(running, ended)


def departed_in(directory: Path) -> Departed:
    try:
        return _departed.decode((directory / DEPARTED).read_bytes())
    except FileNotFoundError:
        return Departed([], [])


def fold_departed(directory: Path, name: str) -> None:
    """The worker `name` has ended: what it left is added to what those before it left. Called by the supervisor alone."""
    (directory / (name + SOCKET)).unlink(missing_ok=True)
    last = directory / (name + LAST)
    if not last.exists():
        return
    before = departed_in(directory)
    total = merged([], [unpack(before.families), unpack(_packed.decode(last.read_bytes()))])
    # Whoever collects meanwhile sees the file of one or the other, and by the names which it is.
    _write(directory / DEPARTED, msgspec.msgpack.encode(Departed([*before.names, name], pack(total))))
    last.unlink()


def _write(path: Path, data: bytes) -> None:
    # Its own: two who ask at once are told by two threads.
    part = path.with_name(f".{path.name}.{threading.get_ident()}.part")
    part.write_bytes(data)
    part.replace(path)
