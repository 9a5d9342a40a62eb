"""The lists that a gateway decides by: follows the topic `list_changes` and keeps a copy of what it adds up to.

A thread of its own reads the one partition by a consumer without group: what is produced is in force a few milliseconds later, in every
process. Each change makes the next `ListBook`, which `on_book` gets. Now and then the book is written to a file
(gateway/policy/lists_file.py): a restart goes on from there, and with Kafka down it decides by the lists that it had.

The version is an offset of the topic, so the topic is compared with what is known before it is read on: when it is shorter, or holds
another record where the last one known was, the lists stay as they are and `trouble` says so until somebody looks. Where records are
missing in the middle what comes behind them is taken in, and `trouble` stays. A record that can't be read is skipped, counted and told.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastavro
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from gateway.contracts.lists import (
    CHANGE_BYTES_MAX,
    LIST_ENTRIES_MAX,
    NO_VERSION,
    ListBook,
    ListChange,
    ListChangeError,
    change_of_fields,
    change_of_json,
)
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry, UnknownSchemaError
from gateway.contracts.topics import LIST_CHANGES, TOPICS
from gateway.contracts.wire import is_framed, unframe
from gateway.metrics import Metrics
from gateway.policy.lists_file import Kept, KeptError, read_kept, write_kept

log = logging.getLogger(__name__)

# What decides while nothing is known of any list: not even that there is none.
UNKNOWN = ListBook(version=NO_VERSION)
PARTITION = 0
POLL_S = 0.2
ASK_TIMEOUT_S = 2.0
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
RECONNECT_MS_MAX = 1000
# So many changes make one book while there are more behind them: each book copies what it changes.
CHANGES_MAX = 20_000
FETCHED_KB_MAX = 16_384
# The file is written at most so often, and so that writing takes a twentieth of the time.
KEEP_S, KEEP_PART = 2.0, 20
STOP_S = 5.0
# How many skipped records are told one by one.
TOLD_MAX = 20


class _LostError(Exception):
    """This session can't go on; the next one asks the topic anew. The message says why."""


class ChangeReader:
    """Values of the topic as changes: Avro by the schema that it names, or JSON."""

    def __init__(self, registry: SchemaRegistry) -> None:
        self._registry = registry
        self._ours: Any = fastavro.parse_schema(json.loads(TOPICS[LIST_CHANGES].schema_text))
        self._writers: dict[int, Any] = {}

    def read(self, value: bytes | None) -> ListChange:
        """Raises `ListChangeError` for what is no change, `RegistryUnavailableError` for what can't be told now."""
        if value is None or len(value) > CHANGE_BYTES_MAX:
            raise ListChangeError(f"a change has at most {CHANGE_BYTES_MAX} bytes")
        if not is_framed(value):
            return change_of_json(value)
        try:
            schema_id, payload = unframe(value)
            stream = io.BytesIO(payload)
            fields: Any = fastavro.schemaless_reader(stream, self._writer(schema_id), self._ours)
        except (RegistryUnavailableError, ListChangeError):
            raise
        except Exception as exc:  # noqa: BLE001
            # On broken bytes fastavro raises whatever its decoder runs into.
            raise ListChangeError(f"not a record of its schema: {exc!r}") from exc
        if stream.tell() != len(payload) or not isinstance(fields, dict):
            raise ListChangeError("there are bytes behind the record")
        return change_of_fields(fields)

    def _writer(self, schema_id: int) -> Any:
        if schema_id not in self._writers:
            try:
                parsed = fastavro.parse_schema(json.loads(self._registry.schema(schema_id)))
            except UnknownSchemaError as exc:
                raise ListChangeError(f"the registry has no schema {schema_id}") from exc
            if not isinstance(parsed, dict) or parsed.get("name") != self._ours["name"]:
                raise ListChangeError(f"schema {schema_id} is not one of list_changes")
            self._writers[schema_id] = parsed
        return self._writers[schema_id]


