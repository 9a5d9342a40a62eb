"""Genuine traffic, one slice of simulated time at a time, vectorised: who pays, where, how much, from which device.

A slice is a function of the seed and its number alone, so a simulation can be generated in any pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.transaction import AMOUNT_MINOR_MAX
from loadtest.simulator.config import DAY_MS, HOUR_MS, SimulatorConfig
from loadtest.simulator.world import (
    CASH_MCC,
    COUNTRIES,
    FAVOURITES,
    RHYTHM,
    STRANGER_START,
    Floats,
    Ints,
    World,
    device_id,
    ip_address,
)

# event_time_ms, card_id, customer_id, merchant_id, amount_minor, currency, channel, mcc, country, device_id, ip, card_bin,
# card_country, latitude, longitude, pattern.
Row = tuple[int, str, str, str, int, str, str, str, str, str | None, str | None, str, str, float | None, float | None, str | None]

TRAVELLERS_SHARE = 0.02
TRIP_MS = 4 * DAY_MS
# Nobody pays while under way: at the start of a trip and on the way back.
TRIP_SILENCE_MS = 12 * HOUR_MS
FAVOURITE_SHOP_SHARE = 0.75
GEOLOCATED_SHARE = 0.7
MOTO_SHARE = 0.02
SECOND_DEVICE_SHARE = 0.2
HOTEL_NETWORKS = 16
HOTELS_START = STRANGER_START // 2
WEEKDAY: Floats = np.array([0.95, 0.95, 0.97, 1.0, 1.13, 1.15, 0.85])
AMOUNT_SPREAD = 0.55
# Monday is 0; 1970-01-01 was a Thursday.
EPOCH_WEEKDAY = 3


@dataclass(frozen=True)
class Slice:
    """Genuine payments in event-time order: `rows`, and columns (events,) that the fraud patterns look their victims up in."""

    start_ms: int
    end_ms: int
    rows: list[Row]
    time_ms: Ints
    card: Ints
    merchant: Ints
    city: Ints


class Genuine:
    """Generates slices of genuine traffic over a world."""

    def __init__(self, config: SimulatorConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._card_country = world.city_country[world.customer_city[world.card_customer]]
        self._activity_total = float(world.card_activity.sum())
        self._trips: dict[int, Ints] = {}
        self._currencies = [COUNTRIES[c].currency for c in world.merchant_country.tolist()]
        self._countries = [COUNTRIES[c].code for c in world.merchant_country.tolist()]
        self._cash = np.array([mcc == CASH_MCC for mcc in world.merchant_mcc])

    def slice(self, number: int) -> Slice:
        """The `number`-th slice after the start."""
        config, world = self._config, self._world
        rng = np.random.default_rng([config.seed, 1, number])
        start_ms = config.start_ms + number * config.slice_ms
        end_ms = start_ms + config.slice_ms
        abroad = self._trip_city(start_ms)
        weights = self._weights(start_ms + config.slice_ms // 2, start_ms)
        total = float(weights.sum())
        expected = config.events_per_day * config.slice_ms / DAY_MS * total / self._activity_total
        n = int(rng.poisson(expected))
        time_ms = np.sort(rng.integers(start_ms, end_ms, n))
        card = np.minimum(np.searchsorted(np.cumsum(weights), rng.random(n) * total, side="right"), len(weights) - 1).astype(
            np.int64
        )
        customer = world.card_customer[card]
        away = abroad[customer] >= 0
        city = np.where(away, abroad[customer], world.customer_city[customer])
        online = rng.random(n) < world.customer_online_share[customer]
        merchant = self._merchants(rng, customer, city, away, online)
        amount = self._amounts(rng, customer, merchant)
        rows = self._rows(rng, time_ms, card, merchant, amount, city, away, online)
        return Slice(start_ms, end_ms, rows, time_ms, card, merchant, city)

    def _weights(self, middle_ms: int, start_ms: int) -> Floats:
        """Relative activity of each card in a slice."""
        hour = (middle_ms // HOUR_MS + self._world.country_utc_hours) % 24
        by_country = RHYTHM[hour] * WEEKDAY[(middle_ms // DAY_MS + EPOCH_WEEKDAY) % 7]
        weights: Floats = self._world.card_activity * by_country[self._card_country]
        if (start_ms - self._config.start_ms) % TRIP_MS < TRIP_SILENCE_MS:
            trip, before = self._trip_city(start_ms), self._trip_city(start_ms - TRIP_MS)
            weights = np.where((trip != before)[self._world.card_customer], 0.0, weights)
        return weights

    def _trip_city(self, at_ms: int) -> Ints:
        """The city each customer has travelled to at a time, or -1. Shape (customers,)."""
        trip = (at_ms - self._config.start_ms) // TRIP_MS
        if trip not in self._trips:
            world = self._world
            rng = np.random.default_rng([self._config.seed, 4, trip + 1])
            customers = len(world.customer_city)
            city = rng.integers(0, len(world.city_country), customers)
            goes = (rng.random(customers) < TRAVELLERS_SHARE) & (trip >= 0)
            goes &= world.city_country[city] != world.city_country[world.customer_city]
            self._trips = {t: c for t, c in self._trips.items() if t >= trip - 1}
            self._trips[trip] = np.where(goes, city, -1)
        return self._trips[trip]

    def _merchants(
        self, rng: np.random.Generator, customer: Ints, city: Ints, away: npt.NDArray[np.bool_], online: npt.NDArray[np.bool_]
    ) -> Ints:
        """A favourite, else one by popularity: of the city a customer is in, or of all that sell online."""
        world, n = self._world, len(customer)
        favourite = rng.integers(0, FAVOURITES, n)
        below = np.concatenate([[0.0], world.shops_cumulative])
        low, high = below[world.shops_city_edges[city]], below[world.shops_city_edges[city + 1]]
        draw = rng.random(n)
        # Bounded by the city's own stretch: rounding must not lead to a shop next door.
        at = np.searchsorted(world.shops_cumulative, low + draw * (high - low), side="right")
        shop = world.shops[np.clip(at, world.shops_city_edges[city], world.shops_city_edges[city + 1] - 1)]
        at = np.searchsorted(world.sites_cumulative, draw * world.sites_cumulative[-1], side="right")
        site = world.sites[np.minimum(at, len(world.sites) - 1)]
        usual = rng.random(n) < FAVOURITE_SHOP_SHARE
        shop = np.where(usual & ~away, world.customer_shops[customer, favourite], shop)
        site = np.where(usual, world.customer_sites[customer, favourite], site)
        chosen: Ints = np.where(online, site, shop)
        return chosen

    def _amounts(self, rng: np.random.Generator, customer: Ints, merchant: Ints) -> Ints:
        """Log-normal around a customer's habit and the merchant's trade, in the merchant's currency; round sums from a machine."""
        world = self._world
        rate = world.country_rate[world.merchant_country[merchant]]
        amount = np.exp(world.customer_log_amount[customer] + rng.normal(0.0, AMOUNT_SPREAD, len(customer)))
        minor = np.rint(amount * world.merchant_factor[merchant] * rate)
        note = 1_000.0 * np.maximum(1.0, np.floor(rate))
        minor = np.where(self._cash[merchant], np.maximum(1.0, np.rint(minor / note)) * note, minor)
        return np.clip(minor, 1, AMOUNT_MINOR_MAX).astype(np.int64)

    def _rows(
        self,
        rng: np.random.Generator,
        time_ms: Ints,
        card: Ints,
        merchant: Ints,
        amount: Ints,
        city: Ints,
        away: npt.NDArray[np.bool_],
        online: npt.NDArray[np.bool_],
    ) -> list[Row]:
        world, n = self._world, len(card)
        customer = world.card_customer[card]
        located = ~online | (rng.random(n) < GEOLOCATED_SHARE)
        # Online, the place is that of the network address, to a tenth of a degree.
        home_latitude = np.where(away, world.city_latitude[city], world.customer_latitude[customer])
        home_longitude = np.where(away, world.city_longitude[city], world.customer_longitude[customer])
        latitude = np.where(online, np.round(home_latitude, 1), world.merchant_latitude[merchant])
        longitude = np.where(online, np.round(home_longitude, 1), world.merchant_longitude[merchant])
        moto = rng.random(n) < MOTO_SHARE
        device = (rng.random(n) < SECOND_DEVICE_SHARE).astype(np.int64)
        network = np.where(
            away, HOTELS_START + city * HOTEL_NETWORKS + rng.integers(0, HOTEL_NETWORKS, n), world.customer_household[customer]
        )
        on = online.tolist()
        customers, cards, merchants = customer.tolist(), card.tolist(), merchant.tolist()
        channels = ["moto" if m and o else world.merchant_channel[i] for i, o, m in zip(merchants, on, moto.tolist(), strict=True)]
        devices = [
            device_id(c, d) if o and ch != "moto" else None
            for c, d, o, ch in zip(customers, device.tolist(), on, channels, strict=True)
        ]
        addresses = [ip_address(h) if o and ch != "moto" else None for h, o, ch in zip(network.tolist(), on, channels, strict=True)]
        where = located & ~(online & moto)
        return list(
            zip(
                time_ms.tolist(),
                [world.card_ids[c] for c in cards],
                [world.customer_ids[c] for c in customers],
                [world.merchant_ids[m] for m in merchants],
                amount.tolist(),
                [self._currencies[m] for m in merchants],
                channels,
                [world.merchant_mcc[m] for m in merchants],
                [self._countries[m] for m in merchants],
                devices,
                addresses,
                [world.card_bins[c] for c in cards],
                [world.card_countries[c] for c in cards],
                _known(latitude, where),
                _known(longitude, where),
                [None] * n,
                strict=True,
            )
        )


