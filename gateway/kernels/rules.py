"""The policy of a whole batch: lists, rules and scores of every row, in one call. Called by gateway/policy/policy.py.

Rules come as a program (gateway/policy/program.py), not as machine code, so that another policy needs no compiler. An instruction is six
int32: operation, two operands, and where to go on when its test is true, false or unknown. It only ever goes on further down, so a rule
ends after at most as many steps as it has instructions. Numbers are on a stack of STACK_MAX.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.contracts.decision import SEVERITY, Outcome
from gateway.kernels.compiled import allocating, compiled
from gateway.kernels.intake import Floats, Int64s
from gateway.kernels.raw import Bytes

Int32s = npt.NDArray[np.int32]

# Numbers: what they push on the stack in the place of what they take. Then tests, which take numbers from the stack but for those of a
# feature with a constant, of texts and of lists.
LOAD_CONSTANT, LOAD_FEATURE, LOAD_FIELD, LOAD_SCORE, NEGATE, ABSOLUTE, ADD, SUBTRACT, MULTIPLY, DIVIDE, LEAST, GREATEST = range(12)
EQUAL, UNEQUAL, LESS, AT_MOST, MORE, AT_LEAST = range(12, 18)
KNOWN_NUMBER, ONE_OF_NUMBERS, KNOWN_TEXT, ONE_OF_TEXTS, SAME_TEXT, ON_LIST = range(18, 24)
# Operand a is the feature, operand b the constant; in the order of the tests of two numbers above.
FEATURE_EQUAL, FEATURE_UNEQUAL, FEATURE_LESS, FEATURE_AT_MOST, FEATURE_MORE, FEATURE_AT_LEAST = range(24, 30)
FIRST_TEST, FIRST_FEATURE_TEST = EQUAL, FEATURE_EQUAL
# Where a rule ends; it fails at what can't be worked out. All other places are indices of instructions.
FIRES, FIRES_NOT, FAILS = -1, -2, -3
STACK_MAX = 64
# What a field that is a number has for operand: its column in the intake's `numbers`, or 2 + that in `places`.
FIELD_OPERAND = {"event_time_ms": 0, "amount_minor": 1, "latitude": 2, "longitude": 3}
# Kinds of hits.
HIT_LIST, HIT_RULE, HIT_SHADOW, HIT_ERROR = range(4)
# Kinds of lists.
ALLOW, BLOCK, WATCH = range(3)
# Flags of rules.
IS_SHADOW, IS_HARD = 1, 2
DECLINE = SEVERITY[Outcome.DECLINE]
UNKNOWN, FALSE, TRUE = -1, 0, 1
# What rules a row is open to: one that is blocked to none, one that is allowed to hard ones. Only where to all, the score is asked too.
NO_RULES, HARD_RULES, ALL_RULES = range(3)


@compiled
def _hit(hits: Int64s, count: int, row: int, kind: int, index: int) -> int:
    if count < len(hits):
        hits[count, 0] = row
        hits[count, 1] = kind
        hits[count, 2] = index
    return count + 1


@compiled
def _order(buf: Bytes, at: int, length: int, texts: Bytes, begin: int, end: int) -> int:
    """Below, 0 or above 0 as the text in `buf` comes before, is, or comes after the other: the shorter first, then by bytes."""
    if length != end - begin:
        return length - (end - begin)
    for i in range(length):
        if buf[at + i] != texts[begin + i]:
            return np.int64(buf[at + i]) - np.int64(texts[begin + i])
    return 0


@compiled
def _text_among(buf: Bytes, at: int, length: int, texts: Bytes, edges: Int64s, first: int, last: int) -> bool:
    """Whether it is one of the constant texts `first` to `last` - 1, which are in order."""
    while first < last:
        middle = (first + last) // 2
        found = _order(buf, at, length, texts, edges[middle], edges[middle + 1])
        if found == 0:
            return True
        if found < 0:
            last = middle
        else:
            first = middle + 1
    return False


@compiled
def _number_among(value: float, constants: Floats, first: int, last: int) -> bool:
    while first < last:
        middle = (first + last) // 2
        if constants[middle] == value:
            return True
        if value < constants[middle]:
            last = middle
        else:
            first = middle + 1
    return False


@compiled
def _compared(op: int, x: float, y: float) -> int:
    """The test `op` of two numbers, UNKNOWN where either is."""
    if np.isnan(x) or np.isnan(y):
        return UNKNOWN
    if op == MORE:
        return np.int64(x > y)
    if op == AT_LEAST:
        return np.int64(x >= y)
    if op == LESS:
        return np.int64(x < y)
    if op == AT_MOST:
        return np.int64(x <= y)
    if op == EQUAL:
        return np.int64(x == y)
    return np.int64(x != y)


@compiled
def _calculated(op: int, x: float, y: float) -> float:
    """NaN where either is unknown. What isn't finite of + - * / is an error."""
    if np.isnan(x) or np.isnan(y):
        return np.nan
    if op == ADD:
        return x + y
    if op == SUBTRACT:
        return x - y
    if op == MULTIPLY:
        return x * y
    if op == DIVIDE:
        return x / y
    if op == LEAST:
        return min(x, y)
    return max(x, y)


