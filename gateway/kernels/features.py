"""From what Redis held to the model's input, for a whole batch. Called by gateway/redis/store.py; about 2 us a transaction.

Says in loops what contracts.windows.aggregate and contracts.feature_matrix say with numpy, on the same list of features:
those two are its slow twins, equal to the bit (tests/agreement). The one exception is `speed`, whose sines and cosines numpy computes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES, ENTITY_INDEX, FEATURES, LABELLED
from gateway.contracts.layout import (
    DAY_TILE_BYTES,
    FINE_TILE_BYTES,
    FRAUD_HOUR,
    HEAD_EVENT,
    HEAD_EVENT_BYTES,
    LABELS_HEADER,
    SEEN_BYTES,
    SEQ_NEXT,
    TILES_HEADER,
)
from gateway.contracts.windows import (
    BOUNDARY_MS,
    DAY_MS,
    HOUR_MS,
    LABEL_DAYS,
    LABEL_DELAY_MS,
    LABEL_WINDOWS,
    LAST_MS_MAX,
    MINUTE_MS,
    NEVER,
    PAIR_WINDOW,
    SEEN_DIM_C,
    SEEN_HASH_MASK,
    SEEN_STEP_MS,
    SEEN_STEPS,
    SETTLE_MS,
    SKETCH_ESTIMATE,
    SQUARED_AMOUNT_MINOR_MAX,
    WINDOW_INDEX,
    WINDOWS,
)
from gateway.kernels.asking import ENTITY_COUNT, ENTITY_TEXT
from gateway.kernels.compiled import compiled
from gateway.kernels.intake import Floats, Int64s
from gateway.kernels.packed import events_from, place_in, sound, sound_head
from gateway.kernels.raw import Bytes, f32, i64, u16, u32, u64
from gateway.kernels.values import COMPARED_CODES, compared, divided, fraud_run, ones

_EVENT, _TILES = HEAD_EVENT_BYTES, TILES_HEADER.size
_FINE, _DAY, _SEEN, _LABELS, _FRAUDS = FINE_TILE_BYTES, DAY_TILE_BYTES, SEEN_BYTES, LABELS_HEADER.size, FRAUD_HOUR.itemsize
# Offsets in an event of a head, after HEAD_EVENT; those of tiles stand where they are read.
_fields: Any = HEAD_EVENT.fields
_WHEN, _AMOUNT, _SEQ, _TILED, _LATITUDE, _LONGITUDE, _DIM_A, _DIM_B, _DIM_C = (
    _fields[name][1]
    for name in ("event_time_ms", "amount_minor", "seq", "tiled", "latitude", "longitude", "dim_a", "dim_b", "dim_c")
)
_BASE, _LOST, _EARLY, _COUNTS = 8, 20, 20, TILES_HEADER.size - 8
# An unaligned load is what these offsets of the packed tiles ask for: start or day, count, largest, total, squares, bitmaps.
_FINE_COUNT, _FINE_LARGEST, _FINE_TOTAL, _FINE_SQUARES, _FINE_A, _FINE_B, _FINE_C = 4, 8, 12, 20, 28, 36, 44
_DAY_COUNT, _DAY_LARGEST, _DAY_TOTAL, _DAY_SQUARES = 2, 6, 10, 18

WorkingSpace = tuple[Int64s, npt.NDArray[np.uint64], Int64s, Int64s, Int64s, Int64s]

_W = len(WINDOWS)
# Windows whose tail is exact come first, and none of the others begins after a shorter one: what lies in one lies in all behind it.
_EXACT = sum(w.tail_ms == 0 for w in WINDOWS)
assert [w.tail_ms for w in WINDOWS] == sorted(w.tail_ms for w in WINDOWS)
assert all(b.length_ms - a.length_ms >= a.tail_ms for a, b in pairwise(WINDOWS))
_LW = len(LABEL_WINDOWS)
_LENGTH = np.array([w.length_ms for w in WINDOWS])
_TAIL = np.array([w.tail_ms for w in WINDOWS])
_LABEL_LENGTH = np.array([w.length_ms for w in LABEL_WINDOWS])
_PAIRS = np.array([e.pairs for e in ENTITIES])
_IS_LABELLED = np.array([e.labelled for e in ENTITIES])
_CAPACITY = np.array([e.head_events_max for e in ENTITIES])
_PAIR_WINDOW = WINDOW_INDEX[PAIR_WINDOW.name]
_LABELLED_PLACE = np.array([LABELLED.index(i) if i in LABELLED else -1 for i in range(ENTITY_COUNT)])

# Each feature as numbers: what is aggregated (the place of its name here), which window, which column.
AGGREGATE_CODES = (
    *("count", "sum", "mean", "max", "std", "ratio", "zscore", "distinct_a", "distinct_b", "distinct_c"),
    *("label_rate", "label_count", "frauds", "new_a", "new_c", "changed_b", "since_last", "speed"),
    *("since_first_fraud", "since_last_fraud", "rate_since_fraud"),
    *("fraud_run", "since_fraud_run", "since_genuine", "payments_after_fraud"),
    *COMPARED_CODES,
)
(_C_COUNT, _C_SUM, _C_MEAN, _C_MAX, _C_STD, _C_RATIO, _C_ZSCORE, _C_A, _C_B, _C_C) = range(10)
(_C_RATE, _C_LABELS, _C_FRAUDS, _C_NEW_A, _C_NEW_C, _C_CHANGED, _C_SINCE, _C_SPEED) = range(10, 18)
(_C_FIRST_FRAUD, _C_LAST_FRAUD, _C_RATE_SINCE) = range(18, 21)
(_C_RUN, _C_RUN_FROM, _C_GENUINE, _C_AFTER) = range(21, 25)
_C_COMPARED = 25
_LONGEST = len(LABEL_WINDOWS) - 1
# (features of the entity, 3): code, window, column; by entity from _FEATURE_FROM[e] to _FEATURE_FROM[e + 1] - 1
_BY_ENTITY = [
    [
        (AGGREGATE_CODES.index(f.aggregate), f.window_index or 0, column)
        for column, f in enumerate(FEATURES)
        if f.entity is not None and ENTITY_INDEX[f.entity] == e
    ]
    for e in range(ENTITY_COUNT)
]
_FEATURE_FROM = np.cumsum([0, *(len(of) for of in _BY_ENTITY)])
_OF_ENTITY = np.array([f for of in _BY_ENTITY for f in of], np.int64)


@compiled
def _begin(t_ms: int, froms: Int64s, label_froms: Int64s) -> None:
    """Where the windows of a transaction begin: once for all of its entities, since a division takes as long as an event does."""
    for w in range(_W):
        begin = t_ms - _LENGTH[w]
        froms[w] = begin if _TAIL[w] == 0 else begin - begin % _TAIL[w]
    for w in range(_LW):
        begin = t_ms - LABEL_DELAY_MS - _LABEL_LENGTH[w]
        label_froms[w] = begin - begin % DAY_MS


@compiled
def _add(
    counts: Int64s, bits: npt.NDArray[np.uint64], w: int, amount: int, dim_a: np.uint64, dim_b: np.uint64, dim_c: np.uint64
) -> None:
    """An event to one window."""
    capped = min(amount, SQUARED_AMOUNT_MINOR_MAX)
    counts[w, 0] += 1
    counts[w, 1] += amount
    counts[w, 2] += capped * capped
    counts[w, 3] = max(counts[w, 3], amount)
    bits[w, 0] |= dim_a
    bits[w, 1] |= dim_b
    bits[w, 2] |= dim_c


@compiled
def _spread(counts: Int64s, bits: npt.NDArray[np.uint64], first: int, end: int) -> None:
    """What was added to the shortest window that it lies in, to those behind it too."""
    for w in range(first + 1, end):
        for i in range(3):
            counts[w, i] += counts[w - 1, i]
            bits[w, i] |= bits[w - 1, i]
        counts[w, 3] = max(counts[w, 3], counts[w - 1, 3])


@compiled
def _entity(
    buf: Bytes,
    entity: int,
    events: int,
    events_end: int,
    tiles: int,
    tiled: int,
    frauds: int,
    frauded: int,
    t_ms: int,
    amount_minor: int,
    seq: int,
    own_a: int,
    own_c: int,
    country: int,
    out: npt.NDArray[np.float32],
    last: Floats,
    counts: Int64s,
    bits: npt.NDArray[np.uint64],
    labels: Int64s,
    by_day: Int64s,
    froms: Int64s,
    label_froms: Int64s,
) -> None:
    """The features of one entity of one transaction into `out` (features,); `last` gets time, latitude, longitude of its last event.

    `counts` (windows, 4): count, total, squares, largest; `bits` (windows, 3); `labels` (2, label windows): payments, frauds; `by_day`
    (2, LABEL_DAYS) the same of each day, filled in where there is a fraud.
    `froms` (windows,) and `label_froms` (label windows,) are the times from which each window counts, its tail rounded down.
    """
    for w in range(_W):
        for i in range(3):
            counts[w, i] = 0
            bits[w, i] = 0
        counts[w, 3] = -1
    for w in range(_LW):
        labels[0, w] = labels[1, w] = 0
    settled = t_ms - SETTLE_MS
    edge = settled - settled % BOUNDARY_MS
    hour_edge, day_edge = edge - edge % HOUR_MS, edge - edge % DAY_MS
    label_end = t_ms - LABEL_DELAY_MS
    fraud_end = label_end - label_end % HOUR_MS
    label_end += DAY_MS - label_end % DAY_MS
    new_a, new_c = True, True
    last_ms, last_seq, last_at = NEVER, -1, -1
    pairs, labelled, capacity = _PAIRS[entity], _IS_LABELLED[entity], _CAPACITY[entity]
    pair_from = froms[_PAIR_WINDOW]

    first_fraud, last_fraud, since_day, payments_since = NEVER, NEVER, t_ms, 0
    label_from = label_froms[_LONGEST]
    if frauded > 0:
        for day in range(LABEL_DAYS):
            by_day[0, day] = by_day[1, day] = 0
    for at in range(frauds + _LABELS, frauds + frauded, _FRAUDS):
        start = u32(buf, at) * HOUR_MS
        count = u16(buf, at + 4)
        if start < fraud_end and count > 0:
            for w in range(_LW):
                if start >= label_froms[w]:
                    labels[1, w] += count
            if start >= label_from:
                by_day[1, (start - label_from) // DAY_MS] += count
                first_fraud = start if first_fraud == NEVER else min(first_fraud, start)
                last_fraud = max(last_fraud, start)
    if first_fraud != NEVER:
        since_day = first_fraud - first_fraud % DAY_MS

    place = -1
    for at in range(events, events_end, _EVENT):
        when = i64(buf, at + _WHEN)
        told = u32(buf, at + _SEQ)
        place = place + 1 if told == SEQ_NEXT else told
        age = seq - place
        # Observed before this transaction and not later by event time.
        if age <= 0 or when > t_ms:
            continue
        recent = age <= capacity
        untiled = buf[at + _TILED] == 0
        loose = recent if when >= edge else untiled
        if recent and (when > last_ms or (when == last_ms and place > last_seq)):
            last_ms, last_seq, last_at = when, place, at
        if labelled and untiled and when < label_end:
            for w in range(_LW):
                if when >= label_froms[w]:
                    labels[0, w] += 1
            payments_since += when >= since_day
            if first_fraud != NEVER and when >= label_from:
                by_day[0, (when - label_from) // DAY_MS] += 1
        if not recent and not loose:
            continue
        amount = u32(buf, at + _AMOUNT)
        dim_a, dim_b, dim_c = u16(buf, at + _DIM_A), u16(buf, at + _DIM_B), u16(buf, at + _DIM_C)
        bit_a = np.uint64(1) << np.uint64(dim_a & 63)
        bit_b = np.uint64(1) << np.uint64(dim_b & 63)
        bit_c = np.uint64(1) << np.uint64(dim_c & 63)
        if recent:
            for w in range(_EXACT):
                if when >= froms[w]:
                    _add(counts, bits, w, amount, bit_a, bit_b, bit_c)
                    break
        if loose:
            for w in range(_EXACT, _W):
                if when >= froms[w]:
                    _add(counts, bits, w, amount, bit_a, bit_b, bit_c)
                    break
            if pairs and when >= pair_from:
                new_a &= (dim_a ^ own_a) & SEEN_HASH_MASK != 0
                new_c &= (dim_c ^ own_c) & SEEN_HASH_MASK != 0
    _spread(counts, bits, 0, _EXACT)
    _spread(counts, bits, _EXACT, _W)

    if tiled > 0:
        fives, hours = u16(buf, tiles + _COUNTS), u16(buf, tiles + _COUNTS + 2)
        days, seens = u16(buf, tiles + _COUNTS + 4), u16(buf, tiles + _COUNTS + 6)
        at = tiles + _TILES
        for i in range(fives + hours):
            is_hour = i >= fives
            start = u32(buf, at) * MINUTE_MS
            if start + (HOUR_MS if is_hour else BOUNDARY_MS) <= edge:
                for w in range(_W):
                    tail = _TAIL[w]
                    # A tile finer than the window's tail counts only in the gap that coarser tiles leave before the boundary.
                    if is_hour:
                        fits = tail == HOUR_MS or (tail == DAY_MS and start >= day_edge)
                    else:
                        fits = tail == BOUNDARY_MS or (tail > BOUNDARY_MS and start >= hour_edge)
                    if not fits or start < froms[w]:
                        continue
                    counts[w, 0] += u32(buf, at + _FINE_COUNT)
                    counts[w, 1] += i64(buf, at + _FINE_TOTAL)
                    counts[w, 2] += i64(buf, at + _FINE_SQUARES)
                    counts[w, 3] = max(counts[w, 3], u32(buf, at + _FINE_LARGEST))
                    bits[w, 0] |= u64(buf, at + _FINE_A)
                    bits[w, 1] |= u64(buf, at + _FINE_B)
                    bits[w, 2] |= u64(buf, at + _FINE_C)
            at += _FINE
        for _ in range(days):
            start = u16(buf, at) * DAY_MS
            count = u32(buf, at + _DAY_COUNT)
            if start + DAY_MS <= edge:
                for w in range(_W):
                    if _TAIL[w] != DAY_MS or start < froms[w]:
                        continue
                    counts[w, 0] += count
                    counts[w, 1] += i64(buf, at + _DAY_TOTAL)
                    counts[w, 2] += i64(buf, at + _DAY_SQUARES)
                    counts[w, 3] = max(counts[w, 3], u32(buf, at + _DAY_LARGEST))
            if labelled and start < label_end:
                for w in range(_LW):
                    if start >= label_froms[w]:
                        labels[0, w] += count
                if start >= since_day:
                    payments_since += count
                if first_fraud != NEVER and start >= label_from:
                    by_day[0, (start - label_from) // DAY_MS] += count
            at += _DAY
        if pairs:
            now_step = t_ms // SEEN_STEP_MS
            wanted_a = own_a & SEEN_HASH_MASK
            wanted_c = own_c & SEEN_HASH_MASK | SEEN_DIM_C
            for _ in range(seens):
                value = u16(buf, at)
                if value == wanted_a or value == wanted_c:
                    # How many steps before the transaction's own; one after it looks as if it were long ago.
                    start = (now_step - (now_step - u16(buf, at + 2)) % SEEN_STEPS) * SEEN_STEP_MS
                    if start + SEEN_STEP_MS <= edge and start >= pair_from:
                        if value == wanted_a:
                            new_a = False
                        else:
                            new_c = False
                at += _SEEN
    if last_at >= 0 and last_ms < t_ms - LAST_MS_MAX:
        last_ms = NEVER
    changed = np.nan
    last[0], last[1], last[2] = NEVER, np.nan, np.nan
    if last_ms != NEVER:
        changed = 1.0 if u16(buf, last_at + _DIM_B) != country else 0.0
        last[0] = last_ms
        last[1] = f32(buf, last_at + _LATITUDE)
        last[2] = f32(buf, last_at + _LONGITUDE)

    run, run_from, genuine_from, after = 0, NEVER, NEVER, 0
    if first_fraud != NEVER:
        run, run_from, genuine_from, after = fraud_run(by_day, label_from)
    amount_float = np.float64(amount_minor)
    for i in range(_FEATURE_FROM[entity], _FEATURE_FROM[entity + 1]):
        code, w, column = _OF_ENTITY[i]
        if code >= _C_COMPARED:
            value = compared(code - _C_COMPARED, w, amount_float, counts)
        elif code >= _C_RATE:
            if code == _C_RATE:
                value = divided(np.float64(labels[1, w]), np.float64(labels[0, w]))
            elif code == _C_LABELS:
                value = np.float64(labels[0, w])
            elif code == _C_FRAUDS:
                value = np.float64(labels[1, w])
            elif code == _C_NEW_A:
                value = 1.0 if new_a else 0.0
            elif code == _C_NEW_C:
                value = 1.0 if new_c else 0.0
            elif code == _C_CHANGED:
                value = changed
            elif code == _C_SINCE and last_ms != NEVER:
                value = (t_ms - last_ms) / 1000.0
            elif code == _C_FIRST_FRAUD and first_fraud != NEVER:
                value = (t_ms - first_fraud) / 1000.0
            elif code == _C_LAST_FRAUD and last_fraud != NEVER:
                value = (t_ms - last_fraud) / 1000.0
            elif code == _C_RATE_SINCE and first_fraud != NEVER:
                value = divided(np.float64(labels[1, _LONGEST]), np.float64(payments_since))
            elif code == _C_RUN:
                value = np.float64(run)
            elif code == _C_RUN_FROM and run_from != NEVER:
                value = (t_ms - run_from) / 1000.0
            elif code == _C_GENUINE and genuine_from != NEVER:
                value = (t_ms - genuine_from) / 1000.0
            elif code == _C_AFTER and first_fraud != NEVER:
                value = np.float64(after)
            else:
                value = np.nan
        elif code >= _C_A:
            value = SKETCH_ESTIMATE[ones(bits[w, code - _C_A])]
        elif code == _C_MAX:
            value = np.nan if counts[w, 3] < 0 else np.float64(counts[w, 3])
        elif code == _C_SUM:
            value = np.float64(counts[w, 1])
        else:
            n = np.float64(counts[w, 0])
            if code == _C_COUNT:
                value = n
            else:
                mean = divided(np.float64(counts[w, 1]), n)
                if code == _C_MEAN:
                    value = mean
                elif code == _C_RATIO:
                    value = divided(amount_float, mean)
                else:
                    spread = np.nan
                    if n >= 2:
                        spread = np.sqrt(max(np.float64(counts[w, 2]) / n - mean * mean, 0.0))
                    value = spread if code == _C_STD else divided(amount_float - mean, spread)
        out[column] = value


def working_space() -> WorkingSpace:
    """Arrays for `decode`, of which one call at a time may have them."""
    return (
        *(np.zeros((_W, 4), np.int64), np.zeros((_W, 3), np.uint64)),
        *(np.zeros((2, _LW), np.int64), np.zeros((2, LABEL_DAYS), np.int64)),
        *(np.zeros(_W, np.int64), np.zeros(_LW, np.int64)),
    )


@compiled
def decode(
    buf: Bytes,
    starts: Int64s,
    sizes: Int64s,
    transactions: npt.NDArray[np.uint64],
    settled: npt.NDArray[np.bool_],
    lengths: Int64s,
    numbers: Int64s,
    checks: npt.NDArray[np.uint32],
    dims: npt.NDArray[np.uint16],
    country: Int64s,
    base_us: int,
    matrix: npt.NDArray[np.float32],
    last: Floats,
    seq: Int64s,
    label_changes: Int64s,
    stale: npt.NDArray[np.bool_],
    refused: npt.NDArray[np.bool_],
    counts: Int64s,
    bits: npt.NDArray[np.uint64],
    labels: Int64s,
    by_day: Int64s,
    froms: Int64s,
    label_froms: Int64s,
) -> None:
    """Decodes what Redis held of a batch.

    `starts` and `sizes` say where in `buf` the tiles of all entities of all rows lie, then the frauds of those that count labels, then the
    heads; a size below 1: there is none.

    Asked: `transactions` (rows * ENTITY_COUNT,), the hash of each row's own, whose place in a head tells what came before it;
    `lengths` and `numbers` of the intake, `checks` (rows * ENTITY_COUNT,), `dims` and `country` of `entity_records`, and the `base_us` of
    heads that are born now. Filled in for rows that aren't `settled`: `matrix` (rows, features), which holds NaN where nothing is
    filled in; `last` (rows * ENTITY_COUNT, 3); `seq` (rows, ENTITY_COUNT), absolute; `label_changes` (rows, labelled entities);
    `stale` (rows,); `refused` (rows * ENTITY_COUNT,), where a value of the entity is none of this layout and key. The arrays from
    `counts` on are those of `working_space`.
    """
    rows = len(numbers)
    # Where each of the three kinds begins.
    tiles_value, frauds_value, head_value = 0, 0, 0
    for row in range(rows):
        for e in range(ENTITY_COUNT):
            if lengths[row, ENTITY_TEXT[e]] >= 0:
                frauds_value += 1
                head_value += _IS_LABELLED[e]
    head_value += frauds_value
    for row in range(rows):
        _begin(numbers[row, 0], froms, label_froms)
        for e in range(ENTITY_COUNT):
            if lengths[row, ENTITY_TEXT[e]] < 0:
                continue
            owner = row * ENTITY_COUNT + e
            tiles, tiled = starts[tiles_value], max(0, sizes[tiles_value])
            tiles_value += 1
            frauds, frauded = 0, 0
            if _IS_LABELLED[e]:
                frauds, frauded = starts[frauds_value], max(0, sizes[frauds_value])
                frauds_value += 1
            head, heads = starts[head_value], max(0, sizes[head_value])
            head_value += 1
            if not settled[row]:
                check = np.int64(checks[owner])
                events, events_end, place = 0, 0, 0
                if not sound_head(buf, e, check, head, heads):
                    refused[owner] = True
                else:
                    base = base_us
                    if heads > 0:
                        base = i64(buf, head + _BASE)
                        events, events_end = head + events_from(heads), head + heads
                        place = place_in(buf, events, events_end, transactions[owner])
                    seq[row, e] = base + place
                    refused[owner] = not sound(buf, e, check, tiles, tiled, frauds, frauded)
                if refused[owner]:
                    stale[row] = True
                else:
                    # Events are missing that were never tiled, or counted that nobody has observed yet.
                    if (heads > 0 and u32(buf, head + _LOST) != 0) or (tiled > 0 and u32(buf, tiles + _EARLY) != 0):
                        stale[row] = True
                    if _LABELLED_PLACE[e] >= 0:
                        label_changes[row, _LABELLED_PLACE[e]] = u32(buf, frauds + 20) if frauded > 0 else 0
                    t_ms, amount_minor = numbers[row, 0], numbers[row, 1]
                    own_a, own_c = np.int64(dims[owner, 0]), np.int64(dims[owner, 2])
                    _entity(
                        *(buf, e, events, events_end, tiles, tiled, frauds, frauded, t_ms, amount_minor, place, own_a, own_c),
                        *(country[row], matrix[row], last[owner], counts, bits, labels, by_day, froms, label_froms),
                    )
