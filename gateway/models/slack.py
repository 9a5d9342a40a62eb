"""What is scored after the answers: by shadow models, and by the other of champion and challenger for the guard.

One thread a process behind two bounded queues: when it can't keep up the oldest batches are given up and counted. Shadows wait for a
moment in which nobody waits for an answer; the guard doesn't, because it is there to be quick. The thread has the event loop's priority:
with a lower one it would keep the interpreter's lock, and everybody, while other processes run.
Nothing here can change an answer: the thread writes to nothing that the scorers read, and observes nothing in Redis.
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

from gateway.metrics import Metrics
from gateway.models.guard import Guard
from gateway.models.model import ORT_ERRORS, Live, Model
from gateway.policy import Columns
from gateway.policy.slot import Steering
from gateway.scoring.requests import Requests

log = logging.getLogger(__name__)

# At 64 rows a batch, 16,000 decisions and some 6 MB.
BATCHES_MAX = 256
# How long the thread waits once there is something: what just came is answered first, and more comes that shares the fixed costs.
PAUSE_S = 0.1
# So many rows of several batches go through a shadow model at once: a third of a millisecond.
SHADOW_ROWS = 64
# How often each shadow model looks for an idle moment, and how long at most: on a gateway that is never idle shadows score a sample.
LOOK_S, LOOK_MOST_S = 0.002, 0.05
STOP_S = 5.0

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Takes what some shadow models made of the same payments, in the thread: the payments, batch by batch, and each model's scores of all.
Publish = Callable[[Sequence[tuple[Requests, Int64s]], Sequence[tuple[Model, Floats]]], None]


@dataclass(slots=True, eq=False)
class Scored:
    """A batch that was decided, by `steering`: `rows` of `requests`, the rest by row. `severity` is what the policy came to."""

    live: Live
    steering: Steering
    requests: Requests
    rows: Int64s
    matrix: npt.NDArray[np.float32]
    received_at_ms: Int64s
    probability: Floats
    by_challenger: npt.NDArray[np.bool_] | None
    severity: Int64s


class Slack:
    """`add` is called on the event loop, `publish` and `guard` in the thread. `idle` tells that no answer is being waited for."""

    def __init__(
        self,
        metrics: Metrics,
        publish: Publish,
        guard: Guard | None = None,
        *,
        idle: Callable[[], bool] = lambda: True,
        batches_max: int = BATCHES_MAX,
    ) -> None:
        self._metrics = metrics
        self._publish = publish
        self._guard = guard
        self._idle = idle
        self._batches_max = batches_max
        self._pairs: deque[Scored] = deque()
        self._shadows: deque[Scored] = deque()
        self._some = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        # Shadows whose failure was told.
        self._told: set[str] = set()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="slack", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, which may be within one batch, and leaves the rest."""
        self._stopping = True
        self._some.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def add(self, batch: Scored) -> None:
        """Never waits."""
        if self._guard is not None and batch.by_challenger is not None:
            self._queue(self._pairs, batch)
        if batch.live.shadows:
            self._queue(self._shadows, batch)
        self._some.set()

    def _queue(self, queue: deque[Scored], batch: Scored) -> None:
        if len(queue) >= self._batches_max:
            with contextlib.suppress(IndexError):
                self._metrics.slack_dropped.inc(len(queue.popleft().rows))
        queue.append(batch)

    def _run(self) -> None:
        while not self._stopping:
            self._some.wait()
            self._some.clear()
            time.sleep(PAUSE_S)
            while (self._pairs or self._shadows) and not self._stopping:
                self._metrics.slack_batches.set(len(self._pairs) + len(self._shadows))
                if self._pairs:
                    self._do(self.pair, self._taken(self._pairs, 1))
                else:
                    self._do(self.shadow, self._taken(self._shadows, SHADOW_ROWS))
            self._metrics.slack_batches.set(len(self._pairs) + len(self._shadows))

    def _wait_for_a_moment(self) -> None:
        """Until nobody waits for an answer, or the guard has something to do, or for LOOK_MOST_S."""
        for _ in range(round(LOOK_MOST_S / LOOK_S)):
            if self._idle() or self._pairs or self._stopping:
                return
            time.sleep(LOOK_S)

    @staticmethod
    def _taken(queue: deque[Scored], rows: int) -> list[Scored]:
        """The oldest batches with the same models, until there are so many rows; none when they were dropped meanwhile."""
        taken: list[Scored] = []
        with contextlib.suppress(IndexError):
            while rows > 0 and (not taken or queue[0].live is taken[0].live):
                taken.append(queue.popleft())
                rows -= len(taken[-1].rows)
        return taken

    @staticmethod
    def _do(work: Callable[[list[Scored]], None], batches: list[Scored]) -> None:
        if not batches:
            return
        try:
            work(batches)
        except Exception:
            # A bug here must not end the guard for good.
            log.exception("slack: %d decisions failed", sum(len(batch.rows) for batch in batches))

    def shadow(self, batches: list[Scored]) -> None:
        """Every shadow model's scores of batches that came with the same models."""
        matrix = batches[0].matrix if len(batches) == 1 else np.concatenate([batch.matrix for batch in batches])
        scores: list[tuple[Model, Floats]] = []
        for model in batches[0].live.shadows:
            self._wait_for_a_moment()
            probability = self._scored(model, matrix)
            if probability is not None:
                self._metrics.shadow_scored.labels(model.ref.route).inc(len(probability))
                scores.append((model, probability))
        if scores:
            self._wait_for_a_moment()
            self._publish([(batch.requests, batch.rows) for batch in batches], scores)

    def pair(self, batches: list[Scored]) -> None:
        """Let the other of the two models decide each row too, and show both decisions to the guard."""
        for batch in batches:
            self._pair(batch)

    def _scored(self, model: Model, matrix: npt.NDArray[np.float32]) -> Floats | None:
        """None when the model fails."""
        failed = self._metrics.shadow_failed.labels(model.ref.route)
        try:
            return model.probability(matrix)
        except (*ORT_ERRORS, ValueError, RuntimeError) as exc:
            failed.inc()
            if model.digest not in self._told:
                self._told.add(model.digest)
                log.error("slack: %s %s failed: %s", model.ref.route, model.ref.version, exc)  # noqa: TRY400
            return None

    def _pair(self, batch: Scored) -> None:
        live, chosen, guard = batch.live, batch.by_challenger, self._guard
        assert guard is not None
        assert chosen is not None
        assert live.champion is not None
        assert live.challenger is not None
        other = np.empty(len(chosen))
        for model, mask in ((live.challenger, ~chosen), (live.champion, chosen)):
            if mask.any():
                found = self._scored(model, batch.matrix[mask])
                if found is None:
                    return
                other[mask] = found
        score, other_score = (np.floor(p * 1000 + 0.5) for p in (batch.probability, other))
        columns = Columns(batch.requests, batch.rows, batch.matrix, other_score, batch.received_at_ms)
        severity = batch.steering.policy.decide(columns, has_features=True, lists=batch.steering.lists).severity
        guard.sighted(
            live,
            batch.requests,
            batch.rows,
            (np.where(chosen, batch.severity, severity), np.where(chosen, score, other_score)),
            (np.where(chosen, severity, batch.severity), np.where(chosen, other_score, score)),
        )
