"""What traces cost the HTTP door, by turns in one run: python -m tests.tracing_cost

CPU of batcher and scorer with a real model, without Redis, Kafka and sockets, in microseconds a transaction, and as ratios to the door that
has no collector. "process" is the whole process, its thread that makes and sends spans included; the collector is another process.
Times are of the round that took least, the second ratio is the median of the rounds' own.
With --off nothing but that door is measured, for the comparison with another checkout.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gateway.contracts.transaction import encode_json
from gateway.http.admission import AdaptiveLimit
from gateway.http.batcher import Batcher
from gateway.kafka.records import Record
from gateway.metrics import Metrics
from gateway.models.model import ModelSlot, load_model
from gateway.policy import load_policy
from gateway.policy.slot import PolicySlot
from gateway.redis.store import Observation
from gateway.redis.unobserved import Unobserved
from gateway.scoring.job import Job
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.requests import Requests
from gateway.scoring.scorer import Scorer
from tests.unit.gateway.factories import StubStore, make_observation, make_transaction, write_model

ROUNDS = 11
TRANSACTIONS_A_ROUND = 4096
BATCH_ROWS = 16
OFF = "no collector"


class EveryStore(StubStore):
    """An observation of as many rows as it is asked for."""

    async def observe(self, batch: Sequence[Job], requests: Requests, timeout_s: float, update: bool = True) -> Observation | None:
        return make_observation(len(batch))


class DeafPublisher:
    def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future


def make_door(models: ModelSlot, **tracing: Any) -> Batcher:
    metrics, store = Metrics(), EveryStore(None)
    scorer = Scorer(
        store,  # type: ignore[arg-type]
        models,
        PolicySlot(load_policy("")),
        metrics,
        RecentDecisions(1),
        Unobserved(store, metrics),  # type: ignore[arg-type]
        feature_budget_ms=1000,
        code_version="cost",
        **tracing,
    )
    return Batcher(
        scorer,
        DeafPublisher(),  # type: ignore[arg-type]
        metrics,
        batch_rows_max=256,
        limit=AdaptiveLimit(100_000, 10.0),
        publish_budget_s=1.0,
        **tracing,
    )


async def round_of(door: Batcher, bodies: Sequence[bytes], *tracing: bytes) -> tuple[float, float]:
    """Seconds of CPU of this thread and of the process, for all of `bodies`."""
    own_s, all_s = time.thread_time(), time.process_time()
    loop = asyncio.get_running_loop()
    for first in range(0, len(bodies), BATCH_ROWS):
        batch = bodies[first : first + BATCH_ROWS]
        answered = loop.create_future()
        left = len(batch)

        def done(*_: object, answered: asyncio.Future[None] = answered) -> None:
            nonlocal left
            left -= 1
            if not left:
                answered.set_result(None)

        now_s = time.monotonic()
        for body in batch:
            door.submit(body, now_s, now_s + 10.0, done, False, *tracing)
        await answered
    return time.thread_time() - own_s, time.process_time() - all_s


async def measure(doors: dict[str, tuple[Batcher, tuple[bytes, ...]]]) -> None:
    used: dict[str, list[tuple[float, float]]] = {name: [] for name in doors}
    for number in range(ROUNDS + 1):
        for name, (door, tracing) in doors.items():
            bodies = [encode_json(make_transaction(f"{number}-{i}", card_id=f"c{i % 997}")) for i in range(TRANSACTIONS_A_ROUND)]
            spent = await round_of(door, bodies, *tracing)
            if number:
                used[name].append(spent)
    for name, found in used.items():
        told = []
        for i, which in enumerate(("loop", "process")):
            ratio = median(mine[i] / off[i] for mine, off in zip(found, used[OFF], strict=True))
            least = min(one[i] for one in found)
            ratio_of_least = least / min(one[i] for one in used[OFF])
            told.append(f"{which} {least * 1e6 / TRANSACTIONS_A_ROUND:6.2f} us  x{ratio_of_least:.3f}  median x{ratio:.3f}")
        print(f"{name:36} {'   '.join(told)}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), trees=100)
        models = ModelSlot(Path(folder))
        models.model = load_model(Path(folder), "champion")
        doors: dict[str, tuple[Batcher, tuple[bytes, ...]]] = {OFF: (make_door(models), ())}
        if "--off" in sys.argv:
            asyncio.run(measure(doors))
            return
        receiver = subprocess.Popen([sys.executable, "-m", "tests.otlp"], stdout=subprocess.PIPE, text=True)
        try:
            assert receiver.stdout is not None
            doors |= traced_doors(models, receiver.stdout.readline().strip())
            asyncio.run(measure(doors))
        finally:
            receiver.terminate()
            receiver.wait()


def traced_doors(models: ModelSlot, url: str) -> dict[str, tuple[Batcher, tuple[bytes, ...]]]:
    from gateway.tracing.export import Exporter
    from gateway.tracing.tracer import Tracer

    found: dict[str, tuple[Batcher, tuple[bytes, ...]]] = {}
    for name, share, per_s in (
        ("a collector, nothing sampled", 0.0, 100),
        ("1 per mille, at most 100 a second", 0.001, 100),
        ("all, at most 100 a second", 1.0, 100),
        ("all, at most 10,000 a second", 1.0, 10_000),
    ):
        tracer = Tracer(Metrics(), Exporter(url, "cost", "0").send, sample_share=share, per_s_max=per_s, waiting_max=1000)
        tracer.start()
        found[name] = (make_door(models, tracer=tracer), ())
    return found


if __name__ == "__main__":
    main()
