"""Payments of a population of cards, as many as a benchmark wants and ready to send: no fraud patterns, no simulated days.

Cards pay at a heavy-tailed rate, merchants follow a power law, every second payment is online and names a device and an address.
Ids are those of `deploy.population`, so that a Redis filled with its month knows these cards. Every transaction id is RUN-NUMBER, from
which a reader of `decisions` knows when it was due. About 6 us a payment: all are made before the first is sent.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gateway.contracts.transaction import Transaction

PREFIX = {"card": "tok_", "customer": "cus_", "merchant": "mer_", "device": "dev_", "ip": "2001:db8::"}
CUSTOMERS_PER_CARD, DEVICES_PER_CARD, IPS_PER_CARD = 0.8, 1.1, 0.7
ONLINE_SHARE = 0.5
SIGMA = 1.2
COUNTRIES = ("DE", "FR", "IT", "ES")
MCCS = ("5411", "5812", "5541", "5999", "4111", "5732")


@dataclass(frozen=True)
class People:
    """How many cards and merchants pay and are paid; customers, devices and addresses follow from the cards."""

    cards: int = 100_000
    merchants: int = 20_000


def id_of(entity: str, number: int) -> str:
    return f"{PREFIX[entity]}{number:012d}"


def run_name(prefix: str) -> str:
    """A new one each time, without digits: with those of the payment's number some ids would be taken for card numbers, and refused."""
    return prefix + "".join(secrets.choice(string.ascii_lowercase) for _ in range(6))


def transaction_id(run: str, number: int) -> str:
    return f"{run}-{number}"


def payments(people: People, run: str, count: int, first_ms: int, rate_per_s: float, seed: int) -> Iterator[Transaction]:
    """`count` payments whose event times are when they are due: `rate_per_s` a second from `first_ms`."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0.0, SIGMA, people.cards)
    card = rng.choice(people.cards, count, p=weight / weight.sum())
    # Where a card pays: mostly at one of its five favourites, else anywhere by the power law.
    favourite = (card * 7919 + rng.integers(0, 5, count) * 104_729) % people.merchants
    merchant = np.where(rng.random(count) < 0.6, favourite, (people.merchants * rng.random(count) ** 3).astype(np.int64))
    online = rng.random(count) < ONLINE_SHARE
    customers, devices, ips = (max(1, int(people.cards * share)) for share in (CUSTOMERS_PER_CARD, DEVICES_PER_CARD, IPS_PER_CARD))
    device = np.where(rng.random(count) < 0.95, card * devices // people.cards, rng.integers(0, devices, count))
    ip = np.where(rng.random(count) < 0.7, card * ips // people.cards, rng.integers(0, ips, count))
    amount = np.clip(rng.lognormal(8, 1.2, count), 1, 10_000_000).astype(np.int64)
    abroad = rng.random(count) < 0.05
    columns = zip(*(a.tolist() for a in (card, merchant, online, device, ip, amount, abroad)), strict=True)
    for i, (c, m, is_online, d, a, minor, is_abroad) in enumerate(columns):
        yield Transaction(
            transaction_id=transaction_id(run, i),
            event_time_ms=first_ms + int(i * 1000 / rate_per_s),
            card_id=id_of("card", c),
            customer_id=id_of("customer", c * customers // people.cards),
            merchant_id=id_of("merchant", m),
            amount_minor=minor,
            currency="EUR",
            channel="ecom" if is_online else "pos",
            mcc=MCCS[m % len(MCCS)],
            country=COUNTRIES[(c + is_abroad) % len(COUNTRIES)],
            device_id=id_of("device", d) if is_online else None,
            ip=id_of("ip", a) if is_online else None,
            card_bin="400000",
            card_country=COUNTRIES[c % len(COUNTRIES)],
        )
