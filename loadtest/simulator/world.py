"""The population: countries and cities, customers and their cards, merchants, devices and network addresses. Built once a seed.

Costs a few microseconds a card. All arrays are indexed by card, customer, merchant or city; ids are lists of text beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.simulator.config import SimulatorConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MERCHANT_TRAFFIC_SHARE_MAX = 0.02
MERCHANTS_MIN = 400
CUSTOMERS_PER_CARD = 0.9
CUSTOMERS_PER_HOUSEHOLD = 1.6
FAVOURITES = 10
BINS_PER_COUNTRY = 4
# Extra devices and addresses of people who own no card here: those of the fraudsters.
STRANGER_START = 0x200000


@dataclass(frozen=True)
class Country:
    """`rate` is minor units of the currency for a euro cent; `utc_hours` the clock's offset; `cities` are (latitude, longitude)."""

    code: str
    currency: str
    rate: float
    utc_hours: int
    weight: float
    cities: tuple[tuple[float, float], ...]


COUNTRIES: tuple[Country, ...] = (
    Country("DE", "EUR", 1.0, 1, 22, ((52.52, 13.40), (53.55, 9.99), (48.14, 11.58), (50.94, 6.96))),
    Country("FR", "EUR", 1.0, 1, 16, ((48.86, 2.35), (45.76, 4.84), (43.30, 5.37))),
    Country("GB", "GBP", 0.85, 0, 15, ((51.51, -0.13), (53.48, -2.24), (55.86, -4.25))),
    Country("US", "USD", 1.1, -5, 14, ((40.71, -74.01), (41.88, -87.63), (34.05, -118.24))),
    Country("ES", "EUR", 1.0, 1, 8, ((40.42, -3.70), (41.39, 2.17))),
    Country("IT", "EUR", 1.0, 1, 8, ((45.46, 9.19), (41.90, 12.50))),
    Country("NL", "EUR", 1.0, 1, 5, ((52.37, 4.90),)),
    Country("PL", "PLN", 4.3, 1, 5, ((52.23, 21.01), (50.06, 19.94))),
    Country("SE", "SEK", 11.0, 1, 3, ((59.33, 18.07),)),
    Country("JP", "JPY", 1.6, 9, 2, ((35.68, 139.69),)),
    Country("BR", "BRL", 6.0, -3, 2, ((-23.55, -46.63),)),
)


@dataclass(frozen=True)
class Trade:
    """`factor` is the typical amount relative to a customer's own habit; `online` the chance that such a merchant sells online."""

    mcc: str
    weight: float
    factor: float
    online: float


TRADES: tuple[Trade, ...] = (
    Trade("5411", 24, 1.1, 0.05),
    Trade("5812", 16, 0.8, 0.0),
    Trade("5814", 12, 0.35, 0.1),
    Trade("5541", 9, 1.4, 0.0),
    Trade("5311", 8, 1.5, 0.4),
    Trade("5732", 6, 3.0, 0.6),
    Trade("5651", 7, 1.6, 0.5),
    Trade("5912", 6, 0.6, 0.1),
    Trade("5999", 6, 1.0, 0.8),
    Trade("4816", 4, 0.5, 1.0),
    Trade("4111", 4, 0.3, 0.3),
    Trade("6011", 3, 2.5, 0.0),
    Trade("5967", 2, 0.7, 1.0),
)
CASH_MCC = "6011"
# Relative activity by local hour.
RHYTHM: Floats = np.array([2, 1, 1, 1, 1, 2, 6, 14, 22, 26, 30, 36, 44, 42, 36, 34, 36, 44, 50, 46, 36, 26, 14, 6], np.float64)
RHYTHM /= RHYTHM.mean()


