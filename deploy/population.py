"""A month of payments of many cards, written as the Delta tables that the streams would have left. Used by `deploy.capacity`.

Payments a card are heavy-tailed (log-normal), merchants follow a power law, every second payment is online and names a device and an
address. About 1 us a payment and column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, write_deltalake
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from feature_jobs import lake
from feature_jobs.silver import QUERY
from gateway.contracts import tables
from gateway.contracts.features import ENTITIES
from gateway.contracts.settings import Settings

DAYS = 31
DAY_MS = 86_400_000
PAYMENTS_MAX = 600
SIGMA = 1.2
CARDS_AT_ONCE = 50_000
# One batch of silver each: the rebuild goes through the last one.
FIRST_BATCH_ID = 0
CUSTOMERS_PER_CARD, MERCHANTS_PER_CARD, DEVICES_PER_CARD, IPS_PER_CARD = 0.8, 0.01, 1.1, 0.7
DIGITS = {"card": "tok_", "customer": "cus_", "merchant": "mer_", "device": "dev_", "ip": "2001:db8::"}


@dataclass(frozen=True)
class Population:
    """`payments` is (cards,). `ids` is how many different ids of each entity were drawn from, by name."""

    payments: npt.NDArray[np.int64]
    ids: dict[str, int]
    batches: int


def id_of(entity: str, number: int) -> str:
    """The id of an entity: 16 characters, as tokens have."""
    return f"{DIGITS[entity]}{number:012d}"


def write(settings: Settings, cards: int, payments_mean: float, now_ms: int, seed: int, merchants: int | None = None) -> Population:
    """Write `silver_transactions` and `decisions` of `cards` cards: the month before `now_ms`. A Spark session must stand."""
    rng = np.random.default_rng(seed)
    ids = {
        "card": cards,
        "customer": max(1, int(cards * CUSTOMERS_PER_CARD)),
        "merchant": merchants or max(1, int(cards * MERCHANTS_PER_CARD)),
        "device": max(1, int(cards * DEVICES_PER_CARD)),
        "ip": max(1, int(cards * IPS_PER_CARD)),
    }
    weight = rng.lognormal(-SIGMA * SIGMA / 2, SIGMA, cards)
    payments = np.clip(rng.poisson(weight * payments_mean), 1, PAYMENTS_MAX).astype(np.int64)
    schemas = {
        name: to_arrow_schema(cast(StructType, StructType.fromDDL(lake.DDL[name]))) for name in (tables.SILVER, tables.DECISIONS)
    }
    batch_id = FIRST_BATCH_ID
    for first, part in _parts(payments):
        rows = _columns(rng, ids, first, part, now_ms, batch_id)
        note = CommitProperties(custom_metadata={"userMetadata": lake.commit_note(QUERY, batch_id)})
        for name, schema in schemas.items():
            arrays = [rows[f.name].cast(f.type) if f.name in rows else pa.nulls(int(part.sum()), f.type) for f in schema]
            uri = tables.table_uri(settings.tables, name)
            write_deltalake(uri, pa.table(arrays, schema=schema), mode="append", commit_properties=note)
        batch_id += 1
    return Population(payments, ids, batch_id - FIRST_BATCH_ID)


def _parts(payments: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    for first in range(0, len(payments), CARDS_AT_ONCE):
        yield first, payments[first : first + CARDS_AT_ONCE]


def _columns(
    rng: np.random.Generator, ids: dict[str, int], first: int, payments: npt.NDArray[np.int64], now_ms: int, batch_id: int
) -> dict[str, Any]:
    """The columns of both tables for the payments of some cards. Each is observed when it is made."""
    card = np.repeat(np.arange(first, first + len(payments)), payments)
    n = len(card)
    event_time_ms = now_ms - rng.integers(60_000, DAYS * DAY_MS, n)
    online = rng.random(n) < 0.5
    # A card has a few favourite merchants; the rest are drawn by a power law.
    favourite = (card * 7919 + rng.integers(0, 5, n) * 104_729) % ids["merchant"]
    drawn = (ids["merchant"] * rng.random(n) ** 3).astype(np.int64)
    own_device = (card * ids["device"] // ids["card"]) % ids["device"]
    numbers = {
        "card": card,
        "customer": card * ids["customer"] // ids["card"],
        "merchant": np.where(rng.random(n) < 0.6, favourite, drawn),
        "device": np.where(rng.random(n) < 0.95, own_device, rng.integers(0, ids["device"], n)),
        "ip": np.where(rng.random(n) < 0.7, card * ids["ip"] // ids["card"], rng.integers(0, ids["ip"], n)),
    }
    names = {entity: _names(entity, number) for entity, number in numbers.items()}
    nobody = pa.scalar(None, pa.string())
    transaction_id = pc.binary_join_element_wise(f"{batch_id:05d}-", _padded(np.arange(n)), "")
    # A place of its own each; later is greater, which is all the rebuild asks for.
    place = event_time_ms * 1000 + rng.integers(0, 1000, n)
    observed_seq = pa.ListArray.from_arrays(
        pa.array(np.arange(n + 1, dtype=np.int32) * len(ENTITIES)), pa.array(np.repeat(place, len(ENTITIES)))
    )
    here = rng.random(n) < 0.6
    return {
        "transaction_id": transaction_id,
        "event_time_ms": pa.array(event_time_ms),
        "card_id": names["card"],
        "customer_id": names["customer"],
        "merchant_id": names["merchant"],
        "amount_minor": pa.array(np.clip(rng.lognormal(8, 1.2, n), 1, 10_000_000).astype(np.int64)),
        "currency": pa.repeat("EUR", n),
        "channel": pc.if_else(pa.array(online), "ecom", "pos"),
        "mcc": pa.repeat("5411", n),
        "country": pa.array(np.array(["DE", "FR", "IT", "ES"])[(card + (rng.random(n) < 0.05)) % 4]),
        "device_id": pc.if_else(pa.array(online), names["device"], nobody),
        "ip": pc.if_else(pa.array(online), names["ip"], nobody),
        "card_bin": pa.repeat("400000", n),
        "latitude": pa.array(rng.uniform(-60, 60, n), mask=~here),
        "longitude": pa.array(rng.uniform(-170, 170, n), mask=~here),
        "decided_at_ms": pa.array(event_time_ms + 5),
        "observed_seq": observed_seq,
        "partition": pa.repeat(pa.scalar(0, pa.int32()), n),
        "offset": pa.array(np.arange(n)),
        "kafka_timestamp": pa.array(event_time_ms * 1000).cast(pa.timestamp("us", "UTC")),
        "batch_id": pa.repeat(pa.scalar(batch_id, pa.int64()), n),
    }


def _padded(numbers: npt.NDArray[np.int64]) -> Any:
    return pc.utf8_lpad(pc.cast(pa.array(numbers), pa.string()), 12, "0")


def _names(entity: str, numbers: npt.NDArray[np.int64]) -> Any:
    return pc.binary_join_element_wise(DIGITS[entity], _padded(numbers), "")
