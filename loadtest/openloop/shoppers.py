"""Payments of a soak test, made while they are sent: from a number follows the payment, in a population of closed communities.

Cards, customers, merchants, devices and addresses of one community never meet those of another, so that everything the features of a
community's payments rest on is known from that community alone: a check of one in COMMUNITIES payments is exact. About 5 us a payment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COMMUNITIES = 16
CARDS, MERCHANTS = 100_000, 20_000
ONLINE_SHARE = 0.5
SIGMA = 1.2
COUNTRIES = ("DE", "FR", "IT", "ES")
MCCS = ("5411", "5812", "5541", "5999", "4111", "5732")
# While clocks are wrong, every SKEWED_EVERYth payment is off by one of these.
SKEWED_EVERY = 5
SKEWS_MS = (-1_200_000, 300_000, -90_000, -7_200_000)
_HEAD = '{"transaction_id":"%s-%d","event_time_ms":%d,"card_id":"%s","customer_id":"cus_%02d_%06d","merchant_id":"mer_%02d_%06d",'
_PAID = '"amount_minor":%d,"currency":"EUR","channel":"%s","mcc":"%s","country":"%s","card_bin":"400000","card_country":"%s"'
_ONLINE = ',"device_id":"dev_%02d_%06d","ip":"2001:db8:%x::%x"'


def card_prefix(community: int) -> str:
    """How the ids of a community's cards begin, and no others."""
    return f"tok_{community:02d}_"


@dataclass(frozen=True)
class Span:
    """Seconds of the schedule, from `begin_s` to before `end_s`."""

    begin_s: float
    end_s: float

    def __contains__(self, at_s: float) -> bool:
        return self.begin_s <= at_s < self.end_s


class Shoppers:
    """Payment i is due i / `rate_per_s` seconds after `start_ms` and named RUN-i. `skewed`: when some clocks are wrong."""

    def __init__(self, run: str, seed: int, rate_per_s: float, start_ms: int, skewed: Sequence[Span] = ()) -> None:
        self._run, self._seed, self._rate_per_s, self._start_ms = run, seed, rate_per_s, start_ms
        self._skewed = skewed
        self._cards, self._merchants = CARDS // COMMUNITIES, MERCHANTS // COMMUNITIES
        weight = np.random.default_rng(seed).lognormal(0.0, SIGMA, self._cards)
        self._share = np.cumsum(weight) / weight.sum()

    def block(self, first: int, count: int) -> list[tuple[str, bytes]]:
        """(card, body) of the payments from `first` on. The same arguments give the same payments."""
        rng = np.random.default_rng((self._seed, first))
        community = rng.integers(0, COMMUNITIES, count)
        card = np.minimum(np.searchsorted(self._share, rng.random(count)), self._cards - 1)
        # Mostly at one of its five favourites, else anywhere by a power law.
        favourite = (card * 7919 + rng.integers(0, 5, count) * 104_729) % self._merchants
        merchant = np.where(rng.random(count) < 0.6, favourite, (self._merchants * rng.random(count) ** 3).astype(np.int64))
        online = rng.random(count) < ONLINE_SHARE
        device = np.where(rng.random(count) < 0.95, card, rng.integers(0, self._cards, count))
        ip = np.where(rng.random(count) < 0.7, card // 2, rng.integers(0, self._cards, count))
        amount = np.clip(rng.lognormal(8, 1.2, count), 1, 10_000_000).astype(np.int64)
        abroad = rng.random(count) < 0.05
        made = []
        columns = zip(*(a.tolist() for a in (community, card, merchant, online, device, ip, amount, abroad)), strict=True)
        for i, (g, c, m, is_online, d, a, minor, is_abroad) in enumerate(columns, first):
            token = f"tok_{g:02d}_{c:06d}"
            text = _HEAD % (self._run, i, self.event_time_ms(i), token, g, c * 4 // 5, g, m)
            home = c % len(COUNTRIES)
            country = COUNTRIES[(home + is_abroad) % len(COUNTRIES)]
            text += _PAID % (minor, "ecom" if is_online else "pos", MCCS[m % len(MCCS)], country, COUNTRIES[home])
            if is_online:
                text += _ONLINE % (g, d, g, a)
            made.append((token, f"{text}}}".encode()))
        return made

    def event_time_ms(self, i: int) -> int:
        """What the till's clock says when payment i is due."""
        at_s = i / self._rate_per_s
        skew_ms = 0
        if i % SKEWED_EVERY == 0 and any(at_s in span for span in self._skewed):
            skew_ms = SKEWS_MS[i // SKEWED_EVERY % len(SKEWS_MS)]
        return self._start_ms + int(at_s * 1000) + skew_ms
