"""What is scored after the answers: by shadow models, and by the other of champion and challenger for the guard.

One thread a process, of the lowest priority, behind a bounded queue: when it can't keep up the oldest batches are given up and counted.
Nothing here can change an answer: the thread writes to nothing that the scorers read, and observes nothing in Redis.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.guard import Guard
from gateway.metrics import Metrics
from gateway.model import ORT_ERRORS, Live, Model
from gateway.policy import Columns, Policy
from gateway.requests import Requests

log = logging.getLogger(__name__)

# At 64 rows a batch, 16,000 decisions and some 6 MB.
BATCHES_MAX = 256
# How long the thread waits once there is something, so that what just came is answered first.
PAUSE_S = 0.01
NICE = 19
STOP_S = 5.0

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Takes a shadow model's scores of some rows, in the thread.
Publish = Callable[[Model, Requests, Int64s, Floats], None]


@dataclass(slots=True, eq=False)
class Scored:
    """A batch that was decided: `rows` of `requests`, the rest by row. `severity` is what the policy came to."""

    live: Live
    requests: Requests
    rows: Int64s
    matrix: npt.NDArray[np.float32]
    probability: Floats
    by_challenger: npt.NDArray[np.bool_] | None
    severity: Int64s


class Slack:
    """`add` is called on the event loop, `publish` and `guard` in the thread."""

    def __init__(
        self, policy: Policy, metrics: Metrics, publish: Publish, guard: Guard | None = None, batches_max: int = BATCHES_MAX
    ) -> None:
        self._policy = policy
        self._metrics = metrics
        self._publish = publish
        self._guard = guard
        self._batches_max = batches_max
        self._queue: deque[Scored] = deque()
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
        if len(self._queue) >= self._batches_max:
            with contextlib.suppress(IndexError):
                self._metrics.slack_dropped.inc(len(self._queue.popleft().rows))
        self._queue.append(batch)
        self._some.set()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            # On Linux a thread has a priority of its own.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._stopping:
            self._some.wait()
            self._some.clear()
            time.sleep(PAUSE_S)
            while self._queue and not self._stopping:
                self._metrics.slack_batches.set(len(self._queue))
                try:
                    batch = self._queue.popleft()
                except IndexError:
                    break
                try:
                    self.work(batch)
                except Exception:
                    # A bug here must not end the guard for good.
                    log.exception("slack: a batch of %d failed", len(batch.rows))
            self._metrics.slack_batches.set(len(self._queue))

    def work(self, batch: Scored) -> None:
        """All that is to be done for one batch."""
        for shadow in batch.live.shadows:
            probability = self._scored(shadow, batch.matrix)
            if probability is not None:
                self._metrics.shadow_scored.labels(shadow.ref.route).inc(len(probability))
                self._publish(shadow, batch.requests, batch.rows, probability)
        if self._guard is not None and batch.by_challenger is not None and batch.live.challenger is not None:
            self._pair(batch, batch.by_challenger, self._guard)

    def _scored(self, model: Model, matrix: npt.NDArray[np.float32]) -> Floats | None:
        """None when the model fails."""
        try:
            return model.probability(matrix)
        except (*ORT_ERRORS, ValueError, RuntimeError) as exc:
            self._metrics.shadow_failed.labels(model.ref.route).inc()
            if model.digest not in self._told:
                self._told.add(model.digest)
                log.error("slack: %s %s failed: %s", model.ref.route, model.ref.version, exc)  # noqa: TRY400
            return None

    def _pair(self, batch: Scored, chosen: npt.NDArray[np.bool_], guard: Guard) -> None:
        """Let the other of the two models decide each row too."""
        live = batch.live
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
        severity = self._policy.decide(Columns(batch.requests, batch.rows, batch.matrix, other_score), has_features=True).severity
        guard.sighted(
            live,
            batch.requests,
            batch.rows,
            (np.where(chosen, batch.severity, severity), np.where(chosen, score, other_score)),
            (np.where(chosen, severity, batch.severity), np.where(chosen, other_score, score)),
        )
