"""A rule's expression, from its text to a checked tree. Nothing of the text is ever run: it is parsed, and each node is one of a few.

    card_count_5m >= 10 and country != card_country and not (merchant_id in list("trusted"))

The text is looked at thrice: its characters (`_look`: only the language's own, within bounds), its grammar (Python's parser, which for
expressions is just what people expect), and its nodes (`_Checker`: allowed ones, known names, right types). Called when a policy is
loaded; some 50 us an expression.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import get_args

from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.transaction import TEXT_FIELDS
from gateway.policy.document import EXPRESSION_LENGTH_MAX
from gateway.policy.problems import did_you_mean
from gateway.policy.tree import (
    All,
    Any,
    Arithmetic,
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
)
from gateway.policy.vocabulary import DERIVED, FUNCTIONS, NAMES, NUMBER_FIELDS, SCORE, may_be, words_of

# How deep brackets and operators may lie in each other, and how many words and signs an expression may have.
DEPTH_MAX = 32
TOKENS_MAX = 600
# So many mistakes of one expression are told.
MISTAKES_MAX = 5
# A whole number beyond has no exact float64.
INTEGER_MAX = 2**53

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<name>[A-Za-z_]\w*)|(?P<number>(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"""
    r"""|(?P<text>"[ !#-\[\]-~]*"|'[ -&(-\[\]-~]*')|(?P<sign>==|!=|<=|>=|[<>()+\-*/,\[\]])""",
    re.ASCII,
)
_INSTEAD = {"=": "write == to compare", "&": "write and", "|": "write or", "!": "write not", "%": "there is no remainder"}
_COMPARISONS: dict[type[ast.cmpop], Comparison] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
assert set(_COMPARISONS.values()) == set(get_args(Comparison))


class ExpressionError(ValueError):
    """`problems` are pairs of an offset in the expression's text and what is wrong there."""

    def __init__(self, problems: list[tuple[int, str]]) -> None:
        super().__init__("; ".join(f"at {offset}: {text}" for offset, text in problems))
        self.problems = problems


def parse(text: str, lists: Mapping[str, str]) -> Test:
    """The checked tree of `text`. `lists` has the entity field of each declared list. Raises `ExpressionError` with all that is wrong."""
    _look(text)
    begin = len(text) - len(text.lstrip())
    # On one line, so that a column is an offset.
    line = re.sub(r"\s", " ", text[begin:])
    try:
        body = ast.parse(line, mode="eval").body
    except SyntaxError as exc:
        said = "" if exc.msg == "invalid syntax" else f": {exc.msg}"
        raise ExpressionError([(begin + min(max((exc.offset or 1) - 1, 0), len(line)), f"no expression{said}")]) from None
    except (ValueError, MemoryError, RecursionError):
        raise ExpressionError([(begin, "no expression that can be read")]) from None
    checker = _Checker(lists, begin)
    found = checker.test(body, 0)
    if checker.problems:
        raise ExpressionError(checker.problems)
    assert found is not None, "what is None was told"
    return found


def _look(text: str) -> None:
    """Raises `ExpressionError` unless `text` is made of the language's words and signs, within its bounds."""
    if not text.strip():
        raise ExpressionError([(0, "the expression is empty")])
    if len(text) > EXPRESSION_LENGTH_MAX:
        raise ExpressionError([(EXPRESSION_LENGTH_MAX, f"longer than {EXPRESSION_LENGTH_MAX} characters")])
    at = depth = tokens = 0
    last = ""
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ExpressionError([(at, _unknown(text[at]))])
        kind = str(match.lastgroup)
        if kind in ("name", "text", "number") and last in ("name", "text", "number"):
            raise ExpressionError([(at, "a space or an operator is missing before this")])
        last = kind
        if kind != "space":
            tokens += 1
        if match[0] in ("(", "["):
            depth += 1
        elif match[0] in (")", "]"):
            depth -= 1
        if depth > DEPTH_MAX or tokens > TOKENS_MAX:
            raise ExpressionError([(at, f"more than {DEPTH_MAX} brackets in each other, or {TOKENS_MAX} words and signs")])
        at = match.end()


def _unknown(c: str) -> str:
    if c in ("'", '"'):
        return "a text that doesn't end, or holds a backslash or what isn't ASCII"
    shown = c if c.isascii() and c.isprintable() else f"U+{ord(c):04X}"
    return f"{shown} has no place in an expression" + (f": {_INSTEAD[c]}" if c in _INSTEAD else "")