@compiled
def _rules(
    code: Int32s,
    entries: Int64s,
    rule_severity: Int64s,
    rule_flags: Int64s,
    constants: Floats,
    texts: Bytes,
    text_edges: Int64s,
    sets: Int64s,
    list_bits: Int64s,
    list_columns: Int64s,
    buf: Bytes,
    starts: Int64s,
    lengths: Int64s,
    numbers: Int64s,
    places: Floats,
    rows: Int64s,
    matrix: npt.NDArray[np.float32],
    score: Floats,
    masks: Int64s,
    open_to: Int64s,
    ruled: Int64s,
    hits: Int64s,
    count: int,
    stack: Floats,
) -> int:
    """Every rule of every row that is open to it. Rule by rule, so that the processor guesses well what comes next. Returns the hits.

    One function with all of it: handing the arrays on costs more than most rules do.
    """
    for r in range(len(entries)):
        first, flags = entries[r], rule_flags[r]
        for k in range(len(rows)):
            if open_to[k] != ALL_RULES and (open_to[k] == NO_RULES or not flags & IS_HARD):
                continue
            at = first
            top = 0
            while at >= 0:
                op, a, b = code[at, 0], code[at, 1], code[at, 2]
                if op >= FIRST_FEATURE_TEST:
                    found = _compared(op - FEATURE_EQUAL + EQUAL, np.float64(matrix[k, a]), constants[b])
                elif op < FIRST_TEST:
                    at += 1
                    if op == LOAD_CONSTANT:
                        stack[top] = constants[a]
                        top += 1
                    elif op == LOAD_FEATURE:
                        stack[top] = matrix[k, a]
                        top += 1
                    elif op == LOAD_FIELD:
                        stack[top] = np.float64(numbers[rows[k], a]) if a < 2 else places[rows[k], a - 2]
                        top += 1
                    elif op == LOAD_SCORE:
                        stack[top] = score[k]
                        top += 1
                    elif op == NEGATE:
                        stack[top - 1] = -stack[top - 1]
                    elif op == ABSOLUTE:
                        stack[top - 1] = abs(stack[top - 1])
                    else:
                        top -= 1
                        x, y = stack[top - 1], stack[top]
                        z = _calculated(op, x, y)
                        if op <= DIVIDE and not np.isfinite(z) and not (np.isnan(x) or np.isnan(y)):
                            at = FAILS
                        stack[top - 1] = z
                    continue
                elif op <= AT_LEAST:
                    top -= 2
                    found = _compared(op, stack[top], stack[top + 1])
                elif op == KNOWN_NUMBER:
                    top -= 1
                    found = FALSE if np.isnan(stack[top]) else TRUE
                elif op == ONE_OF_NUMBERS:
                    top -= 1
                    found = UNKNOWN if np.isnan(stack[top]) else np.int64(_number_among(stack[top], constants, a, b))
                elif op == KNOWN_TEXT:
                    found = np.int64(lengths[rows[k], a] >= 0)
                elif lengths[rows[k], a] < 0:
                    found = UNKNOWN
                elif op == ONE_OF_TEXTS:
                    row = rows[k]
                    found = np.int64(_text_among(buf, starts[row, a], lengths[row, a], texts, text_edges, sets[b], sets[b + 1]))
                elif op == SAME_TEXT:
                    row, at_b = rows[k], starts[rows[k], b]
                    found = UNKNOWN
                    if lengths[row, b] >= 0:
                        found = np.int64(_order(buf, starts[row, a], lengths[row, a], buf, at_b, at_b + lengths[row, b]) == 0)
                else:
                    found = np.int64((masks[k, list_columns[b]] & list_bits[b]) != 0)
                at = code[at, 3] if found == TRUE else code[at, 4] if found == FALSE else code[at, 5]
            if at == FAILS:
                count = _hit(hits, count, k, HIT_ERROR, r)
            elif at == FIRES and flags & IS_SHADOW:
                count = _hit(hits, count, k, HIT_SHADOW, r)
            elif at == FIRES:
                count = _hit(hits, count, k, HIT_RULE, r)
                ruled[k] = max(ruled[k], rule_severity[r])
    return count


