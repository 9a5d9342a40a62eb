"""A checked expression: what is left of a rule's text once every name is known and every type is right.

A Test is true, false or unknown of a payment, a Number is a float64 or unknown. Made by gateway/policy/expression.py, compiled by
gateway/policy/program.py, and interpreted row by row by the twin in tests/agreement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
Operation = Literal["+", "-", "*", "/", "neg", "abs", "min", "max"]


@dataclass(frozen=True)
class Constant:
    value: float


@dataclass(frozen=True)
class Feature:
    """By its name; what the model sees, float32."""

    name: str


@dataclass(frozen=True)
class Field:
    """A field of the transaction that is a number."""

    name: str


@dataclass(frozen=True)
class Score:
    """The risk score, unknown without a model."""


@dataclass(frozen=True)
class Arithmetic:
    """`neg` and `abs` have one part, `min` and `max` two or more, the others two."""

    op: Operation
    parts: tuple[Number, ...]


Number = Constant | Feature | Field | Score | Arithmetic


@dataclass(frozen=True)
class TextField:
    name: str


@dataclass(frozen=True)
class Compare:
    op: Comparison
    left: Number
    right: Number


@dataclass(frozen=True)
class OneOfNumbers:
    value: Number
    among: tuple[float, ...]


@dataclass(frozen=True)
class OneOfTexts:
    field: TextField
    among: tuple[str, ...]


@dataclass(frozen=True)
class SameText:
    left: TextField
    right: TextField


@dataclass(frozen=True)
class OnList:
    field: TextField
    list_id: str


@dataclass(frozen=True)
class Known:
    """True or false, never unknown."""

    value: Number | TextField


@dataclass(frozen=True)
class Not:
    part: Test


@dataclass(frozen=True)
class All:
    parts: tuple[Test, ...]


@dataclass(frozen=True)
class Any:
    parts: tuple[Test, ...]


Test = Compare | OneOfNumbers | OneOfTexts | SameText | OnList | Known | Not | All | Any


def leaves(test: Test) -> Iterator[Compare | OneOfNumbers | OneOfTexts | SameText | OnList | Known]:
    """The tests that hold no others, in the order of the text."""
    if isinstance(test, Not):
        yield from leaves(test.part)
    elif isinstance(test, All | Any):
        for part in test.parts:
            yield from leaves(part)
    else:
        yield test