def _known(values: Floats, known: npt.NDArray[np.bool_]) -> list[float | None]:
    """`values` as a list with None where it isn't known."""
    return [v if k else None for v, k in zip(values.tolist(), known.tolist(), strict=True)]


def fraud_row(
    world: World,
    pattern: str,
    at_ms: int,
    card: int,
    merchant: int,
    amount_minor: float,
    *,
    channel: str = "ecom",
    device: str | None = None,
    ip: str | None = None,
    place: tuple[float, float] | None = None,
) -> Row:
    """One fraudulent payment; everything else follows from the card and the merchant."""
    country = COUNTRIES[int(world.merchant_country[merchant])]
    return (
        at_ms,
        world.card_ids[card],
        world.customer_ids[int(world.card_customer[card])],
        world.merchant_ids[merchant],
        int(min(max(1, math.floor(amount_minor + 0.5)), AMOUNT_MINOR_MAX)),
        country.currency,
        channel,
        world.merchant_mcc[merchant],
        country.code,
        device,
        ip,
        world.card_bins[card],
        world.card_countries[card],
        None if place is None else place[0],
        None if place is None else place[1],
        pattern,
    )


def recent_of(slices: Sequence[Slice]) -> Slice:
    """Several slices' columns end to end, without their rows."""
    return Slice(
        slices[0].start_ms,
        slices[-1].end_ms,
        [],
        np.concatenate([s.time_ms for s in slices]),
        np.concatenate([s.card for s in slices]),
        np.concatenate([s.merchant for s in slices]),
        np.concatenate([s.city for s in slices]),
    )


assert TRIP_SILENCE_MS < TRIP_MS