@compiled
def _lists(
    list_bits: Int64s,
    list_columns: Int64s,
    list_kinds: Int64s,
    list_severity: Int64s,
    masks: Int64s,
    open_to: Int64s,
    ruled: Int64s,
    hits: Int64s,
) -> int:
    """What the lists ask for, `ruled` (n,), and which rules each row is still open to. Returns the hits."""
    count = 0
    for k in range(len(masks)):
        blocked, watched, allowed = -1, 0, False
        for i in range(len(list_bits)):
            if masks[k, list_columns[i]] & list_bits[i]:
                count = _hit(hits, count, k, HIT_LIST, i)
                if list_kinds[i] == BLOCK:
                    blocked = max(blocked, list_severity[i])
                elif list_kinds[i] == WATCH:
                    watched = max(watched, list_severity[i])
                else:
                    allowed = True
        ruled[k] = max(blocked, watched)
        open_to[k] = NO_RULES if blocked == DECLINE else HARD_RULES if allowed and blocked < 0 else ALL_RULES
    return count


@allocating
def decide_rows(
    code: Int32s,
    entries: Int64s,
    rule_severity: Int64s,
    rule_flags: Int64s,
    constants: Floats,
    texts: Bytes,
    text_edges: Int64s,
    sets: Int64s,
    list_bits: Int64s,
    list_columns: Int64s,
    list_kinds: Int64s,
    list_severity: Int64s,
    band_edges: Int64s,
    thresholds: Floats,
    without_model: Int64s,
    buf: Bytes,
    starts: Int64s,
    lengths: Int64s,
    numbers: Int64s,
    places: Floats,
    rows: Int64s,
    matrix: npt.NDArray[np.float32],
    score: Floats,
    masks: Int64s,
    has_features: bool,
    by_row: Int64s,
    floors: Floats,
    hits: Int64s,
) -> int:
    """Decide `rows` (n,) of a batch, in the order of docs/policy.md. Returns the count of hits, of which `hits` has as many as it holds.

    By rule, most severe first: `entries`, the index of its first instruction, its outcome's severity, its flags. By list: its bit in the
    masks (0: nothing stands on it), its column of `masks` (n, fields), its kind, its severity. By band: the amounts that all but the last
    end with, `thresholds` (bands, 3), the severity without a model. `starts`, `lengths`, `numbers` and `places` are the intake's columns of
    the whole batch, `matrix` (n, features) and `score` (n,) of the rows.

    Filled in: `by_row` (4, n), the severity, what the score asked for, the most that a list or a live rule asked for, and which rules were
    asked; `floors` (n, 3). A hit is (row, kind, index of the list or rule): first all of lists, then those of each rule.
    """
    severity, by_score, ruled, open_to = by_row[0], by_row[1], by_row[2], by_row[3]
    count = _lists(list_bits, list_columns, list_kinds, list_severity, masks, open_to, ruled, hits)
    count = _rules(
        *(code, entries, rule_severity, rule_flags, constants, texts, text_edges, sets, list_bits, list_columns),
        *(buf, starts, lengths, numbers, places, rows, matrix, score, masks, open_to, ruled, hits, count, np.empty(STACK_MAX)),
    )
    for k in range(len(rows)):
        band = 0
        while band < len(band_edges) and numbers[rows[k], 1] > band_edges[band]:
            band += 1
        asked = 0
        for i in range(3):
            floors[k, i] = thresholds[band, i]
            if score[k] >= thresholds[band, i]:
                asked += 1
        if not has_features and np.isnan(score[k]):
            asked = without_model[band]
        if open_to[k] != ALL_RULES:
            asked = 0
        by_score[k] = asked
        severity[k] = max(asked, ruled[k])
    return count
