"""One run of load: a source, the doors it goes through, its pace, and the accounting. Called by the commands and the demo."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gateway.contracts.label import Label
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings, client_headers
from gateway.contracts.topics import DECISIONS, LABELS, QUARANTINE, TRANSACTIONS
from gateway.contracts.transaction import EVENT_TIME_FUTURE_MS_MAX
from loadtest.accounting import Accountant, Accounting
from loadtest.encoding import Encode, avro_encoder, json_encoder
from loadtest.events import Event, LoadError, Source
from loadtest.ledger import DOORS, Ledger
from loadtest.pace import Pace
from loadtest.progress import Progress
from loadtest.senders.http import HttpReport, HttpSender, require_gateway
from loadtest.senders.kafka import KafkaReport, KafkaSender, require_topics
from loadtest.simulator import Simulator, SimulatorConfig

LABELS_NONE, LABELS_DUE, LABELS_ALL = "none", "due", "all"
WAIT_S_DEFAULT = 120.0


class Simulation:
    """A stretch of a simulation as a source: the `count` payments behind the first `skip`."""

    def __init__(self, config: SimulatorConfig, count: int, skip: int = 0) -> None:
        self.simulator = Simulator(config)
        self._count, self._skip = count, skip

    def events(self) -> Iterator[Event]:
        last_ms = None
        for event in self.simulator.events(self._skip):
            last_ms = event.transaction.event_time_ms
        if last_ms is not None:
            # Labels that were due in the stretch before belong to it.
            self.simulator.labels_due(last_ms)
        yield from self.simulator.events(self._count)

    def labels_due(self, now_ms: int) -> list[Label]:
        return self.simulator.labels_due(now_ms)

    def labels_remaining(self) -> list[Label]:
        return self.simulator.labels_remaining()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send and how. `source` gives a fresh pass each time it is called, always with the same payments.

    Two doors share the payments by card, so that each card keeps to one door and its order. `labels`: none, those that become
    known within the stretch, or all.
    """

    source: Callable[[], Source]
    total: int | None
    doors: tuple[str, ...] = ("kafka",)
    pace: Pace = field(default_factory=Pace)
    avro: bool = True
    history: bool = False
    labels: str = LABELS_NONE
    account: bool = True
    wait_s: float = WAIT_S_DEFAULT

    def __post_init__(self) -> None:
        assert self.doors and set(self.doors) <= set(DOORS)
        assert self.labels in (LABELS_NONE, LABELS_DUE, LABELS_ALL)
        assert not (self.history and (self.account or self.doors != ("kafka",)))


@dataclass
class RunReport:
    """`kafka` also counts labels, whichever door the payments took."""

    kafka: KafkaReport | None
    http: HttpReport | None
    accounting: Accounting | None
    took_s: float


def door_of(card_id: str, doors: tuple[str, ...]) -> str:
    """The door that a card's payments take, the same on every machine and in every run."""
    return doors[zlib.crc32(card_id.encode()) % len(doors)]


def sequenced(
    source: Source, door: str, doors: tuple[str, ...], on_time: Callable[[int], None], clock: Callable[[], float] = time.time
) -> Iterator[tuple[int, int, Event]]:
    """(sequence, milliseconds of event time since the first, event) for the payments of one door; `on_time` hears every event time.

    Raises `LoadError` at an event too far ahead of the clock, which the gateway would refuse.
    """
    first_ms = None
    for sequence, event in enumerate(source.events()):
        at_ms = event.transaction.event_time_ms
        if first_ms is None:
            first_ms = at_ms
        if at_ms > clock() * 1000 + EVENT_TIME_FUTURE_MS_MAX:
            raise LoadError(
                "the simulated time has run more than 24 hours ahead of the clock: choose an earlier --start, fewer --events or"
                " more --events-per-day"
            )
        on_time(at_ms)
        if len(doors) == 1 or door_of(event.transaction.card_id, doors) == door:
            yield sequence, at_ms - first_ms, event


def run_load(load: Load, settings: Settings, *, show_progress: bool = True) -> RunReport:
    """Send everything, wait for the decisions, account for them. Raises `LoadError` with what to do about it."""
    registry = SchemaRegistry(settings.registry, settings.schemas_path)
    with_labels = load.labels != LABELS_NONE
    if "kafka" in load.doors or with_labels or load.account:
        require_topics(settings.bootstrap, (TRANSACTIONS, LABELS, *((DECISIONS, QUARANTINE) if load.account else ())))
    if "http" in load.doors:
        require_gateway(settings.gateway)
    ledger = Ledger() if load.account else None
    kafka: KafkaSender | None = None
    if "kafka" in load.doors or with_labels:
        encoders: dict[str, Encode] = {
            topic: avro_encoder(topic, registry) if load.avro else json_encoder() for topic in (TRANSACTIONS, LABELS)
        }
        kafka = KafkaSender(settings.bootstrap, encoders[TRANSACTIONS], encoders[LABELS], history=load.history, ledger=ledger)
    http = HttpSender(settings.gateway, ledger=ledger, headers=client_headers(settings)) if "http" in load.doors else None
    accountant = (
        None
        if ledger is None
        else Accountant(settings.bootstrap, registry, ledger, idempotency_window_s=settings.idempotency_window_s)
    )
    if accountant is not None:
        accountant.start()
    started = time.monotonic()
    progress = Progress("sent", load.total) if show_progress else None
    try:
        _send(load, kafka, http, progress)
    finally:
        if progress is not None:
            progress.close()
    took_s = time.monotonic() - started
    accounting = None
    if accountant is not None:
        progress = Progress("accounted", load.total) if show_progress else None
        accounting = accountant.finish(load.wait_s, None if progress is None else progress.add)
        if progress is not None:
            progress.close()
    return RunReport(None if kafka is None else kafka.report, None if http is None else http.report, accounting, took_s)


def _send(load: Load, kafka: KafkaSender | None, http: HttpSender | None, progress: Progress | None) -> None:
    """Both doors at once when both are asked for: Kafka's in a thread of its own. The first door's source gives the labels."""
    add = None if progress is None else progress.add

    def go(door: str) -> None:
        source = load.source()
        labels_here = load.labels != LABELS_NONE and door == load.doors[0]

        def on_time(now_ms: int) -> None:
            due = source.labels_due(now_ms)
            if labels_here:
                assert kafka is not None
                for label in due:
                    kafka.send_label(label)

        events = sequenced(source, door, load.doors, on_time)
        if door == "kafka":
            assert kafka is not None
            kafka.run(events, load.pace, add)
        else:
            assert http is not None
            http.run(events, load.pace, add)
        if labels_here and load.labels == LABELS_ALL:
            assert kafka is not None
            for label in source.labels_remaining():
                kafka.send_label(label)
        if labels_here:
            assert kafka is not None
            kafka.flush()

    if len(load.doors) == 1:
        go(load.doors[0])
        return
    failures: list[LoadError] = []

    def beside() -> None:
        try:
            go("kafka")
        except LoadError as exc:
            failures.append(exc)

    thread = threading.Thread(target=beside, name="kafka-sender", daemon=True)
    thread.start()
    go("http")
    thread.join()
    if failures:
        raise failures[0]
