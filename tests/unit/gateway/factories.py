"""What the gateway's tests build: transactions, jobs, packed values, a real small model, and stand-ins for faults and time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xgboost
from onnxmltools import convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType

from gateway.contracts.decision import Answer, Door, Outcome
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES, FINGERPRINT, LABELLED
from gateway.contracts.layout import POSITION, PROGRESS_KEY, Progress
from gateway.contracts.model_meta import (
    GOLDEN_FILE,
    INPUT_NAME,
    METADATA_FILE,
    MODEL_FILE,
    Manifest,
    ModelEntry,
    ModelMetadata,
    sha256_file,
    write_manifest,
)
from gateway.contracts.transaction import RefusedError, Transaction
from gateway.http.bodies import read_bodies
from gateway.kafka.avro import encode_transaction
from gateway.redis.link import RedisUnavailableError, Sent
from gateway.redis.store import Observation
from gateway.scoring.job import Job, Result, Verdict, fingerprint_of, http_job, kafka_position
from gateway.scoring.requests import Requests, read_requests
from tests.resp import Status, encoded

NOW_MS = 1_795_500_000_000


def make_transaction(transaction_id: str = "t1", **changes: Any) -> Transaction:
    values: dict[str, Any] = {
        "transaction_id": transaction_id,
        "event_time_ms": NOW_MS,
        "card_id": "card-1",
        "customer_id": "customer-1",
        "merchant_id": "merchant-1",
        "amount_minor": 1234,
        "currency": "EUR",
        "channel": "pos",
        "mcc": "5411",
        "country": "DE",
    }
    return Transaction(**(values | changes))


def make_job(
    t: Transaction | None = None,
    *,
    offset: int | None = None,
    deadline_s: float | None = None,
    process: int = 1,
    claimed_ms: int = NOW_MS,
) -> Job:
    """From the Kafka door when an offset is given, else from the HTTP door of a process."""
    t = make_transaction() if t is None else t
    from_kafka = offset is not None
    position = POSITION.pack(b"h", 0, process, claimed_ms) if offset is None else kafka_position(0, offset)
    return Job(
        transaction_id=t.transaction_id,
        card_id=t.card_id.encode(),
        payload=encode_transaction(t),
        claim=fingerprint_of(encode_transaction(t)) + position,
        door=Door.KAFKA if from_kafka else Door.HTTP,
        arrived_ms=NOW_MS,
        received_ms=NOW_MS,
        received_s=0.0,
        deadline_s=deadline_s,
        partition=0 if from_kafka else None,
        offset=offset,
    )


def read_job(body: bytes, received_s: float, deadline_s: float) -> Job | RefusedError:
    """What the batcher makes of a body."""
    [record], _ = read_bodies([body], NOW_MS)
    if isinstance(record, RefusedError):
        return record
    requests = read_requests([record], np.array([-1]))
    fingerprint = fingerprint_of(record)
    return http_job(requests.ids()[0], requests.cards()[0], record, fingerprint, NOW_MS, NOW_MS, received_s, deadline_s, 1)


def make_answer(transaction_id: str = "t1") -> Answer:
    return Answer(
        transaction_id=transaction_id,
        decision=Outcome.APPROVE,
        risk_score=1,
        probability=0.001,
        reasons=[],
        rule_hits=[],
        model=None,
        degraded=[],
        latency_ms=1.0,
    )


def decided(job: Job) -> Result:
    answer = make_answer(job.transaction_id)
    return Result(job, Verdict.DECIDED, answer=answer, receipt=b"receipt", outcome=answer.decision)


def packed_progress(written_at_ms: int = NOW_MS, arrived_through_ms: int = 0, batch_id: int = 1, lost_at_ms: int = 0) -> bytes:
    progress = Progress(1, batch_id, written_at_ms, arrived_through_ms, lost_at_ms)
    return msgspec.msgpack.encode(progress)


class ScriptedLink:
    """Stands for gateway.redis.link.RedisLink: answers the observe script and its MGET with the given reply."""

    def __init__(self, reply: tuple[Any, list[Any]] | Exception, progress: bytes | None = None) -> None:
        self.greeting: list[tuple[Any, ...]] = []
        self.ready = True
        self.sent: list[tuple[Any, ...]] = []
        self.reply = reply
        self._progress = progress

    async def call(self, command: Sequence[Any], _timeout_s: float) -> Any:
        self.sent.append(tuple(command))
        assert tuple(command) == ("GET", PROGRESS_KEY)
        return self._progress

    def send(self, commands: Sequence[bytes], replies: int | None = None, *, raw: bool = False) -> Sent:
        """What isn't `raw` are records to store."""
        if not self.ready:
            raise RedisUnavailableError("no connection")
        self.sent += [(command,) for command in commands]
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not raw:
            future.set_result([b"OK"] * (len(commands) if replies is None else replies))
        elif isinstance(self.reply, RedisUnavailableError):
            future.set_exception(self.reply)
        else:
            reply: Any = self.reply
            # A read that changes nothing is the MGET alone.
            alone = reply if isinstance(reply, Exception) else reply[1]
            both = [Status("OK"), Status("QUEUED"), Status("QUEUED"), reply]
            future.set_result(b"".join(map(encoded, both if replies == 4 else [alone])))
        return Sent(self, None, future)  # type: ignore[arg-type]

    def in_time(self) -> None:
        """What `replies_of` tells a link."""


