"""Fraud patterns. Each is a small frozen class: its name, its parameters, and `start`, which plans one incident.

An incident's payments lie at or after the time it starts, so that the stream can put them in order with what comes later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loadtest.simulator.config import HOUR_MS
from loadtest.simulator.genuine import Row, Slice, fraud_row
from loadtest.simulator.world import STRANGER_START, Ints, World, device_id, ip_address

MINUTE_MS = 60_000
STRANGERS = 0x100000
# How much further than the nearest other city an account is taken over from, degrees of latitude plus longitude.
FAR_AWAY_DEGREES = 12.0


@dataclass(frozen=True)
class Incident:
    """One occurrence of a pattern: the ids it touched and its payments in event-time order."""

    pattern: str
    started_ms: int
    cards: tuple[str, ...]
    merchants: tuple[str, ...]
    devices: tuple[str, ...]
    ips: tuple[str, ...]
    rows: tuple[Row, ...]


class Pattern(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def events_mean(self) -> float:
        """The expected number of payments in an incident."""
        ...

    def start(self, world: World, rng: np.random.Generator, at_ms: int, recent: Slice) -> Incident | None:
        """An incident that begins at `at_ms`; `recent` is the genuine traffic before it. None when it finds no victim."""
        ...


def _incident(pattern: str, at_ms: int, rows: list[Row]) -> Incident:
    rows.sort(key=lambda r: r[0])
    assert not rows or rows[0][0] >= at_ms

    def ids(column: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(r[column]) for r in rows if r[column] is not None))

    return Incident(pattern, at_ms, ids(1), ids(3), ids(9), ids(10), tuple(rows))


def _stranger(rng: np.random.Generator) -> int:
    return STRANGER_START + int(rng.integers(0, STRANGERS))


def _site(world: World, rng: np.random.Generator) -> int:
    return int(world.sites[int(rng.integers(0, len(world.sites)))])


def _usual(world: World, rng: np.random.Generator, card: int, merchant: int, times: float, spread: float) -> float:
    """`times` the card holder's usual amount at a merchant's trade, in its currency."""
    customer, country = int(world.card_customer[card]), int(world.merchant_country[merchant])
    usual = float(np.exp(world.customer_log_amount[customer])) * float(world.merchant_factor[merchant])
    return usual * float(world.country_rate[country]) * times * float(np.exp(rng.normal(0.0, spread)))


def _misuse(
    world: World,
    rng: np.random.Generator,
    pattern: str,
    at_ms: int,
    card: int,
    site: int,
    times: float,
    spread: float,
    stranger: int,
    place: tuple[float, float] | None = None,
) -> Row:
    """One payment by a stranger, from their device and address, of `times` what the holder usually pays at such a site."""
    amount = _usual(world, rng, card, site, times, spread)
    return fraud_row(world, pattern, at_ms, card, site, amount, device=device_id(stranger, 0), ip=ip_address(stranger), place=place)


def _offsets(rng: np.random.Generator, count: int, duration_ms: int) -> list[int]:
    out: list[int] = np.sort(rng.integers(0, max(1, duration_ms), count)).tolist()
    return out


@dataclass(frozen=True)
class CardTesting:
    """Stolen numbers are tried out: tiny amounts on many cards within minutes, from one device and address, at one site."""

    name: str = "card_testing"
    cards_min: int = 15
    cards_max: int = 45
    duration_min_ms: int = 4 * MINUTE_MS
    duration_max_ms: int = 25 * MINUTE_MS
    amount_min_minor: int = 30
    amount_max_minor: int = 250

    @property
    def events_mean(self) -> float:
        return (self.cards_min + self.cards_max) / 2

    def start(self, world: World, rng: np.random.Generator, at_ms: int, recent: Slice) -> Incident | None:
        count = int(rng.integers(self.cards_min, self.cards_max + 1))
        cards: list[int] = rng.choice(len(world.card_ids), count, replace=False).tolist()
        stranger, site = _stranger(rng), _site(world, rng)
        duration = int(rng.integers(self.duration_min_ms, self.duration_max_ms))
        rate = float(world.country_rate[int(world.merchant_country[site])])
        rows = [
            fraud_row(
                world,
                self.name,
                at_ms + offset,
                card,
                site,
                float(rng.integers(self.amount_min_minor, self.amount_max_minor)) * rate,
                device=device_id(stranger, 0),
                ip=ip_address(stranger),
            )
            for card, offset in zip(cards, _offsets(rng, count, duration), strict=True)
        ]
        return _incident(self.name, at_ms, rows)


@dataclass(frozen=True)
class CompromisedMerchant:
    """A till was skimmed: cards lately seen at one merchant are misused elsewhere over the next days, each from a new device."""

    name: str = "compromised_merchant"
    cards_max: int = 15
    uses_min: int = 1
    uses_max: int = 3
    delay_min_ms: int = HOUR_MS
    delay_max_ms: int = 30 * HOUR_MS
    amount_times: float = 3.0

    @property
    def events_mean(self) -> float:
        return self.cards_max * 0.6 * (self.uses_min + self.uses_max) / 2

    def start(self, world: World, rng: np.random.Generator, at_ms: int, recent: Slice) -> Incident | None:
        if len(recent.merchant) == 0:
            return None
        # Any lately busy till: that of a random payment, so the popular ones are hit more often.
        for _ in range(8):
            merchant = int(recent.merchant[int(rng.integers(0, len(recent.merchant)))])
            seen: Ints = np.unique(recent.card[recent.merchant == merchant])
            if len(seen) >= 4:
                break
        else:
            return None
        victims: list[int] = rng.permutation(seen)[: self.cards_max].tolist()
        rows = []
        for card in victims:
            stranger = _stranger(rng)
            first = int(rng.integers(self.delay_min_ms, self.delay_max_ms))
            for offset in _offsets(rng, int(rng.integers(self.uses_min, self.uses_max + 1)), 2 * HOUR_MS):
                site = _site(world, rng)
                at = at_ms + first + offset
                rows.append(_misuse(world, rng, self.name, at, card, site, self.amount_times, 0.4, stranger))
        return _incident(self.name, at_ms, rows)


@dataclass(frozen=True)
class AccountTakeover:
    """Soon after the holder paid at home the account is used from a new device, too far away to have travelled."""

    name: str = "account_takeover"
    uses_min: int = 2
    uses_max: int = 6
    delay_max_ms: int = 30 * MINUTE_MS
    duration_ms: int = 90 * MINUTE_MS
    amount_times: float = 4.0

    @property
    def events_mean(self) -> float:
        return (self.uses_min + self.uses_max) / 2

    def start(self, world: World, rng: np.random.Generator, at_ms: int, recent: Slice) -> Incident | None:
        lately = np.flatnonzero(recent.time_ms >= at_ms - HOUR_MS)
        if len(lately) == 0:
            return None
        victim = int(lately[int(rng.integers(0, len(lately)))])
        card, home = int(recent.card[victim]), int(recent.city[victim])
        distance = np.abs(world.city_latitude - world.city_latitude[home])
        distance = distance + np.abs(world.city_longitude - world.city_longitude[home])
        far: list[int] = np.flatnonzero(distance > FAR_AWAY_DEGREES).tolist()
        city = far[int(rng.integers(0, len(far)))]
        place = (round(float(world.city_latitude[city]), 1), round(float(world.city_longitude[city]), 1))
        stranger = _stranger(rng)
        delay = int(rng.integers(0, self.delay_max_ms))
        rows = []
        for offset in _offsets(rng, int(rng.integers(self.uses_min, self.uses_max + 1)), self.duration_ms):
            site = _site(world, rng)
            at = at_ms + delay + offset
            rows.append(_misuse(world, rng, self.name, at, card, site, self.amount_times, 0.5, stranger, place))
        return _incident(self.name, at_ms, rows)


@dataclass(frozen=True)
class AmountInflation:
    """Someone pays like the card holder, at the usual sites and from a cloned device, but five times as much."""

    name: str = "amount_inflation"
    uses_min: int = 3
    uses_max: int = 8
    duration_ms: int = 30 * HOUR_MS
    amount_times: float = 5.0

    @property
    def events_mean(self) -> float:
        return (self.uses_min + self.uses_max) / 2

    def start(self, world: World, rng: np.random.Generator, at_ms: int, recent: Slice) -> Incident | None:
        card = int(rng.integers(0, len(world.card_ids)))
        customer = int(world.card_customer[card])
        usual: list[int] = world.customer_sites[customer].tolist()
        place = (round(float(world.customer_latitude[customer]), 1), round(float(world.customer_longitude[customer]), 1))
        rows = []
        for offset in _offsets(rng, int(rng.integers(self.uses_min, self.uses_max + 1)), self.duration_ms):
            site = usual[int(rng.integers(0, len(usual)))]
            rows.append(
                fraud_row(
                    world,
                    self.name,
                    at_ms + offset,
                    card,
                    site,
                    _usual(world, rng, card, site, self.amount_times, 0.3),
                    device=device_id(customer, 0),
                    ip=ip_address(int(world.customer_household[customer])),
                    place=place,
                )
            )
        return _incident(self.name, at_ms, rows)


@dataclass(frozen=True)
class BinAttack:
    """Numbers of one issuer are enumerated at one merchant: many cards of one BIN within an hour, from changing addresses."""

    name: str = "bin_attack"
    cards_min: int = 25
    cards_max: int = 60
    duration_min_ms: int = 20 * MINUTE_MS
    duration_max_ms: int = 60 * MINUTE_MS
    cards_per_address: int = 6
    amount_times: float = 0.8

    @property
    def events_mean(self) -> float:
        return (self.cards_min + self.cards_max) / 2

    def start(self, world: World, rng: np.random.Generator, at_ms: int, recent: Slice) -> Incident | None:
        card_bin = world.card_bins[int(rng.integers(0, len(world.card_bins)))]
        of_bin = [i for i, b in enumerate(world.card_bins) if b == card_bin]
        count = min(len(of_bin), int(rng.integers(self.cards_min, self.cards_max + 1)))
        cards: list[int] = rng.permutation(np.array(of_bin))[:count].tolist()
        site = _site(world, rng)
        duration = int(rng.integers(self.duration_min_ms, self.duration_max_ms))
        strangers = [_stranger(rng) for _ in range(count // self.cards_per_address + 1)]
        rows = []
        for i, (card, offset) in enumerate(zip(cards, _offsets(rng, count, duration), strict=True)):
            stranger = strangers[i // self.cards_per_address]
            rows.append(_misuse(world, rng, self.name, at_ms + offset, card, site, self.amount_times, 0.4, stranger))
        return _incident(self.name, at_ms, rows)


PATTERNS: tuple[Pattern, ...] = (CardTesting(), CompromisedMerchant(), AccountTakeover(), AmountInflation(), BinAttack())
