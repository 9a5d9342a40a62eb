"""Rules as a program for gateway/kernels/rules.py: arrays of instructions, constants and texts. Made when a policy is loaded.

A rule fires when its expression is certainly true. "Certainly true" and "certainly false" are followed down to the single tests, where a
negation swaps the two and unknown is neither: so `not (x > 1)` is certain where x <= 1 is, and never of an unknown x. `and` and `or` are
followed from left to right and no further than needed, so that a test can guard the next: `y > 0 and x / y > 3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import FEATURE_INDEX
from gateway.kernels import rules as kernel
from gateway.kernels.intake import TEXT_INDEX
from gateway.policy.tree import (
    All,
    Any,
    Compare,
    Comparison,
    Constant,
    Feature,
    Field,
    Known,
    Not,
    Number,
    OneOfNumbers,
    OneOfTexts,
    OnList,
    SameText,
    Score,
    Test,
    TextField,
    leaves,
)

TESTS: dict[Comparison, int] = {
    "==": kernel.EQUAL,
    "!=": kernel.UNEQUAL,
    "<": kernel.LESS,
    "<=": kernel.AT_MOST,
    ">": kernel.MORE,
    ">=": kernel.AT_LEAST,
}
FLIPPED: dict[Comparison, Comparison] = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_OPERATIONS = {
    "+": kernel.ADD,
    "-": kernel.SUBTRACT,
    "*": kernel.MULTIPLY,
    "/": kernel.DIVIDE,
    "min": kernel.LEAST,
    "max": kernel.GREATEST,
    "neg": kernel.NEGATE,
    "abs": kernel.ABSOLUTE,
}


@dataclass(frozen=True)
class Program:
    """What the kernel's arguments of the same names are."""

    code: npt.NDArray[np.int32]
    entries: npt.NDArray[np.int64]
    constants: npt.NDArray[np.float64]
    texts: npt.NDArray[np.uint8]
    text_edges: npt.NDArray[np.int64]
    sets: npt.NDArray[np.int64]