class StubStore:
    """Stands for gateway.redis.store.Store: gives a fixed observation, or none as when Redis misses its budget."""

    def __init__(self, observation: Observation | None, ready: bool = True) -> None:
        self.observation = observation
        self.ready = ready
        self.claim_ttl_ms = 600_000
        self.refused_values = 0
        self.refused_writes = 0
        self.failed_records = 0
        self.timeouts_s: list[float] = []
        self.recorded: list[Job] = []
        # What another gateway answered meanwhile, for every transaction; and those that it was asked for.
        self.answered: bytes | None = None
        self.asked: list[Job] = []

    async def observe(
        self, _batch: Sequence[Job], _requests: Requests, timeout_s: float, update: bool = True
    ) -> Observation | None:
        assert update
        self.timeouts_s.append(timeout_s)
        return self.observation

    def record(self, records: Sequence[tuple[Job, bytes]], commands: bytes | None = None) -> None:
        self.recorded += [job for job, _ in records]

    async def settle(self, records: Sequence[tuple[Job, bytes]], timeout_s: float) -> list[bytes | None]:
        self.asked += [job for job, _ in records]
        return [self.answered] * len(records)


def make_observation(rows: int, **features: float) -> Observation:
    """Nothing settled, nothing stale; all features NaN but the given ones."""
    matrix = np.full((rows, len(FEATURE_NAMES)), np.nan, np.float32)
    for name, value in features.items():
        matrix[:, FEATURE_INDEX[name]] = value
    return Observation(
        settled=[None] * rows,
        matrix=matrix,
        seq=np.zeros((rows, 5), np.int64),
        label_changes=np.zeros((rows, len(LABELLED)), np.int64),
        stale=np.zeros(rows, bool),
        tiles_age_ms=7,
    )


def write_model(
    model_dir: Path,
    version: str = "1",
    seed: int = 1,
    *,
    above_minor: int = 10_000,
    rows: int = 400,
    trees: int = 10,
    **changes: Any,
) -> Manifest:
    """A small real XGBoost model of the amount, exported to ONNX with golden rows, and the manifest that names it champion. Amounts above
    `above_minor` are frauds.

    `changes` replace fields of its metadata, to make it one that must be refused.
    """
    rng = np.random.default_rng(seed)
    features = rng.lognormal(8, 2, (rows, len(FEATURE_NAMES))).astype(np.float32)
    features[rng.random(features.shape) < 0.2] = np.nan
    frauds = np.nan_to_num(features[:, FEATURE_INDEX["amount_minor"]]) > above_minor
    classifier = xgboost.XGBClassifier(n_estimators=trees, max_depth=3, n_jobs=1, random_state=seed)
    classifier.fit(features, frauds)
    exported = convert_xgboost(classifier, initial_types=[(INPUT_NAME, FloatTensorType([None, features.shape[1]]))])
    folder = model_dir / f"fraudgate-{version}"
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(exported.SerializeToString())
    np.savez(folder / GOLDEN_FILE, features=features[:64], probability=classifier.predict_proba(features[:64])[:, 1])
    metadata = ModelMetadata(
        name="fraudgate",
        version=version,
        created_at_ms=NOW_MS,
        feature_fingerprint=FINGERPRINT,
        feature_names=list(FEATURE_NAMES),
        onnx_sha256=sha256_file(folder / MODEL_FILE),
        training_table="training_set",
        training_table_version=0,
        training_rows=rows,
        training_frauds=int(frauds.sum()),
        metrics={},
    )
    (folder / METADATA_FILE).write_bytes(msgspec.json.encode(msgspec.structs.replace(metadata, **changes)))
    files = {name: sha256_file(folder / name) for name in (MODEL_FILE, METADATA_FILE, GOLDEN_FILE)}
    manifest = Manifest(routes={"champion": ModelEntry(name="fraudgate", version=version, directory=folder.name, files=files)})
    write_manifest(model_dir, manifest)
    return manifest
