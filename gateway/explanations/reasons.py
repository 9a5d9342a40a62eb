"""The model's reasons for the decisions of a batch, worked out beside the event loop. Called by the scorer, once a batch that needs it.

One thread for both doors: the kernels hold no lock of Python, so the loop goes on meanwhile. What isn't done in time is left: the decision
then says MODEL_SCORE_HIGH, which is true as well. The thread is given rows of its own and nobody reads what it leaves behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gateway.contracts.reasons import Reason
from gateway.explanations.explain import with_model_codes
from gateway.metrics import Metrics
from gateway.models.model import Model
from gateway.scoring.job import Job

# Approvals of a batch that are explained because their callers asked for it; the others' answers come without.
ASKED_ROWS_MAX = 16

Matrix = npt.NDArray[np.float32]


class Explains(Protocol):
    """gateway.explanations.explain.Explainer."""

    # Rows that may be explained between two looks at the clock.
    rows_at_once: int

    def codes(self, matrix: Matrix) -> list[list[Reason]]:
        """The codes of each row."""


class Reasoner:
    """`clock_s` is the monotonic clock that deadlines are on."""

    def __init__(self, metrics: Metrics, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock_s = clock_s
        self._thread = ThreadPoolExecutor(1, "reasons")

    async def give(
        self,
        reasons: list[list[Reason]],
        jobs: Sequence[Job],
        models: Sequence[Model | None],
        model: npt.NDArray[np.int64],
        matrix: Matrix,
        until_s: float,
    ) -> None:
        """Puts the models' codes into `reasons`, by row, where a score is one of them and where a caller asked for them.

        Row i is of `jobs[i]`, was scored by `models[model[i]]` and has the features `matrix[i]`. Doesn't wait when there is nothing to
        explain, as in most batches.
        """
        rows = [i for i, of_row in enumerate(reasons) if of_row and Reason.MODEL_SCORE_HIGH in of_row]
        asked = [i for i, job in enumerate(jobs) if job.explain]
        if asked:
            rows += [i for i in asked if i not in rows][:ASKED_ROWS_MAX]
        if not rows:
            return
        by_model = model[rows]
        for place, scored_by in enumerate(models):
            of_model = [row for row, m in zip(rows, by_model.tolist(), strict=True) if m == place]
            if of_model and scored_by is not None:
                found = await self.codes(scored_by.explainer, matrix[of_model], until_s)
                for row, codes in zip(of_model, found, strict=True):
                    reasons[row] = with_model_codes(reasons[row], codes)

    async def codes(self, explainer: Explains | None, matrix: Matrix, until_s: float) -> list[list[Reason]]:
        """The model's codes for each row of `matrix` (n, features), by `until_s` of the clock.

        Empty for rows that weren't done by then, and for all without an explainer; both are counted. Never raises.
        """
        rows, count = len(matrix), self._metrics.reasons
        if explainer is None:
            count.labels("unexplained").inc(rows)
            return [[]] * rows
        started_s = self._clock_s()
        found: list[list[Reason]] = []
        if until_s > started_s:
            # A copy, so that whatever becomes of the batch meanwhile, the thread looks at its own rows.
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._explain, explainer, matrix.copy(), until_s)
            done, _ = await asyncio.wait([work], timeout=until_s - started_s)
            if done:
                found = work.result()
            self._metrics.step_s.observe("reasons", [self._clock_s() - started_s])
        if found:
            count.labels("model").inc(len(found))
        if len(found) < rows:
            count.labels("late").inc(rows - len(found))
        return found + [[]] * (rows - len(found))

    def _explain(self, explainer: Explains, matrix: Matrix, until_s: float) -> list[list[Reason]]:
        """In the thread: the codes of the first rows, as many as there is time for."""
        found: list[list[Reason]] = []
        step = explainer.rows_at_once
        for at in range(0, len(matrix), step):
            if self._clock_s() >= until_s:
                break
            found += explainer.codes(matrix[at : at + step])
        return found

    def stop(self) -> None:
        """Ends the thread once it is done with what it has."""
        self._thread.shutdown(wait=False, cancel_futures=True)