@dataclass(frozen=True)
class World:
    """Everything that stays the same during a simulation."""

    # By card.
    card_ids: list[str]
    card_bins: list[str]
    card_countries: list[str]
    card_customer: Ints
    card_activity: Floats
    # By customer.
    customer_ids: list[str]
    customer_city: Ints
    customer_latitude: Floats
    customer_longitude: Floats
    customer_log_amount: Floats
    customer_online_share: Floats
    customer_shops: Ints  # (customers, FAVOURITES): merchants nearby
    customer_sites: Ints  # (customers, FAVOURITES): merchants online
    customer_household: Ints
    # By merchant.
    merchant_ids: list[str]
    merchant_mcc: list[str]
    merchant_channel: list[str]
    merchant_country: Ints
    merchant_city: Ints
    merchant_latitude: Floats
    merchant_longitude: Floats
    merchant_factor: Floats
    # Merchants with a till, sorted by city, and their popularity added up; the same for those online.
    shops: Ints
    shops_cumulative: Floats
    shops_city_edges: Ints  # (cities + 1,)
    sites: Ints
    sites_cumulative: Floats
    # By city.
    city_country: Ints
    city_latitude: Floats
    city_longitude: Floats
    # By country.
    country_rate: Floats
    country_utc_hours: Ints


def device_id(owner: int, number: int) -> str:
    """The `number`-th device of an owner. Letters keep the digits from ever running together to a card number."""
    return f"dev-{owner:x}n{number}"


def ip_address(household: int) -> str:
    """An address of the carrier-grade NAT block 100.64.0.0/10 (RFC 6598), one a household."""
    return f"100.{64 + (household >> 16) % 64}.{household >> 8 & 255}.{household & 255}"


def _popularity(count: int) -> Floats:
    """Zipf's law, flattened at the top (s = 0.8, shifted by 16), so that none passes MERCHANT_TRAFFIC_SHARE_MAX."""
    weights: Floats = np.power(np.arange(count, dtype=np.float64) + 16.0, -0.8)
    return weights


def _pick(rng: np.random.Generator, cumulative: Floats, low: Floats | float, high: Floats | float, size: tuple[int, ...]) -> Ints:
    """Indices drawn by weight from the stretch (low, high] of a running sum."""
    at = low + rng.random(size) * (high - low)
    return np.minimum(np.searchsorted(cumulative, at, side="right"), len(cumulative) - 1).astype(np.int64)


def _bins(code: str) -> list[str]:
    """Six-digit issuer numbers of a country, made from its letters; the first digit 9 is not given to any network."""
    first = (ord(code[0]) - 65) * 26 + ord(code[1]) - 65
    return [f"9{first:03d}{n:02d}" for n in range(10, 10 + BINS_PER_COUNTRY)]


