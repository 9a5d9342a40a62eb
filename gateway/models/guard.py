"""The blast-radius guard: takes a challenger out that declines, or scores, too unlike the champion.

While a challenger shares live traffic, every payment is also scored by the other of the two after its answer (gateway/models/slack.py), so
the guard sees pairs: what either would have decided, by the same policy on the same features. Which card went where is a hash's choice and
has no part in it; a pair needs no second payment to be compared with, so a thousand payments tell as much as many thousands of two separate
groups. A card counts once a day for each thing that is looked at: its payments are not independent of each other.

The counts are shared with other processes and gateways through Redis as they come; without Redis each goes by its own. The tests
(contracts.sequential) hold at any time, and their false alarms add up to at most ALPHA over the whole life of a challenger.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.audit import append_audit
from gateway.contracts.decision import SEVERITY, Outcome, Route
from gateway.contracts.routing import (
    GUARD_PAIRS_KEY,
    RoutingError,
    Verdict,
    guard_cards_key,
    guard_counts_key,
    salt_of,
    take_out,
)
from gateway.contracts.sequential import log_mean, paired_excess
from gateway.kernels.intake import CARD
from gateway.kernels.points import points
from gateway.metrics import Metrics
from gateway.models.model import Live, Model, ModelSlot
from gateway.redis.link import RedisReplyError, RedisUnavailableError
from gateway.scoring.requests import Requests

log = logging.getLogger(__name__)

# Scores from which on is compared how many payments either puts there, beside the declines.
CUTS = (30, 100, 300, 600)
THINGS = 1 + len(CUTS)
# What a challenger may do before it counts as too unlike: decline a tenth more than the champion, or half as often; put half as many
# again, or two thirds of them, at or above a cut, twice or half at the lowest; decline half as many again at one merchant.
DECLINES_RATIO, FEWER_RATIO, MERCHANT_RATIO = 1.1, 2.0, 1.5
SCORES_RATIOS = np.array([2.0, 1.5, 1.5, 1.5])
assert len(SCORES_RATIOS) == len(CUTS)
# False alarms over the life of a challenger that keeps within these, at most, by test.
ALPHAS = {"declines": 0.006, "scores": 0.002, "merchant": 0.001}
ALPHA = sum(ALPHAS.values())
assert ALPHA < 0.01
MORE_WEIGHT = 0.75
# Merchants are looked at one by one, the first so many of which either model declined a payment; each bears its part of the test's alpha.
MERCHANTS_MAX = 256
# Cards counted in a day, by thing together; those beyond are not.
CARDS_MAX = 200_000
# Sightings that wait for Redis, the oldest are given up; and how many go in one call.
SIGHTINGS_MAX, CALL_MAX = 20_000, 1000
CALL_TIMEOUT_S = 0.5
# At 2,000 payments a second a challenger must not get 2,000 more while nobody looks.
TICK_S = 0.25
# Counts are kept over the life of a challenger, the cards of a day a little longer than that.
KEEP_S, KEEP_CARDS_S = 30 * 86_400, 2 * 86_400
DAY_MS = 86_400_000
DECLINE = SEVERITY[Outcome.DECLINE]
BOTH, CHALLENGER_ONLY, CHAMPION_ONLY = range(3)
OUT_FIELD = "out"
_SALT = np.uint64(salt_of("guard", "1"))
_SCRIPT = files("gateway.contracts").joinpath("lua/sightings.lua").read_text()

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
# Asks Redis: a key of the command, which says where it goes, and the command. Raises RedisUnavailableError or RedisReplyError.
Ask = Callable[[str, Sequence[Any], float], Any]


class Sighting(msgspec.Struct, frozen=True):
    """One card of which one of the two models, or both, did one of the things: `how` is BOTH, CHALLENGER_ONLY or CHAMPION_ONLY."""

    thing: int
    how: int
    card: int
    day: int
    merchant: str = ""


@dataclass(slots=True)
class Alarm:
    test: str
    detail: str


class Evidence:
    """Counts of pairs and what they prove. `counts` (things, how)."""

    def __init__(self) -> None:
        self.counts = np.zeros((THINGS, 3), np.int64)
        self.merchants: dict[str, Int64s] = {}

    def add(self, thing: int, how: int, n: int = 1) -> None:
        self.counts[thing, how] += n

    def add_merchant(self, merchant: str, how: int, n: int = 1) -> None:
        """A merchant that is one too many isn't looked at by itself."""
        found = self.merchants.get(merchant)
        if found is None:
            if len(self.merchants) >= MERCHANTS_MAX:
                return
            found = self.merchants[merchant] = np.zeros(3, np.int64)
        found[how] += n

    def logs(self) -> dict[str, float]:
        """By test, the logarithm of its evidence times its alpha: 0 and above is an alarm."""
        both, more, fewer = self.counts.T
        declines = log_mean(
            [
                float(paired_excess(both[0], more[0], fewer[0], DECLINES_RATIO)),
                float(paired_excess(both[0], fewer[0], more[0], FEWER_RATIO)),
            ],
            [MORE_WEIGHT, 1 - MORE_WEIGHT],
        )
        scores = log_mean(
            np.concatenate(
                [
                    paired_excess(both[1:], more[1:], fewer[1:], SCORES_RATIOS),
                    paired_excess(both[1:], fewer[1:], more[1:], SCORES_RATIOS),
                ]
            )
        )
        found = {"declines": declines, "scores": scores, "merchant": 0.0}
        if self.merchants:
            # Those that aren't there yet have shown nothing: their evidence is 1.
            each = np.concatenate([self._by_merchant(), [0.0]])
            weights = np.full(len(each), 1 / MERCHANTS_MAX)
            weights[-1] = 1 - len(self.merchants) / MERCHANTS_MAX
            found["merchant"] = log_mean(each, weights)
        return {test: value + math.log(ALPHAS[test]) for test, value in found.items()}

    def _by_merchant(self) -> npt.NDArray[np.float64]:
        both, more, fewer = np.array(list(self.merchants.values())).T
        return paired_excess(both, more, fewer, MERCHANT_RATIO)

    def alarm(self) -> Alarm | None:
        """The first test that has proved its case."""
        for test, value in self.logs().items():
            if value >= 0:
                return Alarm(test, self._detail(test))
        return None

    def _detail(self, test: str) -> str:
        def told(counts: Int64s) -> str:
            both, more, fewer = counts.tolist()
            return f"the challenger {both + more} cards, the champion {both + fewer} of the same, both {both}"

        if test == "scores":
            return "; ".join(f"score {cut} and more: {told(c)}" for cut, c in zip(CUTS, self.counts[1:], strict=True))
        if test == "merchant":
            worst = list(self.merchants)[int(np.argmax(self._by_merchant()))]
            return f"declined at merchant {worst}: {told(self.merchants[worst])}"
        return f"declined: {told(self.counts[0])}"


