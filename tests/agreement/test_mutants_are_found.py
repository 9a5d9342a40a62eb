"""Would the agreement tests notice? Each small error seeded into the window arithmetic must make the recount differ.

A mutant is the real source with one expression changed, used by the real store and the real tile writer on a real Redis.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import redis
from msgspec import structs

import gateway.redis.backend
import gateway.redis.store
from feature_jobs import tiles as tile_writer
from gateway.contracts import layout, tiles
from gateway.contracts.features import ENTITY_INDEX
from gateway.contracts.transaction import Transaction
from gateway.kernels import features
from tests.entities import NOON_MS, WALL_MS, Entities, make_stream, redis_server
from tests.oracle import Oracle, differences

pytestmark = pytest.mark.integration

LUA = Path(layout.__file__).parent / "lua"
SOURCES: dict[str, ModuleType] = {"features": features, "tiles": tiles}


@dataclass(frozen=True)
class Mutant:
    what: str
    source: str
    right: str
    wrong: str


MUTANTS = (
    Mutant(
        "an event exactly on the boundary falls between head and tiles",
        "features",
        "loose = recent if when >= edge else untiled",
        "loose = recent if when > edge else untiled",
    ),
    Mutant("an event of the same instant is dropped", "features", "if age <= 0 or when > t_ms:", "if age <= 0 or when >= t_ms:"),
    Mutant("the tail of a fine tile isn't rounded", "features", "begin if _TAIL[w] == 0 else begin - begin % _TAIL[w]", "begin"),
    Mutant(
        "a head's event on the tail is dropped",
        "features",
        "if when >= froms[w]:",
        "if when > froms[w]:",
    ),
    Mutant(
        "what lies in a short window isn't counted in the longer ones",
        "features",
        "counts[w, i] += counts[w - 1, i]",
        "counts[w, i] += 0",
    ),
    Mutant(
        "the largest of a short window isn't that of the longer ones",
        "features",
        "counts[w, 3] = max(counts[w, 3], counts[w - 1, 3])",
        "counts[w, 3] = counts[w, 3]",
    ),
    Mutant("a sketch of a short window isn't part of the longer ones", "features", "bits[w, i] |= bits[w - 1, i]", "pass"),
    Mutant(
        "a fine tile on the tail is dropped", "features", "if not fits or start < froms[w]:", "if not fits or start <= froms[w]:"
    ),
    Mutant(
        "a day on the tail is dropped",
        "features",
        "_TAIL[w] != DAY_MS or start < froms[w]",
        "_TAIL[w] != DAY_MS or start <= froms[w]",
    ),
    Mutant(
        "the tile before the boundary is dropped",
        "features",
        "(HOUR_MS if is_hour else BOUNDARY_MS) <= edge",
        "(HOUR_MS if is_hour else BOUNDARY_MS) < edge",
    ),
    Mutant("the day before the boundary is dropped", "features", "if start + DAY_MS <= edge:", "if start + DAY_MS < edge:"),
    Mutant("5 minutes don't fill the hour", "features", "start >= hour_edge", "start > hour_edge"),
    Mutant("hours don't fill the day", "features", "start >= day_edge", "start > day_edge"),
    Mutant("an hour counts beside its 5 minutes", "features", "(tail > BOUNDARY_MS and start >= hour_edge)", "tail > BOUNDARY_MS"),
    Mutant("a head counts one too few", "features", "recent = age <= capacity", "recent = age < capacity"),
    Mutant("a transaction counts itself", "features", "if age <= 0 or when > t_ms:", "if age < 0 or when > t_ms:"),
    Mutant(
        "a late event that no tile holds yet is dropped",
        "features",
        "untiled = buf[at + _TILED] == 0",
        "untiled = buf[at + _TILED] == 2",
    ),
    Mutant("a tiled event counts from the head as well", "features", "untiled = buf[at + _TILED] == 0", "untiled = True"),
    Mutant(
        "labels count one day too early", "features", "if labelled and start < label_end:", "if labelled and start <= label_end:"
    ),
    Mutant("labels have no delay", "features", "label_end = t_ms - LABEL_DELAY_MS", "label_end = t_ms"),
    Mutant(
        "a genuine payment doesn't end a run of frauds",
        "features",
        "by_day[0, (start - label_from) // DAY_MS] += count",
        "by_day[0, (start - label_from) // DAY_MS] += 0",
    ),
    Mutant(
        "a fraud goes to the day before",
        "features",
        "by_day[1, (start - label_from) // DAY_MS] += count",
        "by_day[1, (start - label_from) // DAY_MS - 1] += count",
    ),
    Mutant(
        "the last step before the boundary isn't remembered",
        "features",
        "start + SEEN_STEP_MS <= edge",
        "start + SEEN_STEP_MS < edge",
    ),
    Mutant("an event that comes later counts", "features", "if age <= 0 or when > t_ms:", "if age <= 0:"),
    Mutant("of two last events at one instant the first is taken", "features", "place > last_seq", "place < last_seq"),
    Mutant(
        "an event on an edge goes to the tile before",
        "tiles",
        "(event_time_ms - event_time_ms % resolution_ms)",
        "(event_time_ms - 1 - (event_time_ms - 1) % resolution_ms)",
    ),
    Mutant("the second event of a tile is dropped", "tiles", '("count", np.add)', '("count", np.maximum)'),
    Mutant(
        "days go a day too early",
        "tiles",
        "retention_ms = np.full(len(tiles), TILE_RETENTION_MS[resolution_ms])",
        "retention_ms = np.full(len(tiles), TILE_RETENTION_MS[resolution_ms] - DAY_MS)",
    ),
    Mutant("a redelivery counts twice", "entity.lua", "    if head and holds(head, record) then return end\n", ""),
    Mutant("what may have outlived its claim isn't looked for", "entity.lua", "look or byte(records, at + 16) == 1", "look"),
    Mutant("a full head drops what its batch needs", "entity.lua", "keep = capacity + others", "keep = capacity - 8"),
    Mutant(
        "the first event that a full head keeps gets a wrong place",
        "entity.lua",
        "seq = told == 0xFFFFFFFF and seq + 1 or told",
        "seq = told == 0xFFFFFFFF and seq or told",
    ),
    Mutant(
        "a new head doesn't ask for the early list",
        "entity.lua",
        "local tiled, early = early_of(head_key, record, early_max)\n  local event",
        "local tiled, early = '\\0', 0\n  local event",
    ),
    Mutant("a head isn't told of its early list", "merge.lua", "early ~= '' and", "false and"),
    Mutant("an event behind a gap doesn't tell its place", "merge.lua", "if drop[i - 1] then", "if false then"),
    Mutant("an event's number is that of the one before", "features", "place + 1 if told == SEQ_NEXT", "place if told == SEQ_NEXT"),
    Mutant("what Spark counted first counts twice", "entity.lua", "if at or (forgotten", "if (forgotten"),
    Mutant("what a tile holds isn't marked", "merge.lua", "      tiled[at] = true\n", ""),
    Mutant("compaction drops what a window needs", "merge.lua", "times[i + 1] < keep_from", "times[i + 1] <= sorted[events]"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with redis_server(tmp_path_factory.mktemp("redis")) as client:
        yield client


def differs(server: redis.Redis, seed: int, step_ms: int, disorder_ms: int, wall_ms: int) -> bool:
    """True when some feature of some transaction differs from its recount: late, redelivered, tiled early, tiled late."""
    entities, oracle, rng = Entities(server, wall_ms=wall_ms), Oracle(), random.Random(seed)
    pending: list[Transaction] = []
    stream = make_stream(seed, 100, step_ms, disorder_ms)
    early = rng.sample(range(20, 100), 8)
    for n, t in enumerate(stream):
        if n in early:
            entities.tile([t])
        seen = entities.observe(t)
        if differences(oracle.observe(t), seen):
            return True
        if n not in early:
            pending.append(t)
        if rng.random() < 0.1:
            server.delete(layout.idempotency_key(t.transaction_id))
            if differences(seen, entities.observe(t, again=True)):
                return True
        if rng.random() < 0.2:
            about = stream[rng.randrange(n + 1)]
            entities.label(about, 1)
            oracle.label(about, 1)
        if pending and (len(pending) > 30 or rng.random() < 0.2):
            entities.tile(pending)
            pending.clear()
    return False


def burst_differs(server: redis.Redis) -> bool:
    """The same for more events in a minute than a head counts."""
    entities, oracle = Entities(server, wall_ms=NOON_MS), Oracle()
    stream = [structs.replace(t, event_time_ms=NOON_MS + 100 * n) for n, t in enumerate(make_stream(9, 160, 1, 0))]
    if any(differences(oracle.observe(t), entities.observe(t)) for t in [structs.replace(t, card_id="c") for t in stream]):
        return True
    # And by batches, from one address: its head is long enough to be full more than once.
    entities, oracle = Entities(server, wall_ms=NOON_MS), Oracle()
    places: list[int] = []
    batches = [[structs.replace(t, ip="i") for t in make_stream(n, 60, 1, 0)] for n in range(6)]
    for n, batch in enumerate(batches):
        at_ms = NOON_MS + 10_000 * n
        batch[:] = [structs.replace(t, event_time_ms=at_ms + i, transaction_id=f"{n}-{i}") for i, t in enumerate(batch)]
        found = entities.look(batch)
        if any(differences(oracle.observe(t), [float(x) for x in row]) for t, row in zip(batch, found.matrix, strict=True)):
            return True
        places += found.seq[:, ENTITY_INDEX["ip"]].tolist()
    return bool((np.diff(places) != 1).any())


def found(server: redis.Redis) -> bool:
    kinds = ((20_000_000, 0), (60_000, 240_000), (1_800_000, 30_000), (1_000, 30_000))
    return burst_differs(server) or any(
        differs(server, seed, *kind, wall_ms) for seed, wall_ms in ((3, NOON_MS), (8, WALL_MS), (9, NOON_MS)) for kind in kinds
    )


def mutated(mutant: Mutant) -> str:
    path = LUA / mutant.source if mutant.source.endswith(".lua") else Path(SOURCES[mutant.source].__file__ or "")
    text = path.read_text()
    assert mutant.right in text, "the mutant's source has changed: change the mutant with it"
    return text.replace(mutant.right, mutant.wrong)


def install(mutant: Mutant, patch: pytest.MonkeyPatch) -> None:
    text = mutated(mutant)
    if mutant.source in ("entity.lua", "observe.lua"):
        parts = {name: (LUA / name).read_text() for name in ("entity.lua", "observe.lua")} | {mutant.source: text}
        script = "\n".join(parts.values())
        patch.setattr(gateway.redis.backend, "OBSERVE_LUA", script)
    elif mutant.source == "merge.lua":
        patch.setattr(layout, "MERGE_LUA", text)
        patch.setattr(tile_writer, "MERGE_SHA", hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    else:
        module = ModuleType(f"mutated_{mutant.source}")
        # Dataclasses look their module up.
        patch.setitem(sys.modules, module.__name__, module)
        if mutant.source == "features":
            # Compiling twenty kernels would take minutes: a mutant runs as the Python that it is written in.
            text = text.replace("@compiled\n", "")
        exec(compile(text, mutant.what, "exec"), module.__dict__)  # noqa: S102
        if mutant.source == "features":
            patch.setattr(gateway.redis.store, "decode", module.__dict__["decode"])
        else:
            patch.setattr(tiles, "add_events", module.__dict__["add_events"])


def test_the_unchanged_source_has_nothing_to_find(server: redis.Redis) -> None:
    assert not found(server)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_a_mutant_is_found(server: redis.Redis, monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    install(mutant, monkeypatch)
    assert found(server), "nothing noticed"