def build_world(config: SimulatorConfig) -> World:
    rng = np.random.default_rng([config.seed, 0])
    customers = max(1, round(config.cards * CUSTOMERS_PER_CARD))
    merchants = max(MERCHANTS_MIN, config.cards // 10)

    # Cities: the first of a country is the largest.
    city_country = np.array([c for c, country in enumerate(COUNTRIES) for _ in country.cities], np.int64)
    city_weight = np.array([country.weight / (i + 1.5) for country in COUNTRIES for i in range(len(country.cities))])
    city_latitude = np.array([lat for country in COUNTRIES for lat, _ in country.cities])
    city_longitude = np.array([lon for country in COUNTRIES for _, lon in country.cities])
    city_share = city_weight / city_weight.sum()
    cities = len(city_share)

    trade_share = np.array([t.weight for t in TRADES])
    trade = rng.choice(len(TRADES), merchants, p=trade_share / trade_share.sum())
    online = rng.random(merchants) < np.array([t.online for t in TRADES])[trade]
    # Enough of both kinds in every city, whatever the draw: every eighth merchant is online, each city has its turn of tills.
    index = np.arange(merchants)
    online[index % 8 == 0] = True
    online[index % 8 == 1] = False
    trade[online & (np.array([t.online for t in TRADES])[trade] == 0.0)] = 8
    merchant_city = rng.choice(cities, merchants, p=city_share)
    tills = np.flatnonzero(~online)
    merchant_city[tills[: 3 * cities]] = np.arange(len(tills[: 3 * cities])) % cities
    spread = rng.normal(0.0, 0.04, (2, merchants))

    # Popularity belongs to a merchant's place in its city, so a small town's baker is no giant.
    popularity = _popularity(merchants)[rng.permutation(merchants)]
    shops = tills[np.argsort(merchant_city[tills], kind="stable")]
    edges = np.searchsorted(merchant_city[shops], np.arange(cities + 1))
    sites = np.flatnonzero(online)

    customer_city = rng.choice(cities, customers, p=city_share)
    scatter = rng.normal(0.0, 0.05, (2, customers))
    shops_cumulative = np.cumsum(popularity[shops])
    sites_cumulative = np.cumsum(popularity[sites])
    below = np.concatenate([[0.0], shops_cumulative])
    low, high = below[edges[customer_city]], below[edges[customer_city + 1]]
    customer_shops = shops[_pick(rng, shops_cumulative, low[:, None], high[:, None], (customers, FAVOURITES))]
    customer_sites = sites[_pick(rng, sites_cumulative, 0.0, float(sites_cumulative[-1]), (customers, FAVOURITES))]

    card_customer = np.concatenate([np.arange(customers), rng.permutation(customers)[: config.cards - customers]])[: config.cards]
    card_country = city_country[customer_city[card_customer]]
    bin_number = np.minimum(rng.geometric(0.45, config.cards) - 1, BINS_PER_COUNTRY - 1).tolist()
    bins = [_bins(c.code) for c in COUNTRIES]

    return World(
        card_ids=[f"card-{i:x}k" for i in range(config.cards)],
        card_bins=[bins[c][b] for c, b in zip(card_country.tolist(), bin_number, strict=True)],
        card_countries=[COUNTRIES[c].code for c in card_country.tolist()],
        card_customer=card_customer,
        card_activity=rng.gamma(2.0, 0.5, config.cards) + 0.05,
        customer_ids=[f"cust-{i:x}k" for i in range(customers)],
        customer_city=customer_city,
        customer_latitude=np.round(city_latitude[customer_city] + scatter[0], 4),
        customer_longitude=np.round(city_longitude[customer_city] + scatter[1], 4),
        customer_log_amount=rng.normal(np.log(2_500.0), 0.45, customers),
        customer_online_share=rng.beta(2.0, 4.0, customers),
        customer_shops=customer_shops,
        customer_sites=customer_sites,
        customer_household=np.minimum((rng.permutation(customers) / CUSTOMERS_PER_HOUSEHOLD).astype(np.int64), STRANGER_START - 1),
        merchant_ids=[f"mer-{i:x}k" for i in range(merchants)],
        merchant_mcc=[TRADES[t].mcc for t in trade.tolist()],
        merchant_channel=[
            "ecom" if on else "atm" if TRADES[t].mcc == CASH_MCC else "pos"
            for t, on in zip(trade.tolist(), online.tolist(), strict=True)
        ],
        merchant_country=city_country[merchant_city],
        merchant_city=merchant_city,
        merchant_latitude=np.round(city_latitude[merchant_city] + spread[0], 5),
        merchant_longitude=np.round(city_longitude[merchant_city] + spread[1], 5),
        merchant_factor=np.array([t.factor for t in TRADES])[trade] * np.exp(rng.normal(0.0, 0.25, merchants)),
        shops=shops,
        shops_cumulative=shops_cumulative,
        shops_city_edges=edges.astype(np.int64),
        sites=sites,
        sites_cumulative=sites_cumulative,
        city_country=city_country,
        city_latitude=city_latitude,
        city_longitude=city_longitude,
        country_rate=np.array([c.rate for c in COUNTRIES]),
        country_utc_hours=np.array([c.utc_hours for c in COUNTRIES], np.int64),
    )


# Letters of two between A and Z make three digits at most.
assert 26 * 26 < 1000
