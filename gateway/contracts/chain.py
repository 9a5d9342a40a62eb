"""How the rows of the table `decisions` are chained, so that a change, a loss or an exchange of rows shows. Written by the feature jobs.

A row's content is its place and its payload: the schema's id, Kafka partition and offset, Kafka's timestamp in microseconds, the batch of
silver, then the Avro record's bytes. `content_sha256` is over that; `chain_sha256` is over the chain of the row before it in the same
partition and the content's hash. Rows stand in the order of (batch_id, offset), which is the order in which they were written.
About a microsecond a link.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

# What stands before the first row of a partition.
GENESIS = bytes(32)
# schema_id, partition, offset, Kafka's timestamp in microseconds, batch_id.
PLACE = struct.Struct(">iiqqq")


def content_sha256(schema_id: int, partition: int, offset: int, timestamp_us: int, batch_id: int, payload: bytes) -> bytes:
    """The hash of one row's content."""
    found = hashlib.sha256(PLACE.pack(schema_id, partition, offset, timestamp_us, batch_id))
    found.update(payload)
    return found.digest()


def chain_of(before: bytes, contents: Iterable[bytes]) -> list[bytes]:
    """The chain of each of `contents`, hashes of rows that follow one another behind `before`."""
    chain = []
    for content in contents:
        before = hashlib.sha256(before + content).digest()
        chain.append(before)
    return chain
