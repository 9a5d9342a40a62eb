"""Creates the topics and registers their schemas, with BACKWARD compatibility set first. Doing it again changes nothing."""

from __future__ import annotations

from concurrent.futures import Future

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import COMPATIBILITY, QUARANTINE, TOPICS, Topic

TIMEOUT_S = 30.0
# Kafka's own limit of a record batch is 1,048,588 bytes; a quarantine record holds such a message and its envelope.
QUARANTINE_BYTES_MAX = 2 * 1_048_588


# Without these a broker forgets records after a week.
KEEP_ALL = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}


def wanted_partitions(settings: Settings, topic: Topic) -> int:
    """How many partitions `topic` is created with."""
    return settings.kafka_partitions if topic.partitions is None else topic.partitions


def create_topics(settings: Settings) -> list[str]:
    """Create the topics that don't exist yet and return their names, when each partition has a leader.

    A topic that exists stays as it is: more partitions would move cards. Raises KafkaException.
    """
    admin = AdminClient({"bootstrap.servers": settings.bootstrap, "log_level": 0})
    wanted = [
        NewTopic(
            name,
            num_partitions=wanted_partitions(settings, topic),
            replication_factor=settings.kafka_replication,
            config=(KEEP_ALL if topic.keeps_all else {})
            | ({"max.message.bytes": str(QUARANTINE_BYTES_MAX)} if name == QUARANTINE else {}),
        )
        for name, topic in TOPICS.items()
        if name not in admin.list_topics(timeout=TIMEOUT_S).topics
    ]
    if not wanted:
        return []
    created = []
    results: dict[str, Future[None]] = admin.create_topics(wanted, operation_timeout=TIMEOUT_S)
    for name, result in results.items():
        try:
            result.result(timeout=TIMEOUT_S)
            created.append(name)
        except KafkaException as exc:
            if exc.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    return created


def partitions(settings: Settings) -> dict[str, int]:
    """The number of partitions of each of our topics that exists."""
    admin = AdminClient({"bootstrap.servers": settings.bootstrap, "log_level": 0})
    topics = admin.list_topics(timeout=TIMEOUT_S).topics
    return {name: len(topics[name].partitions) for name in TOPICS if name in topics}


def register_schemas(settings: Settings) -> dict[str, int]:
    """Set BACKWARD for all subjects and register our schemas. Schema id by topic.

    Raises `IncompatibleSchemaError` when a schema breaks the readers of an earlier version, `RegistryUnavailableError`.
    """
    registry = SchemaRegistry(settings.registry, settings.schemas_path)
    registry.request("PUT", "/config", {"compatibility": COMPATIBILITY})
    return {name: registry.register(topic) for name, topic in TOPICS.items()}