class ListFollower:
    """`on_book` is called in the thread, with each new book. `path` is the file that the lists are kept in."""

    def __init__(
        self,
        bootstrap: str,
        reader: ChangeReader,
        metrics: Metrics,
        path: Path,
        on_book: Callable[[ListBook], None],
        *,
        entries_max: int = LIST_ENTRIES_MAX,
        topic: str = LIST_CHANGES,
    ) -> None:
        self._bootstrap = bootstrap
        self._at = TopicPartition(topic, PARTITION)
        self._reader = reader
        self._metrics = metrics
        self._path = path
        self._on_book = on_book
        self._entries_max = entries_max
        self.book = UNKNOWN
        # Of the record at version - 1; empty: not known.
        self._last_sha256 = ""
        # Offsets that nobody had a record for.
        self._missing = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        # Set once all that the topic held was taken in, and once it is known that this will take longer than a moment.
        self.caught_up = threading.Event()
        self._reached = threading.Event()
        # Why the lists may not be what they should be; None: they are.
        self.trouble: str | None = None
        self._told: str | None = None
        self._skipped = 0
        self._kept_version = NO_VERSION
        self._keep_from_s = 0.0

    def start(self) -> None:
        """Takes what was kept, at once, and follows the topic from there."""
        self._take_kept()
        self._thread = threading.Thread(target=self._run, name="lists", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Writes down what is new, and ends."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def wait(self, reach_s: float, most_s: float) -> bool:
        """True once everything is taken in. Waits `reach_s` seconds for the topic, and `most_s` when it was reached. Blocks."""
        return self.caught_up.wait(reach_s) or (self._reached.is_set() and self.caught_up.wait(most_s))

    def _take_kept(self) -> None:
        try:
            kept = read_kept(self._path, self._entries_max)
        except FileNotFoundError:
            self._metrics.lists_version.set(NO_VERSION)
            return
        except (KeptError, OSError) as exc:
            log.error("lists: what was kept can't be used, the topic is read from its beginning: %s", exc)  # noqa: TRY400
            self._metrics.lists_version.set(NO_VERSION)
            return
        self._last_sha256, self._missing, self._kept_version = kept.last_sha256, kept.missing, kept.book.version
        log.info("lists: version %d with %d entries, as kept", kept.book.version, kept.book.entries)
        self._say_missing()
        self._publish(kept.book)

    def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            try:
                self._session()
            except (KafkaException, RegistryUnavailableError, _LostError) as exc:
                if self.trouble is None or self._missing:
                    self._tell(f"the topic can't be read now: {exc}")
            except Exception:
                # A bug must not end the thread for good: the lists stay, and the log and the metric tell.
                log.exception("lists: the topic could not be followed")
                self._in_trouble("a failure, see the log")
            pause_s = RETRY_FIRST_S if time.monotonic() - began_s > RETRY_MAX_S else min(pause_s * 2, RETRY_MAX_S)
            self._stopping.wait(pause_s)
        self._keep(time.monotonic(), now=True)

    def _session(self) -> None:
        """One consumer, until told to stop or in trouble."""
        down = threading.Event()

        def note(error: KafkaError) -> None:
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                down.set()

        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                # Never joined, nothing is committed: librdkafka wants a name.
                "group.id": "fraudgate-lists",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "queued.max.messages.kbytes": FETCHED_KB_MAX,
                "reconnect.backoff.max.ms": RECONNECT_MS_MAX,
                "log_level": 0,
                "error_cb": note,
            }
        )
        try:
            start = self._begin(consumer)
            if start is None:
                return
            consumer.assign([TopicPartition(self._at.topic, PARTITION, start)])
            while not self._stopping.is_set():
                first = consumer.poll(POLL_S)
                if down.is_set():
                    raise _LostError("no broker can be reached")
                if first is not None:
                    self._take([first, *consumer.consume(CHANGES_MAX - 1, 0)])
                    self._note_lag(consumer)
                self._keep(time.monotonic())
        finally:
            consumer.close()

    def _begin(self, consumer: Consumer) -> int | None:
        """Where to read from; None when the topic isn't the one that the lists were read from. Raises KafkaException."""
        found = consumer.get_watermark_offsets(self._at, timeout=ASK_TIMEOUT_S)
        if found is None:
            raise _LostError("the broker doesn't answer")
        low, end = found
        version = max(self.book.version, 0)
        if end < version:
            self._in_trouble(f"the topic ends at {end}, the lists are of version {version}: they stay as they are")
            return None
        self._reached.set()
        if self._told is not None:
            log.info("lists: the topic can be read again")
            self._told = None
        self._say_missing()
        # The last record that is known comes first, to see that it is still the same.
        start = version - 1 if version > 0 and self._last_sha256 and low < version else version
        return int(max(start, low))

    def _take(self, messages: Sequence[Message]) -> None:
        """Make the next book of what a poll brought. Raises what ends the session, with nothing taken in."""
        changes: list[tuple[int, ListChange]] = []
        at = version = max(self.book.version, 0)
        missing, last_sha256, ended = 0, self._last_sha256, False
        for message in messages:
            error, offset, value = message.error(), message.offset(), message.value()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            assert offset is not None
            if offset > at:
                missing += offset - at
                log.error("lists: %d changes before offset %d are missing from the topic", offset - at, offset)
            if error is not None:
                ended, at = True, max(at, offset)
                continue
            digest = hashlib.sha256(value or b"").hexdigest()
            if offset == version - 1 and digest != last_sha256:
                self._in_trouble(f"the record at {offset} is not the one that was read before: the lists stay as they are")
                raise _LostError("the topic is another")
            if offset >= version:
                self._read(offset, value, changes)
                at, last_sha256 = offset + 1, digest
        self._missing += missing
        self._last_sha256 = last_sha256
        self._say_missing()
        if at > version or (ended and self.book.version == NO_VERSION):
            began = self.book if self.book.version >= 0 else ListBook(entries_max=self._entries_max)
            book = began.applied(changes, at)
            if book.refused:
                self._metrics.lists_skipped.labels("full").inc(book.refused)
                log.error("lists: %d changes are not in force: there are as many lists or entries as can be", book.refused)
            self._publish(book)
        if ended and not self.caught_up.is_set():
            log.info("lists: version %d with %d entries", self.book.version, self.book.entries)
            self.caught_up.set()

    def _read(self, offset: int, value: bytes | None, changes: list[tuple[int, ListChange]]) -> None:
        try:
            changes.append((offset, self._reader.read(value)))
        except ListChangeError as exc:
            self._metrics.lists_skipped.labels("malformed").inc()
            self._skipped += 1
            if self._skipped <= TOLD_MAX:
                log.error("lists: the change at offset %d is skipped: %s", offset, exc)  # noqa: TRY400

    def _publish(self, book: ListBook) -> None:
        self.book = book
        self._metrics.lists_version.set(book.version)
        self._metrics.lists_entries.set(book.entries)
        self._on_book(book)

    def _note_lag(self, consumer: Consumer) -> None:
        found = consumer.get_watermark_offsets(self._at, cached=True)
        if found is not None and found[1] >= 0:
            self._metrics.lists_lag.set(max(0, found[1] - max(self.book.version, 0)))

    def _keep(self, now_s: float, *, now: bool = False) -> None:
        """Write the book to its file when there is a new one and the last time is long enough ago."""
        if self.book.version == self._kept_version or (now_s < self._keep_from_s and not now):
            return
        try:
            write_kept(self._path, Kept(self.book, self._last_sha256, self._missing))
            self._kept_version = self.book.version
        except OSError as exc:
            log.error("lists: version %d can't be kept, a restart without Kafka goes without it: %r", self.book.version, exc)  # noqa: TRY400
        took_s = time.monotonic() - now_s
        self._keep_from_s = now_s + max(KEEP_S, KEEP_PART * took_s)

    def _say_missing(self) -> None:
        self._metrics.lists_missing.set(self._missing)
        self.trouble = f"{self._missing} changes were missing from the topic" if self._missing else None
        self._metrics.lists_trouble.set(self._missing > 0)

    def _in_trouble(self, text: str) -> None:
        self.trouble = text
        self._metrics.lists_trouble.set(1)
        self._tell(text)

    def _tell(self, text: str) -> None:
        if text != self._told:
            log.error("lists: %s", text)
        self._told = text