def evidence_of(counts: dict[str, int]) -> Evidence:
    """From the fields that are kept in Redis: thing:how, and m:how:merchant."""
    evidence = Evidence()
    for name, n in counts.items():
        kind, how, *merchant = name.split(":", 2)
        if kind == "m":
            evidence.add_merchant(merchant[0], int(how), n)
        else:
            evidence.add(int(kind), int(how), n)
    return evidence


@dataclass(slots=True)
class Pair:
    """What was seen of one champion and one challenger. `seen` are the cards of `day`, by thing."""

    key: str
    challenger: Model
    day: int = -1
    seen: set[tuple[int, int]] = field(default_factory=set)
    # Not in Redis yet, and what all have seen as far as Redis told.
    waiting: deque[Sighting] = field(default_factory=lambda: deque(maxlen=SIGHTINGS_MAX))
    known: dict[str, int] = field(default_factory=dict)
    was_out: bool = False
    listed: bool = False

    def evidence(self) -> Evidence:
        """Of everybody, as far as known."""
        evidence = evidence_of(self.known)
        for s in list(self.waiting):
            evidence.add(s.thing, s.how)
            if s.merchant:
                evidence.add_merchant(s.merchant, s.how)
        return evidence


class Guard:
    """`sighted` is called by the thread of the slack, everything else on the event loop. `alert` publishes an alarm. `ask` is None where
    there is no Redis to share counts through. `now_ms` is the wall clock.
    """

    def __init__(
        self,
        slot: ModelSlot,
        model_dir: Path,
        metrics: Metrics,
        *,
        alert: Callable[[Verdict], None] = lambda _: None,
        ask: Ask | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._slot = slot
        self._dir = model_dir
        self._metrics = metrics
        self._alert = alert
        self._ask = ask
        self._now_ms = now_ms
        self._pair: Pair | None = None
        # A verdict that could not be written down yet.
        self._unwritten: Verdict | None = None

    def sighted(
        self,
        live: Live,
        requests: Requests,
        rows: Int64s,
        challenger: tuple[Int64s, npt.NDArray[np.float64]],
        champion: tuple[Int64s, npt.NDArray[np.float64]],
    ) -> None:
        """What either model came to for `rows`: places in SEVERITY and scores, (rows,) each."""
        assert live.champion is not None
        assert live.challenger is not None
        pair = self._pair_of(live.champion, live.challenger)
        day = self._now_ms() // DAY_MS
        if day != pair.day:
            pair.day = day
            pair.seen.clear()
        self._metrics.guard_pairs.inc(len(rows))
        cuts = np.array(CUTS, np.float64)
        theirs, ours = (
            np.column_stack([severity == DECLINE, score[:, None] >= cuts]) for severity, score in (challenger, champion)
        )
        either = theirs | ours
        places = np.flatnonzero(either.any(axis=1))
        if not len(places):
            return
        point = np.empty(len(places))
        points(requests.buf, requests.starts, requests.lengths, rows[places], CARD, _SALT, point)
        cards = (point * 2.0**53).astype(np.int64).tolist()
        merchants = requests.texts("merchant_id", rows[places])
        for card, merchant, did, they_did, we_did in zip(
            cards, merchants, either[places].tolist(), theirs[places].tolist(), ours[places].tolist(), strict=True
        ):
            for thing in range(THINGS):
                if not did[thing] or (thing, card) in pair.seen or len(pair.seen) >= CARDS_MAX:
                    continue
                pair.seen.add((thing, card))
                how = CHAMPION_ONLY if not they_did[thing] else BOTH if we_did[thing] else CHALLENGER_ONLY
                pair.waiting.append(Sighting(thing, how, card, day, merchant or "" if thing == 0 else ""))

    def _pair_of(self, champion: Model, challenger: Model) -> Pair:
        # Not by policy: each payment was decided twice under the same one, whichever it was, and a policy may change many times a day.
        text = f"{champion.digest}:{challenger.digest}"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self._pair is None or self._pair.key != key:
            self._pair = Pair(key, challenger)
        return self._pair

    async def run(self) -> None:
        """Shares, judges and acts every TICK_S, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            await self.tick()

    async def tick(self) -> None:
        """What is done each time."""
        live = self._slot.live
        self._metrics.challenger_share.set(live.share)
        is_out = live.standby is not None and self._slot.is_out(live.standby.digest)
        self._metrics.guard_out.set(is_out)
        if self._unwritten is not None:
            await asyncio.to_thread(self._write_down, self._unwritten)
        broken, self._slot.broken = self._slot.broken, None
        if broken is not None:
            await self._act(self._verdict(broken, Alarm("failed", "it raised, or gave what is no number")), None)
        pair = self._pair
        if pair is None:
            return
        if self._slot.is_out(pair.challenger.digest):
            pair.was_out = True
            return
        if pair.was_out:
            # It was let back in: what was seen before is settled.
            self._pair = None
            return
        out = await self._share(pair)
        evidence = pair.evidence()
        for test, value in evidence.logs().items():
            self._metrics.guard_evidence.labels(test).set(max(0.0, 1 + value / -math.log(ALPHAS[test])))
        if out is not None:
            await self._act(out, pair, others=True)
            return
        alarm = evidence.alarm()
        if alarm is not None:
            await self._act(self._verdict(pair.challenger, alarm), pair)

    def _verdict(self, challenger: Model, alarm: Alarm) -> Verdict:
        ref = challenger.ref
        return Verdict(
            name=ref.name,
            version=ref.version,
            digest=challenger.digest,
            test=alarm.test,
            detail=alarm.detail,
            at_ms=self._now_ms(),
        )

    async def _act(self, verdict: Verdict, pair: Pair | None, *, others: bool = False) -> None:
        """Take the challenger out, here at once; then say so to whoever is to know, unless another gateway does."""
        self._slot.take_out(verdict.digest)
        if pair is not None:
            pair.was_out = True
        self._metrics.guard_out.set(1)
        log.error("guard: challenger %s %s is out (%s): %s", verdict.name, verdict.version, verdict.test, verdict.detail)
        first = await asyncio.to_thread(self._write_down, verdict)
        if others or not first:
            return
        if self._ask is not None and pair is not None:
            try:
                counts = guard_counts_key(pair.key)
                text = msgspec.json.encode(verdict)
                if await self._ask(counts, ("HSETNX", counts, OUT_FIELD, text), CALL_TIMEOUT_S) == 0:
                    return
            except (RedisUnavailableError, RedisReplyError):
                log.warning("guard: other gateways come to their own verdict: Redis can't be told")
        self._metrics.guard_alarms.labels(verdict.test).inc()
        self._alert(verdict)

    def _write_down(self, verdict: Verdict) -> bool:
        """Keep the verdict over restarts; True when nobody had before. Tried again later when that fails."""
        try:
            first = take_out(self._dir, verdict)
            self._unwritten = None
            if first:
                append_audit(
                    self._dir,
                    action="guard",
                    subject=Route.CHALLENGER.value,
                    before=verdict.version,
                    after=None,
                    reason=f"{verdict.test}: {verdict.detail}",
                )
        except (OSError, RoutingError) as exc:
            if self._unwritten is None:
                log.error("guard: the verdict can't be written down, a restart would let the challenger in: %s", exc)  # noqa: TRY400
            again = self._unwritten is not None
            self._unwritten = verdict
            return not again
        return first

    async def _share(self, pair: Pair) -> Verdict | None:
        """Add what this process saw to what all saw, and learn that; the verdict of another gateway, if there is one."""
        if self._ask is None:
            return None
        cards, counts = guard_cards_key(pair.key, self._now_ms() // DAY_MS), guard_counts_key(pair.key)
        fields: dict[str, bytes] = {}
        for _ in range(SIGHTINGS_MAX // CALL_MAX):
            some = [pair.waiting[i] for i in range(min(CALL_MAX, len(pair.waiting)))]
            arguments: list[str] = []
            for s in some:
                arguments += [f"{s.thing}:{s.card}", f"{s.thing}:{s.how}", str(s.how), s.merchant]
            limits = (str(CARDS_MAX), str(MERCHANTS_MAX), str(KEEP_CARDS_S), str(KEEP_S))
            command = ("EVAL", _SCRIPT, "2", cards, counts, *limits, *arguments)
            try:
                if not pair.listed:
                    await self._ask(GUARD_PAIRS_KEY, ("SADD", GUARD_PAIRS_KEY, pair.key), CALL_TIMEOUT_S)
                    pair.listed = True
                reply = await self._ask(counts, command, CALL_TIMEOUT_S)
            except (RedisUnavailableError, RedisReplyError):
                return None
            for s in some:
                # The deque may have dropped its oldest meanwhile.
                if pair.waiting and pair.waiting[0] is s:
                    pair.waiting.popleft()
            fields = {bytes(k).decode(): v for k, v in zip(reply[::2], reply[1::2], strict=True)}
            if len(some) < CALL_MAX:
                break
        out = fields.pop(OUT_FIELD, None)
        fields.pop("merchants", None)
        pair.known = {name: int(n) for name, n in fields.items()}
        return None if out is None else msgspec.json.decode(out, type=Verdict)
