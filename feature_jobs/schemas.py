"""Which Avro schema ids each topic's records may carry: from the registry, kept in a local copy for when it is down."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry, UnknownSchemaError
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT, DECISIONS, LABELS, LIST_CHANGES, TOPICS, TRANSACTIONS

READ_TOPICS = (TRANSACTIONS, DECISIONS, LABELS, LIST_CHANGES, AUDIT)


@dataclass
class SchemaBook:
    """`by_topic[topic][schema id]` is a writer's schema. Ids are never forgotten nor change their meaning."""

    registry: SchemaRegistry
    by_topic: dict[str, dict[int, str]] = field(default_factory=dict)

    def refresh(self) -> bool:
        """Ask the registry for every schema of each topic; True when one is new.

        Raises `RegistryUnavailableError` when the registry is down and neither memory nor the local copy knows the topic.
        """
        grown = False
        for topic in READ_TOPICS:
            known = self.by_topic.setdefault(topic, {})
            try:
                found = self.registry.ids_of_subject(TOPICS[topic].subject)
            except UnknownSchemaError:
                # Nobody has registered the subject yet. This code's own schema is what producers of today write.
                found = {self.registry.register(TOPICS[topic]): TOPICS[topic].schema_text}
            except RegistryUnavailableError:
                if not known:
                    raise
                continue
            grown |= not found.keys() <= known.keys()
            known.update(found)
        return grown


def schema_book(settings: Settings) -> SchemaBook:
    """The book as the registry or the local copy has it now. Raises `RegistryUnavailableError`."""
    book = SchemaBook(SchemaRegistry(settings.registry, settings.schemas_path))
    book.refresh()
    return book