class _Checker:
    """Turns nodes of Python's grammar into our own. What is None is wrong, and was told."""

    def __init__(self, lists: Mapping[str, str], begin: int) -> None:
        self._lists = lists
        self._begin = begin
        self.problems: list[tuple[int, str]] = []

    def _wrong(self, node: ast.expr, text: str) -> None:
        if len(self.problems) < MISTAKES_MAX:
            self.problems.append((self._begin + node.col_offset, text))

    def _too_deep(self, node: ast.expr, depth: int) -> bool:
        if depth > DEPTH_MAX:
            self._wrong(node, f"operators lie deeper than {DEPTH_MAX} in each other")
        return depth > DEPTH_MAX

    def test(self, node: ast.expr, depth: int) -> Test | None:
        """What is true or false."""
        if self._too_deep(node, depth):
            return None
        if isinstance(node, ast.BoolOp):
            found = [self.test(part, depth + 1) for part in node.values]
            parts = tuple(part for part in found if part is not None)
            if len(parts) < len(found):
                return None
            return All(parts) if isinstance(node.op, ast.And) else Any(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            part = self.test(node.operand, depth + 1)
            return None if part is None else Not(part)
        if isinstance(node, ast.Compare):
            return self._compared(node, depth)
        if isinstance(node, ast.Call) and _called(node) == "known":
            return self._known(node, depth)
        value = self._value(node, depth)
        if value is not None:
            what = "a text" if isinstance(value, TextField | str) else "a number"
            self._wrong(node, f"{what} alone is neither true nor false: compare it with something")
        return None

    def _known(self, node: ast.Call, depth: int) -> Test | None:
        if len(node.args) != 1 or node.keywords:
            self._wrong(node, "known(...) takes one field, feature or other number")
            return None
        value = self._value(node.args[0], depth + 1)
        if isinstance(value, str | Constant):
            self._wrong(node.args[0], "a constant is always known")
            return None
        return None if value is None else Known(value)

    def _compared(self, node: ast.Compare, depth: int) -> Test | None:
        """a < b <= c is what it is in mathematics: each of its comparisons."""
        parts: list[Test | None] = []
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                among = self._among(left, right, depth)
                parts.append(Not(among) if among is not None and isinstance(op, ast.NotIn) else among)
            elif type(op) in _COMPARISONS:
                parts.append(self._pair(_COMPARISONS[type(op)], left, right, depth))
            else:
                self._wrong(right, "write == or != to compare")
                parts.append(None)
            left = right
        found = tuple(part for part in parts if part is not None)
        if len(found) < len(parts):
            return None
        return found[0] if len(found) == 1 else All(found)

    def _pair(self, op: Comparison, left_node: ast.expr, right_node: ast.expr, depth: int) -> Test | None:
        left, right = self._value(left_node, depth + 1), self._value(right_node, depth + 1)
        if left is None or right is None:
            return None
        if isinstance(left, str | Constant) and isinstance(right, str | Constant):
            self._wrong(left_node, "compares two constants")
            return None
        left_is_text, right_is_text = isinstance(left, str | TextField), isinstance(right, str | TextField)
        if left_is_text != right_is_text:
            self._wrong(right_node, f"{_named(left_node)} is {_type(left)}, and {_named(right_node)} is {_type(right)}")
            return None
        if not left_is_text:
            assert not isinstance(left, str | TextField)
            assert not isinstance(right, str | TextField)
            return Compare(op, left, right)
        if op not in ("==", "!="):
            self._wrong(left_node, f"texts have no order: {op} compares numbers")
            return None
        same: Test | None
        if isinstance(left, TextField) and isinstance(right, TextField):
            same = SameText(left, right)
        else:
            field, value = (left, right) if isinstance(left, TextField) else (right, left)
            assert isinstance(field, TextField)
            assert isinstance(value, str)
            if not self._may_be(right_node if field is left else left_node, field, value):
                return None
            same = OneOfTexts(field, (value,))
        return Not(same) if op == "!=" else same

    def _may_be(self, node: ast.expr, field: TextField, value: str) -> bool:
        if may_be(field.name, value):
            return True
        words = sorted(words_of(field.name))
        told = f"; it is one of {', '.join(words)}" if 0 < len(words) <= 8 else did_you_mean(value, words)
        self._wrong(node, f"{field.name} is never {value!r}{told}")
        return False

    def _among(self, left_node: ast.expr, right_node: ast.expr, depth: int) -> Test | None:
        """`value in [constants]`, `field in list("id")`."""
        value = self._value(left_node, depth + 1)
        if isinstance(right_node, ast.Call) and _called(right_node) == "list":
            return self._on_list(value, left_node, right_node)
        if not isinstance(right_node, ast.List) or not right_node.elts:
            self._wrong(right_node, '`in` is followed by constants in square brackets, or by list("id")')
            return None
        found = [self._value(item, depth + 1) for item in right_node.elts]
        if value is None or any(item is None for item in found):
            return None
        if isinstance(value, str | Constant):
            self._wrong(left_node, "a constant is looked for among constants")
            return None
        right = True
        for item, node in zip(found, right_node.elts, strict=True):
            if not isinstance(item, str | Constant):
                self._wrong(node, "only constants stand in square brackets")
                right = False
            elif isinstance(item, str) != isinstance(value, TextField):
                self._wrong(node, f"{_named(left_node)} is {_type(value)}, and {_named(node)} is {_type(item)}")
                right = False
            elif isinstance(item, str):
                assert isinstance(value, TextField)
                right &= self._may_be(node, value, item)
        if not right:
            return None
        if isinstance(value, TextField):
            return OneOfTexts(value, tuple(sorted({item for item in found if isinstance(item, str)})))
        return OneOfNumbers(value, tuple(sorted({item.value for item in found if isinstance(item, Constant)})))

    def _on_list(self, value: Number | TextField | str | None, left_node: ast.expr, node: ast.Call) -> Test | None:
        argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
            self._wrong(node, 'list(...) takes the id of a list, in quotation marks: list("trusted")')
            return None
        list_id = argument.value
        of = self._lists.get(list_id)
        if of is None:
            hint = did_you_mean(list_id, self._lists)
            self._wrong(argument, f"the policy declares no list {list_id!r}{hint}")
            return None
        if value is None:
            return None
        if value != TextField(of):
            self._wrong(left_node, f"the list {list_id!r} holds values of {of}: {of} in list({list_id!r})")
            return None
        return OnList(TextField(of), list_id)

    def _value(self, node: ast.expr, depth: int) -> Number | TextField | str | None:
        """A number, a text field or a constant text."""
        if self._too_deep(node, depth):
            return None
        if isinstance(node, ast.Name):
            return self._named_value(node)
        if isinstance(node, ast.Constant):
            return self._constant(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            part = self._number(node.operand, depth + 1)
            if part is None or isinstance(node.op, ast.UAdd):
                return part
            return Constant(-part.value) if isinstance(part, Constant) else Arithmetic("neg", (part,))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            left, right = self._number(node.left, depth + 1), self._number(node.right, depth + 1)
            if left is None or right is None:
                return None
            if isinstance(node.op, ast.Div) and right == Constant(0.0):
                self._wrong(node.right, "nothing can be divided by 0")
                return None
            return Arithmetic(_OPERATIONS[type(node.op)], (left, right))  # type: ignore[arg-type]
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        if isinstance(node, ast.BoolOp | ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            self._wrong(node, "this is true or false where a number or a text is needed")
        else:
            self._wrong(node, "this has no place in an expression")
        return None

    def _number(self, node: ast.expr, depth: int) -> Number | None:
        value = self._value(node, depth)
        if isinstance(value, str | TextField):
            self._wrong(node, f"{_named(node)} is a text where a number is needed")
            return None
        return value

    def _named_value(self, node: ast.Name) -> Number | TextField | None:
        name = node.id
        if name in TEXT_FIELDS:
            return TextField(name)
        if name in NUMBER_FIELDS:
            return Field(name)
        if name in FEATURE_INDEX:
            return Feature(name)
        if name == SCORE:
            return Score()
        if name in DERIVED:
            return DERIVED_TREES[name]
        if name in FUNCTIONS:
            self._wrong(node, f"{name} is a function: {name}(...)")
        else:
            hint = did_you_mean(name, NAMES) if len(self.problems) < MISTAKES_MAX else ""
            self._wrong(node, f"there is no field or feature {name}{hint}")
        return None

    def _constant(self, node: ast.Constant) -> Constant | str | None:
        value = node.value
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong(node, f"{value!r} has no place in an expression")
            return None
        if not math.isfinite(value) or (isinstance(value, int) and value > INTEGER_MAX):
            self._wrong(node, f"the number is too large: at most {INTEGER_MAX}")
            return None
        return Constant(float(value))

    def _call(self, node: ast.Call, depth: int) -> Number | None:
        name = _called(node)
        if name not in ("abs", "min", "max"):
            what = {"known": "known(...) is true or false", "list": 'list("id") stands behind `in`'}.get(name)
            self._wrong(node, what or f"there is no function {name or 'of this kind'}{did_you_mean(name, FUNCTIONS)}")
            return None
        count = len(node.args)
        if node.keywords or (count != 1 if name == "abs" else count < 2):
            self._wrong(node, "abs takes one number" if name == "abs" else f"{name} takes two numbers or more")
            return None
        found = [self._number(part, depth + 1) for part in node.args]
        parts = tuple(part for part in found if part is not None)
        return Arithmetic(name, parts) if len(parts) == count else None  # type: ignore[arg-type]


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _named(node: ast.expr) -> str:
    """For a message, what stands at a node."""
    return node.id if isinstance(node, ast.Name) else repr(node.value) if isinstance(node, ast.Constant) else "the other"


def _type(value: Number | TextField | str) -> str:
    return "a text" if isinstance(value, str | TextField) else "a number"


def _derived() -> dict[str, Number]:
    found: dict[str, Number] = {}
    for name, text in DERIVED.items():
        test = parse(f"{text} == score", {})
        assert isinstance(test, Compare)
        found[name] = test.left
    return found


DERIVED_TREES = _derived()