class _Label:
    """A place in the program that isn't known yet."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at


_FIRES, _FIRES_NOT = _Label(kernel.FIRES), _Label(kernel.FIRES_NOT)


def compile_rules(tests: Sequence[Test], lists: Mapping[str, int]) -> Program:
    """One program of all `tests`, in their order. `lists` has the place of each declared list."""
    compiler = _Compiler(lists)
    entries = []
    for test in tests:
        entries.append(len(compiler.code))
        compiler.test(test, True, _FIRES, _FIRES_NOT)
    return compiler.program(entries)


class _Compiler:
    def __init__(self, lists: Mapping[str, int]) -> None:
        self._lists = lists
        self.code: list[tuple[int, int, int, _Label, _Label, _Label]] = []
        self._constants: list[float] = []
        self._texts: list[bytes] = []
        self._sets: list[int] = [0]
        self._single: dict[float, int] = {}

    def test(self, test: Test, wanted: bool, yes: _Label, no: _Label) -> None:
        """Go on at `yes` where `test` is certainly what is `wanted`, else at `no`."""
        if isinstance(test, Not):
            self.test(test.part, not wanted, yes, no)
        elif isinstance(test, All | Any):
            # Certainly all, or certainly not any: each must be. Else one is enough.
            each = isinstance(test, All) == wanted
            for part in test.parts[:-1]:
                further = _Label()
                self.test(part, wanted, further if each else yes, no if each else further)
                further.at = len(self.code)
            self.test(test.parts[-1], wanted, yes, no)
        else:
            op, a, b = self._leaf(test)
            self.code.append((op, a, b, yes if wanted else no, no if wanted else yes, no))

    def _leaf(self, test: Compare | OneOfNumbers | OneOfTexts | SameText | OnList | Known) -> tuple[int, int, int]:
        """The instruction of a single test, after those of its numbers."""
        if isinstance(test, Compare):
            return self._compare(test)
        if isinstance(test, OneOfNumbers):
            self._number(test.value)
            first = len(self._constants)
            self._constants += sorted(test.among)
            return kernel.ONE_OF_NUMBERS, first, len(self._constants)
        if isinstance(test, OneOfTexts):
            self._texts += sorted((text.encode() for text in test.among), key=lambda text: (len(text), text))
            self._sets.append(len(self._texts))
            return kernel.ONE_OF_TEXTS, TEXT_INDEX[test.field.name], len(self._sets) - 2
        if isinstance(test, SameText):
            return kernel.SAME_TEXT, TEXT_INDEX[test.left.name], TEXT_INDEX[test.right.name]
        if isinstance(test, OnList):
            return kernel.ON_LIST, TEXT_INDEX[test.field.name], self._lists[test.list_id]
        if isinstance(test.value, TextField):
            return kernel.KNOWN_TEXT, TEXT_INDEX[test.value.name], 0
        self._number(test.value)
        return kernel.KNOWN_NUMBER, 0, 0

    def _compare(self, test: Compare) -> tuple[int, int, int]:
        op, left, right = test.op, test.left, test.right
        if isinstance(left, Constant):
            op, left, right = FLIPPED[op], right, left
        if isinstance(left, Feature) and isinstance(right, Constant):
            of_feature = TESTS[op] - kernel.EQUAL + kernel.FEATURE_EQUAL
            return of_feature, FEATURE_INDEX[left.name], self._constant(right.value)
        self._number(left)
        self._number(right)
        return TESTS[op], 0, 0

    def _constant(self, value: float) -> int:
        if value not in self._single:
            self._single[value] = len(self._constants)
            self._constants.append(value)
        return self._single[value]

    def _number(self, number: Number) -> None:
        """Instructions that push it on the stack."""
        if isinstance(number, Constant):
            self._push(kernel.LOAD_CONSTANT, self._constant(number.value))
        elif isinstance(number, Feature):
            self._push(kernel.LOAD_FEATURE, FEATURE_INDEX[number.name])
        elif isinstance(number, Field):
            self._push(kernel.LOAD_FIELD, kernel.FIELD_OPERAND[number.name])
        elif isinstance(number, Score):
            self._push(kernel.LOAD_SCORE)
        else:
            self._number(number.parts[0])
            for part in number.parts[1:]:
                self._number(part)
                self._push(_OPERATIONS[number.op])
            if len(number.parts) == 1:
                self._push(_OPERATIONS[number.op])

    def _push(self, op: int, a: int = 0) -> None:
        """An instruction of a number, after which the next one follows."""
        following = _Label(len(self.code) + 1)
        self.code.append((op, a, 0, following, following, following))

    def program(self, entries: list[int]) -> Program:
        code = np.zeros((len(self.code), 6), np.int32)
        top = 0
        for i, (op, a, b, *labels) in enumerate(self.code):
            targets = [label.at for label in labels]
            assert all(at is not None and (i < at < len(self.code) or at in (kernel.FIRES, kernel.FIRES_NOT)) for at in targets)
            # The numbers of a test stand right before it.
            top = 0 if op >= kernel.FIRST_TEST else top + 1 if op <= kernel.LOAD_SCORE else top - 1 if op >= kernel.ADD else top
            assert top <= kernel.STACK_MAX, "an expression is never so deep"
            code[i] = (op, a, b, *(at for at in targets if at is not None))
        return Program(
            code=code,
            entries=np.array(entries, np.int64),
            constants=np.array(self._constants, np.float64),
            texts=np.frombuffer(b"".join(self._texts), np.uint8),
            text_edges=np.cumsum([0, *map(len, self._texts)], dtype=np.int64),
            sets=np.array(self._sets, np.int64),
        )


def compare_values(test: Test) -> list[tuple[str, float]]:
    """Each feature that `test` compares with constants, the amount by its field too, with each of them."""
    found: list[tuple[str, float]] = []
    for leaf in leaves(test):
        if isinstance(leaf, Compare):
            left, right = (leaf.right, leaf.left) if isinstance(leaf.left, Constant) else (leaf.left, leaf.right)
            values = [right.value] if isinstance(right, Constant) else []
        elif isinstance(leaf, OneOfNumbers):
            left, values = leaf.value, list(leaf.among)
        else:
            continue
        if isinstance(left, Feature | Field) and left.name in FEATURE_INDEX:
            found += [(left.name, value) for value in values]
    return found
