"""A trace of some decisions: which, and how they get from the event loop to the collector.

A decision is traced when its caller traces it (`traceparent` with the sampled flag, over HTTP or in Kafka), or, where the caller says
nothing, when the hash of its transaction_id falls into the sampled share: the same transactions in every gateway and in every run. Of
one process no more than `per_s_max` a second are, whoever asks.

The doors leave what is finished in a bounded queue after the answer. A thread makes spans of it and sends them: a collector that is slow or
away costs traces, which are counted, and never a decision. `python -m tests.tracing_cost` measures what it costs; without a collector it is
one comparison a batch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.routing import salt_of
from gateway.kernels.intake import TRANSACTION_ID
from gateway.kernels.points import points
from gateway.metrics import Metrics
from gateway.scoring.job import Result
from gateway.scoring.requests import Requests
from gateway.tracing.trace import Steps, Trace, is_sampled, trace_of

log = logging.getLogger(__name__)

# So many decisions go to the collector at a time, and so long the thread waits for more to come: each call has a fixed price.
SEND_MAX = 64
PAUSE_S = 0.5
# At the end, the collector gets so long to take what waits.
STOP_S = 2.0

_SALT = np.uint64(salt_of("trace", "1"))


@dataclass(slots=True, eq=False)
class Finished:
    """A traced decision that was answered (HTTP) or committed (Kafka). Times are time.monotonic(), `wall_ns` what to add for the clock."""

    trace: Trace
    result: Result
    handed_s: float
    ended_s: float
    wall_ns: int


# Sends to the collector, in the thread. False when it didn't take them.
Export = Callable[[Sequence[Finished]], bool]


class Tracer:
    """`sample` and `finish` are called on the event loop, `export` in the thread. `sample_share` is 0 to 1.

    `waiting_max` bounds the queue, in decisions; what doesn't fit is dropped and counted, the newest first.
    """

    def __init__(
        self,
        metrics: Metrics,
        export: Export,
        *,
        sample_share: float,
        per_s_max: int,
        waiting_max: int,
        clock_s: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._metrics = metrics
        self._export = export
        self._sample_share = sample_share
        self._per_s_max = per_s_max
        self._waiting_max = waiting_max
        self._clock_s = clock_s
        self._wall_clock_ns = wall_clock_ns
        # How many more may be traced now; a second fills it.
        self._allowance = float(per_s_max)
        self._allowed_s = clock_s()
        self._waiting: deque[Finished] = deque()
        self._some = threading.Event()
        self._stopping = threading.Event()
        self._in_trouble = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sends what waits, for at most STOP_S."""
        self._stopping.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def sample(self, requests: Requests, rows: npt.NDArray[np.int64], results: Sequence[Result], steps: Steps) -> None:
        """Give those of `results` a trace that get one; they are what became of `rows`. Their jobs' traceparent names the new span then."""
        chosen: list[int] = []
        if self._sample_share > 0:
            point = np.empty(len(rows))
            points(requests.buf, requests.starts, requests.lengths, rows, TRANSACTION_ID, _SALT, point)
            chosen = np.flatnonzero(point < self._sample_share).tolist()
        told = [i for i, result in enumerate(results) if result.job.traceparent is not None]
        if told:
            # A caller's word goes before the hash, either way.
            theirs = [i for i in told if is_sampled(results[i].job.traceparent or b"")]
            chosen = [*theirs, *(set(chosen) - set(told))]
        for i in self._allowed(chosen):
            result = results[i]
            job = result.job
            result.trace = trace_of(job.transaction_id, job.traceparent, steps)
            job.traceparent = result.trace.traceparent

    def _allowed(self, chosen: list[int]) -> list[int]:
        if not chosen:
            return chosen
        now_s = self._clock_s()
        self._allowance = min(self._per_s_max, self._allowance + (now_s - self._allowed_s) * self._per_s_max)
        self._allowed_s = now_s
        count = min(len(chosen), int(self._allowance))
        self._allowance -= count
        if count < len(chosen):
            self._metrics.traces.labels("over_limit").inc(len(chosen) - count)
        return chosen[:count]

    def finish(self, results: Sequence[Result], handed_s: float, ended_s: float) -> None:
        """These were handed over to Kafka or its log at `handed_s`, and that was done at `ended_s`. Never waits."""
        traced = [result for result in results if result.trace is not None]
        if not traced:
            return
        wall_ns = self._wall_clock_ns() - round(self._clock_s() * 1e9)
        room = max(0, self._waiting_max - len(self._waiting))
        for result in traced[:room]:
            assert result.trace is not None
            self._waiting.append(Finished(result.trace, result, handed_s, ended_s, wall_ns))
        if len(traced) > room:
            self._metrics.traces.labels("dropped").inc(len(traced) - room)
        self._metrics.traces_waiting.set(len(self._waiting))
        self._some.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._some.wait()
            self._some.clear()
            while self._waiting and not self._stopping.wait(PAUSE_S):
                self.send()
        while self._waiting and self.send():
            # What came before the end, while the collector takes it.
            pass

    def send(self) -> bool:
        """One call of the collector with the oldest that wait. False when it didn't take them: they are given up. In the thread."""
        taken: list[Finished] = []
        with contextlib.suppress(IndexError):
            while len(taken) < SEND_MAX:
                taken.append(self._waiting.popleft())
        self._metrics.traces_waiting.set(len(self._waiting))
        try:
            sent = self._export(taken)
        except Exception:
            # A bug here must not end tracing for good.
            log.exception("tracing: %d traces could not be made", len(taken))
            sent = False
        self._metrics.traces.labels("sent" if sent else "failed").inc(len(taken))
        if sent and self._in_trouble:
            log.info("tracing: the collector takes traces again")
        elif not sent and not self._in_trouble:
            log.warning("tracing: the collector doesn't take traces, which are given up")
        self._in_trouble = not sent
        return sent
