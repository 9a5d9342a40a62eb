"""The scorer that both doors share: a batch of transactions in, a result for each out, with one await on Redis in between.

`Scorer.decide` is the whole path: guard, one await, a pure tail. `Batcher` forms micro-batches for callers that come one by one:
while a batch is in flight the next one collects, and nothing waits when the gateway is idle.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from gateway.console.tap import Tap
from gateway.contracts.decision import Door, Route
from gateway.contracts.layout import CLAIM_ALONE_MS, CLAIM_BYTES, CLAIM_DEAD_MS, CLAIM_FREE_MS, CLAIM_PATIENCE_MS, FINGERPRINT_BYTES
from gateway.explanations.reasons import Reasoner
from gateway.kernels.intake import CARD
from gateway.kernels.points import points
from gateway.metrics import Metrics
from gateway.models.explore import Explorer
from gateway.models.model import ORT_ERRORS, Live, ModelSlot
from gateway.models.slack import Scored as ScoredBatch
from gateway.models.slack import Slack
from gateway.policy.slot import PolicySlot
from gateway.redis.store import Observation, Store, request_only_matrix
from gateway.redis.unobserved import Unobserved
from gateway.scoring.job import Job, Result, Verdict, claimed_ago_ms, requests_of
from gateway.scoring.judged import Judged, Scored, Timing, Written, first_of_all, judge, write
from gateway.scoring.recent import RecentDecisions
from gateway.scoring.requests import Requests
from gateway.tracing.tracer import Tracer

log = logging.getLogger(__name__)

# What is left of the budget must hold the model, the policy and the reply.
TAIL_BUDGET_MS = 10
# Who waits for another process must have so long for Redis after that.
PATIENT_REDIS_MS = 15
MODEL_BUDGET_MS = 5
assert MODEL_BUDGET_MS < TAIL_BUDGET_MS
# Nobody waits at the Kafka door, so it gives Redis more time before it goes on without.
STREAM_FEATURE_BUDGET_MS = 500
# For the model's reasons, of what the deadline leaves beside the reply. At the Kafka door a chunk waits longer before it goes on without.
REASONS_BUDGET_MS = 20
STREAM_REASONS_BUDGET_MS = 200
REPLY_BUDGET_MS = 3
assert MODEL_BUDGET_MS + REPLY_BUDGET_MS < TAIL_BUDGET_MS


def _free_in_ms(claimed_ago_ms: int) -> int:
    """How long a claim is to be left to who made it. By a clock that is ahead of ours nobody waits longer."""
    return min(max(CLAIM_FREE_MS - claimed_ago_ms, 0), CLAIM_FREE_MS)


def _for_others(judged: Judged, probability: npt.NDArray[np.float64]) -> ScoredBatch:
    """What shadows and the guard score after the answers."""
    return ScoredBatch(
        judged.live,
        judged.steering,
        judged.requests,
        judged.rows,
        judged.matrix,
        judged.columns.received_at_ms,
        probability,
        judged.scored.by_challenger,
        judged.decisions.severity,
    )


class Scorer:
    """`now_ms` is the wall clock, `clock_s` the monotonic one. `slack` takes what is to be scored by others after the answer, `tracer`
    chooses what is traced.
    """

    def __init__(
        self,
        store: Store,
        models: ModelSlot,
        policies: PolicySlot,
        metrics: Metrics,
        recent: RecentDecisions,
        unobserved: Unobserved,
        *,
        feature_budget_ms: int,
        code_version: str,
        reasoner: Reasoner | None = None,
        explorer: Explorer | None = None,
        slack: Slack | None = None,
        tracer: Tracer | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._models = models
        self._policies = policies
        self._metrics = metrics
        self._recent = recent
        self._unobserved = unobserved
        self._feature_budget_s = feature_budget_ms / 1000
        self._code_version = code_version
        self._explorer = explorer
        self._routed_champion = metrics.routed.labels(Route.CHAMPION.value)
        self._routed_challenger = metrics.routed.labels(Route.CHALLENGER.value)
        # What the store had counted when it was last told.
        self._counted = (0, 0, 0)
        self._store_counters = (metrics.values_refused, metrics.writes_refused, metrics.records_failed)
        self._slack = slack
        self._tracer = tracer
        self._now_ms = now_ms
        self._clock_s = clock_s
        self._reasoner = Reasoner(metrics, clock_s) if reasoner is None else reasoner
        # transaction_ids that the HTTP door is deciding: the Kafka door leaves them to it.
        self.deciding: set[str] = set()
        # Where the console takes its sample of decisions from.
        self.tap: Tap | None = None

    async def decide(self, jobs: Sequence[Job], requests: Requests | None = None) -> list[Result]:
        """A result for each of `jobs`, in their order. Each job is claimed and counted once; never raises for what Redis does.

        `requests` are the columns of just these jobs, where somebody has read them already.
        """
        started_s = self._clock_s()
        if requests is None:
            requests = requests_of(jobs)
        timeout_s = self._feature_timeout_s(jobs, started_s)
        observation = None
        asked = timeout_s > 0 and self._store.ready
        if asked:
            observation = await self._store.observe(jobs, requests, timeout_s)
        if observation is None:
            self._metrics.redis_timeouts.labels(jobs[0].door.value).inc()
        else:
            self._metrics.redis_round_trip_s.observe(jobs[0].door.value, [observation.round_trip_s])
        timing = Timing(started_s, self._clock_s(), asked)
        results, overtaken = self._settle(jobs, observation)
        taken = {id(job) for job in overtaken}
        rows = [i for i, job in enumerate(jobs) if results[i] is None and id(job) not in taken]
        if rows:
            await self._decide_fresh(jobs, np.array(rows), results, requests, observation, timing)
        if overtaken:
            # Claimed over HTTP by a gateway that is gone or late: decided here as well, and the first answer stands. Kafka can wait for it.
            ages = [claimed_ago_ms(job.held_claim, self._now_ms()) for job in overtaken]
            await asyncio.sleep(max(_free_in_ms(ago_ms or 0) for ago_ms in ages) / 1000)
            again = await self.decide(overtaken)
            by_job = {id(result.job): result for result in again}
            results = [by_job[id(job)] if result is None else result for job, result in zip(jobs, results, strict=True)]
        return [result for result in results if result is not None]

    def _feature_timeout_s(self, jobs: Sequence[Job], now_s: float) -> float:
        """How long to wait for Redis: its budget, or what the most urgent job's deadline leaves beside the tail's."""
        deadlines = [job.deadline_s for job in jobs if job.deadline_s is not None]
        if not deadlines:
            return max(self._feature_budget_s, STREAM_FEATURE_BUDGET_MS / 1000)
        return min(self._feature_budget_s, min(deadlines) - now_s - TAIL_BUDGET_MS / 1000)

    def _settle(self, jobs: Sequence[Job], observation: Observation | None) -> tuple[list[Result | None], list[Job]]:
        """Results of the jobs that an idempotency record settles, None for the others; and those to decide in another's place."""
        results: list[Result | None] = [None] * len(jobs)
        overtaken: list[Job] = []
        claims: dict[str, bytes] = {}
        for i, job in enumerate(jobs):
            before = self._recent.settles(job)
            if before is None and observation is not None:
                before = observation.settled[i]
            if before is None and observation is None:
                # Without Redis nobody else notices that one batch holds a transaction twice.
                first = claims.setdefault(job.transaction_id, job.claim)
                before = None if first == job.claim else first
            if before is None:
                continue
            if before[:FINGERPRINT_BYTES] != job.fingerprint:
                results[i] = Result(job, Verdict.CONFLICT)
                continue
            if len(before) > CLAIM_BYTES:
                results[i] = Result(job, Verdict.DUPLICATE, record=before)
                continue
            ago_ms = claimed_ago_ms(before, self._now_ms())
            if job.door is Door.KAFKA and (ago_ms is None or job.transaction_id in self.deciding):
                # The first record of Kafka is decided, or will be when it is delivered again.
                results[i] = Result(job, Verdict.DUPLICATE)
            elif ago_ms is None:
                results[i] = Result(job, Verdict.IN_PROGRESS)
            elif job.door is Door.HTTP and (free_in_ms := _free_in_ms(ago_ms) or self._patience_ms(job, ago_ms)):
                results[i] = Result(job, Verdict.IN_PROGRESS, free_in_s=free_in_ms / 1000)
            else:
                job.overtakes = before
                overtaken.append(job)
        return results, overtaken

    def _patience_ms(self, job: Job, claimed_ago_ms: int) -> int:
        """How much longer to leave a claim that is free to who made it, which costs less than deciding it as well."""
        if not job.patient or claimed_ago_ms >= CLAIM_DEAD_MS or job.deadline_s is None:
            return 0
        left_ms = (job.deadline_s - self._clock_s()) * 1000
        return CLAIM_PATIENCE_MS if left_ms > CLAIM_PATIENCE_MS + TAIL_BUDGET_MS + PATIENT_REDIS_MS else 0

    async def _decide_fresh(
        self,
        jobs: Sequence[Job],
        rows: npt.NDArray[np.int64],
        results: list[Result | None],
        requests: Requests,
        observation: Observation | None,
        timing: Timing,
    ) -> None:
        """Fill in the results of `rows`, which nothing settled."""
        fresh = [jobs[i] for i in rows.tolist()]
        matrix = request_only_matrix(requests) if observation is None else observation.matrix
        if len(rows) != len(jobs):
            matrix = matrix[rows]
        live = self._models.live
        scored = self._scored(live, matrix, fresh, requests, rows)
        timing.modelled_s = self._clock_s()
        judged = judge(fresh, requests, rows, observation, matrix, live, self._policies.live, scored, self._explorer)
        # A challenger that has just failed is out from now on, whatever happens while the reasons are worked out.
        routed_by = self._models.live.routed_by
        timing.decided_s = timing.explained_s = self._clock_s()
        if scored.probability is not None and observation is not None and observation.written:
            # Only what Redis holds a claim on may wait: nothing else would tell the other door that it is being decided.
            until_s = self._reasons_until_s(fresh, timing.decided_s)
            await self._reasoner.give(judged.reasons, fresh, scored.models, scored.model, matrix, until_s)
            timing.explained_s = self._clock_s()
        written = write(
            judged,
            timing,
            routed_by,
            decided_at_ms=self._now_ms(),
            code_version=self._code_version,
            claim_ttl_ms=self._store.claim_ttl_ms,
        )
        elsewhere = await self._answered_elsewhere(fresh, written.stored.records, observation, timing.started_s)
        if elsewhere is None:
            # At once: between the look at the clock and this, the process should not lose its core.
            self._store.record(list(zip(fresh, written.stored.records, strict=True)), written.stored.commands)
        decided = self._result(judged, written, elsewhere or [None] * len(fresh), results)
        if self._tracer is not None:
            self._tracer.sample(requests, rows, decided, judged.steps(timing))
        if self.tap is not None and self.tap.watching:
            self.tap.offer(results)
        self._count(judged, timing)
        if scored.probability is not None and self._slack is not None and (live.shadows or live.challenger is not None):
            self._slack.add(_for_others(judged, scored.probability))

    def _result(
        self, judged: Judged, written: Written, elsewhere: Sequence[bytes | None], results: list[Result | None]
    ) -> list[Result]:
        """Fill in and return the results of a batch, and remember what was decided. `elsewhere`: the records that stand for ours."""
        decided: list[Result] = []
        records: list[tuple[Job, bytes]] = []
        columns = (judged.rows.tolist(), judged.jobs, elsewhere, written.answers, written.stored.records, written.receipts)
        for i, job, settled, answer, record, receipt, outcome in zip(*columns, judged.outcomes, strict=True):
            if settled is not None:
                result = Result(job, Verdict.DUPLICATE, record=settled)
            else:
                result = Result(job, Verdict.DECIDED, answer=answer, record=record, receipt=receipt, outcome=outcome)
                records.append((job, record))
            results[i] = result
            decided.append(result)
        self._recent.add(records)
        if judged.observation is None or not judged.observation.written:
            for job, record in records:
                self._unobserved.add(job, record)
        return decided

    async def _answered_elsewhere(
        self, jobs: Sequence[Job], records: Sequence[bytes], observation: Observation | None, started_s: float
    ) -> Sequence[bytes | None] | None:
        """Where another gateway may have decided as well, the records that stand for ours, None where ours does: those are stored then.
        None when nobody may have.

        Past CLAIM_FREE_MS a caller that comes again may be decided elsewhere under our claim: it had no answer for so long, or this
        process was halted, by a debugger, a hypervisor or a machine out of memory, and goes on in the middle of a batch.
        """
        until_s = started_s + CLAIM_ALONE_MS / 1000
        if observation is None:
            # Redis is not to be waited for once more by those who still have somebody waiting.
            until_s = max(until_s, min((job.deadline_s for job in jobs if job.deadline_s is not None), default=0.0))
        late = jobs[0].door is Door.HTTP and self._clock_s() > until_s
        if not self._store.ready or not (late or any(job.overtakes is not None for job in jobs)):
            return None
        return await self._store.settle(list(zip(jobs, records, strict=True)), self._feature_budget_s)

    @staticmethod
    def _reasons_until_s(jobs: Sequence[Job], now_s: float) -> float:
        """By when the model's reasons must be there."""
        deadlines = [job.deadline_s for job in jobs if job.deadline_s is not None]
        if not deadlines:
            return now_s + STREAM_REASONS_BUDGET_MS / 1000
        return min(now_s + REASONS_BUDGET_MS / 1000, min(deadlines) - REPLY_BUDGET_MS / 1000)

    def _scored(
        self,
        live: Live,
        matrix: npt.NDArray[np.float32],
        jobs: Sequence[Job],
        requests: Requests,
        rows: npt.NDArray[np.int64],
    ) -> Scored:
        """Probabilities of the models that the cards go to, at most two calls; none when there is no model or no time for it."""
        nobody = first_of_all(len(jobs))
        champion, challenger = live.champion, live.challenger
        if champion is None:
            return Scored(None, [None], nobody)
        deadlines = [job.deadline_s for job in jobs if job.deadline_s is not None]
        if deadlines and min(deadlines) - self._clock_s() < MODEL_BUDGET_MS / 1000:
            return Scored(None, [None], nobody)
        if challenger is None:
            return Scored(champion.probability(matrix), [champion], nobody)
        point = np.empty(len(rows))
        points(requests.buf, requests.starts, requests.lengths, rows, CARD, live.salt, point)
        chosen = point < live.share
        if not chosen.any():
            return Scored(champion.probability(matrix), [champion], nobody, chosen)
        try:
            theirs = challenger.probability(matrix if chosen.all() else matrix[chosen])
        except ORT_ERRORS as exc:
            theirs = np.full(1, np.nan)
            log.error("model: challenger %s failed: %s", challenger.ref.version, exc)  # noqa: TRY400
        if np.isnan(theirs).any():
            # What is no number would be approved. Its cards go to the champion, from now on.
            self._metrics.challenger_failed.inc()
            self._models.failed(challenger)
            return Scored(champion.probability(matrix), [champion], nobody)
        if len(theirs) == len(rows):
            return Scored(theirs, [challenger], nobody, chosen)
        probability = np.empty(len(rows))
        probability[chosen] = theirs
        probability[~chosen] = champion.probability(matrix[~chosen])
        return Scored(probability, [champion, challenger], chosen.astype(np.int64), chosen)

    def _routed(self, scored: Scored, rows: int) -> None:
        challenged = 0 if scored.by_challenger is None else int(scored.by_challenger.sum())
        if challenged:
            self._routed_challenger.inc(challenged)
        self._routed_champion.inc(rows - challenged)

    def _count(self, judged: Judged, timing: Timing) -> None:
        metrics, door, decisions = self._metrics, judged.jobs[0].door.value, judged.decisions
        for outcome, n in Counter(judged.outcomes).items():
            metrics.decisions.labels(outcome.value, door).inc(n)
        for kind, n in Counter(kind for kinds in judged.degraded for kind in kinds).items():
            metrics.degraded.labels(kind).inc(n)
        for hits, counter in (
            (decisions.rule_hits, metrics.rule_hits),
            (decisions.list_hits, metrics.list_hits),
            (decisions.shadow_hits, metrics.shadow_hits),
            (decisions.rule_errors, metrics.rule_errors),
        ):
            if any(hits):
                for hit, n in Counter(hit for of_row in hits for hit in of_row).items():
                    counter.labels(hit).inc(n)
        metrics.batch_rows.observe(door, [len(judged.jobs)])
        metrics.step_s.observe("features", [timing.observed_s - timing.started_s])
        metrics.step_s.observe("model", [timing.modelled_s - timing.observed_s])
        metrics.step_s.observe("policy", [timing.decided_s - timing.modelled_s])
        if judged.scored.probability is not None:
            self._routed(judged.scored, len(judged.jobs))
        store = self._store
        counted = store.refused_values, store.refused_writes, store.failed_records
        if counted != self._counted:
            for counter, now, before in zip(self._store_counters, counted, self._counted, strict=True):
                counter.inc(now - before)
            self._counted = counted
