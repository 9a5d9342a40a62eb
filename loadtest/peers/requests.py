"""What the peers are given: hashes of features for the usual service, and a request for MLflow's scoring server."""

from __future__ import annotations

import msgspec
import numpy as np
import redis

from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FEATURES
from gateway.contracts.model_meta import INPUT_NAME
from loadtest.openloop.payments import CUSTOMERS_PER_CARD, DEVICES_PER_CARD, IPS_PER_CARD, People, id_of

FIELDS = {e.name: [f.name for f in FEATURES if f.entity == e.name] for e in ENTITIES}
SEED = 1
PIPELINE = 1000


def fill(redis_url: str, people: People) -> int:
    """A hash of features for each entity of the population. Returns how many."""
    rng = np.random.default_rng(SEED)
    counts = {
        "card": people.cards,
        "customer": int(people.cards * CUSTOMERS_PER_CARD),
        "merchant": people.merchants,
        "device": int(people.cards * DEVICES_PER_CARD),
        "ip": int(people.cards * IPS_PER_CARD),
    }
    with redis.Redis.from_url(redis_url) as client:
        for name, count in counts.items():
            values = rng.lognormal(3, 2, (count, len(FIELDS[name]))).round(4).tolist()
            for first in range(0, count, PIPELINE):
                pipe = client.pipeline(transaction=False)
                for number, row in enumerate(values[first : first + PIPELINE], first):
                    pipe.hset(f"{name}:{id_of(name, number)}", mapping=dict(zip(FIELDS[name], row, strict=True)))
                pipe.execute()
    return sum(counts.values())


def mlflow_body() -> bytes:
    """One row of features as a tensor, which costs MLflow least of the forms it takes."""
    row = np.random.default_rng(SEED).lognormal(3, 2, len(FEATURE_NAMES)).round(4).tolist()
    return msgspec.json.encode({"inputs": {INPUT_NAME: [row]}})
