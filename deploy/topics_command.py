"""`fraudgate topics`: the topics and schemas on a Kafka and a registry that are somebody else's. `fraudgate up` does it for its own."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from confluent_kafka import KafkaException

from deploy.topics import create_topics, partitions, register_schemas
from gateway.contracts.registry import IncompatibleSchemaError, RegistryUnavailableError
from gateway.contracts.settings import Settings, load_settings
from gateway.contracts.topics import TOPICS

RETRY_S = 5.0
WAIT_S_MAX = 3600


def topics(argv: list[str]) -> int:
    """Exit status 1 when Kafka or the registry can't be reached in time, or refuses a schema."""
    parser = argparse.ArgumentParser(
        prog="fraudgate topics",
        description="Create the topics that are missing, with FRAUDGATE_KAFKA_PARTITIONS partitions, and register their schemas. What is "
        "there stays as it is.",
    )
    parser.add_argument(
        "--wait-s",
        type=int,
        default=0,
        metavar="N",
        help="try for so long while Kafka or the registry doesn't answer (default: once)",
    )
    options = parser.parse_args(argv)
    if not 0 <= options.wait_s <= WAIT_S_MAX:
        parser.error(f"--wait-s must be in 0..{WAIT_S_MAX}")
    return prepare(load_settings(), options.wait_s)


def prepare(
    settings: Settings,
    wait_s: float,
    clock_s: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Once, and again every few seconds until it succeeds or `wait_s` are over."""
    give_up = clock_s() + wait_s
    while True:
        try:
            created = create_topics(settings)
            ids = register_schemas(settings)
        except IncompatibleSchemaError as exc:
            # No other attempt changes that.
            print(f"fraudgate topics: {exc}", file=sys.stderr, flush=True)
            return 1
        except (KafkaException, RegistryUnavailableError) as exc:
            print(f"fraudgate topics: {exc}", file=sys.stderr, flush=True)
            if clock_s() + RETRY_S > give_up:
                return 1
            pause(RETRY_S)
            continue
        counted = partitions(settings)
        for name in sorted(TOPICS):
            note = "created" if name in created else "there already"
            print(f"{name:<26}{counted.get(name, 0):>4} partitions, {note}; schema {ids[name]}", flush=True)
        return 0
