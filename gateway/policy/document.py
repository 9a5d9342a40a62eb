"""A policy as it is written: YAML files, read into structs with the place of every value.

The structs are the published JSON Schema too (gateway/policy/schema.py). Aliases, anchors and tags are refused: nothing in a policy
stands for something written elsewhere. Read once when a policy is loaded: about 0.1 ms a rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta

from gateway.contracts.decision import RISK_SCORE_MAX, Outcome
from gateway.contracts.lists import LISTS_MAX
from gateway.contracts.reasons import Reason
from gateway.contracts.transaction import AMOUNT_MINOR_MAX, TEXT_FIELDS
from gateway.policy.problems import Problems, did_you_mean

POLICY_VERSION = 2
POLICY_FILE = "policy.yaml"
RULES_FOLDER = "rules"
# All bounds of a policy. With these it fits into one record of the audit topic, and loads in under a second.
FILES_MAX = 200
POLICY_BYTES_MAX = 400_000
RULES_MAX = 1000
BANDS_MAX = 50
ALERTS_MAX = 50
WEBHOOKS_MAX = 20
NESTING_MAX = 8
EXPRESSION_LENGTH_MAX = 2000
TEXT_LENGTH_MAX = 500

# What an entry of a list may be compared with: everything that names somebody or some place, not the payment itself.
LIST_FIELDS: tuple[str, ...] = tuple(f for f in TEXT_FIELDS if f != "transaction_id")

# In Python "$" alone matches before a last line break too.
Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)", description="letters, digits, . _ -, at most 64")]
Prose = Annotated[str, Meta(min_length=1, max_length=TEXT_LENGTH_MAX)]
Score = Annotated[int, Meta(ge=1, le=RISK_SCORE_MAX + 1, description=f"a risk score; {RISK_SCORE_MAX + 1} is never reached")]
AmountMinor = Annotated[int, Meta(ge=0, le=AMOUNT_MINOR_MAX, description="minor units of the currency")]


class RuleState(StrEnum):
    """A live rule decides; a shadow rule is evaluated where it would be if it were live, and only told; off is only checked."""

    LIVE = "live"
    SHADOW = "shadow"
    OFF = "off"


class ListKind(StrEnum):
    ALLOW = "allow"
    BLOCK = "block"
    WATCH = "watch"


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Band(_Written, frozen=True):
    """The amounts up to `up_to_minor` (included; null: any), and the least scores of each outcome."""

    up_to_minor: Annotated[int, Meta(ge=1, le=AMOUNT_MINOR_MAX)] | None
    challenge: Score
    review: Score
    decline: Score
    without_model: Annotated[
        Outcome, Meta(description="when neither a model nor features can be had: approve fails open, the others fail closed")
    ]


class ListDeclaration(_Written, frozen=True):
    """A list of values of `field`. Its entries come at run time. `outcome` and `reason` have defaults by kind; an allow list has none."""

    id: Id
    field: Annotated[str, Meta(description="a text field of the transaction", extra_json_schema={"enum": list(LIST_FIELDS)})]
    kind: ListKind
    owner: Prose
    text: Prose
    outcome: Outcome | None = None
    reason: Reason | None = None


class AlertRoute(_Written, frozen=True):
    """Decisions that somebody is told of: of one of `outcomes` (none named: any), by one of `rules` or `lists` (none named: by any
    cause or none), from `amount_minor_least` on. `webhooks` are names; where they lead, and their secrets, stand elsewhere.
    """

    name: Id
    outcomes: list[Outcome] = []
    rules: list[Id] = []
    lists: list[Id] = []
    amount_minor_least: AmountMinor = 0
    webhooks: Annotated[list[Id], Meta(max_length=WEBHOOKS_MAX)] = []

    def takes(self, outcome: Outcome, rule_hits: list[str], list_hits: list[str], amount_minor: int) -> bool:
        """Whether a decision goes this way."""
        if amount_minor < self.amount_minor_least or (self.outcomes and outcome not in self.outcomes):
            return False
        if not self.rules and not self.lists:
            return True
        return any(hit in self.rules for hit in rule_hits) or any(hit in self.lists for hit in list_hits)


class Rule(_Written, frozen=True):
    """`text` is for the analyst. A `hard` rule holds for payments on an allow list too."""

    id: Id
    state: RuleState
    owner: Prose
    text: Prose
    when: Annotated[str, Meta(min_length=1, max_length=EXPRESSION_LENGTH_MAX, description="an expression: docs/policy.md")]
    outcome: Outcome
    reason: Reason
    hard: bool = False


class PolicyFile(_Written, frozen=True):
    """policy.yaml"""

    version: Literal[2]
    name: Prose
    bands: Annotated[list[Band], Meta(min_length=1, max_length=BANDS_MAX)]
    lists: Annotated[list[ListDeclaration], Meta(max_length=LISTS_MAX)] = []
    alerts: Annotated[list[AlertRoute], Meta(max_length=ALERTS_MAX)] = []


class RulesFile(_Written, frozen=True):
    """rules/*.yaml"""

    rules: Annotated[list[Rule], Meta(max_length=RULES_MAX)]


# What people call them.
CALLED: dict[type[msgspec.Struct], str] = {Band: "band", ListDeclaration: "list", AlertRoute: "alert", Rule: "rule"}
S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class Marked(Generic[S]):
    """A struct, the node it was read from, that of each of its values, and the structs within it by field."""

    value: S
    node: yaml.Node
    nodes: dict[str, yaml.Node]
    within: dict[str, list[Marked[Any]]] = field(default_factory=dict)


class Document:
    """One file. What is wrong goes to `problems`, and whatever it is part of is None; `found` are the structs that are right, all kinds."""

    def __init__(self, file: str, data: bytes, problems: Problems) -> None:
        self.file = file
        self.found: list[Marked[Any]] = []
        self._problems = problems
        self._constructor = yaml.constructor.SafeConstructor()
        self.text = ""
        try:
            self.text = data.decode("utf-8")
        except UnicodeDecodeError as exc:
            before = data[: exc.start]
            at = exc.start - before.rfind(b"\n")
            problems.add(file, before.count(b"\n") + 1, at, "not UTF-8")

    def problem(self, node: yaml.Node, text: str) -> None:
        mark = node.start_mark
        self._problems.add(self.file, mark.line + 1, mark.column + 1, text)

    def problem_within(self, node: yaml.Node, offset: int, text: str) -> None:
        """A problem with the character at `offset` of a text that stands at `node`."""
        line, column = self._place_within(node, offset)
        self._problems.add(self.file, line, column, text)

    def _place_within(self, node: yaml.Node, offset: int) -> tuple[int, int]:
        """Line and column, from 1. YAML folds lines and drops indentation, but keeps all that is no white space, in order."""
        at, end = node.start_mark.index, node.end_mark.index
        if isinstance(node, yaml.ScalarNode):
            if node.style in ("|", ">"):
                at = self.text.find("\n", at, end) + 1
            elif node.style in ("'", '"'):
                at += 1
            for c in node.value[:offset]:
                if not c.isspace():
                    at = self.text.find(c, at, end) + 1
            while at < end and self.text[at].isspace():
                at += 1
        return self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)

    def root(self) -> yaml.Node | None:
        """What the file holds."""
        try:
            if not self._plain():
                return None
            node = yaml.compose(self.text, Loader=yaml.CSafeLoader)
        except yaml.MarkedYAMLError as exc:
            mark = exc.problem_mark or exc.context_mark
            line, column = (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
            self._problems.add(self.file, line, column, f"no YAML: {exc.problem or exc.context}")
            return None
        except yaml.YAMLError as exc:
            self._problems.add(self.file, 1, 1, f"no YAML: {str(exc).splitlines()[0]}")
            return None
        if node is None:
            self._problems.add(self.file, 1, 1, "the file is empty")
        return node

    def _plain(self) -> bool:
        """Whether the file is nested no deeper than NESTING_MAX and repeats nothing by an alias. Raises `yaml.YAMLError`."""
        depth = 0
        for event in yaml.parse(self.text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            wrong = ""
            if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor is not None):
                wrong = "anchors and aliases have no place in a policy"
            elif depth > NESTING_MAX:
                wrong = f"nested deeper than {NESTING_MAX}"
            if wrong:
                mark = event.start_mark
                line, column = (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
                self._problems.add(self.file, line, column, wrong)
                return False
        return True

    def struct(self, node: yaml.Node, kind: type[S], what: str) -> Marked[S] | None:
        """What stands at `node` as a `kind`; `what` names it for people. None when anything about it is wrong."""
        known = _fields_of(kind)
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, f"{what} is written as a mapping of {', '.join(known)}")
            return None
        nodes: dict[str, yaml.Node] = {}
        values: dict[str, Any] = {}
        within: dict[str, list[Marked[Any]]] = {}
        right = True
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name not in known or name in nodes:
                hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
                self.problem(key, f"{name} is given twice" if name in nodes else f"{what} has no {name[:64]!r}{hint}")
                right = False
                continue
            nodes[name] = value
            found = self._value(value, known[name].type, f"{what}'s {name}")
            if found is None:
                right = False
            else:
                values[name], within[name] = found
        for name, of in known.items():
            if of.required and name not in nodes:
                self.problem(node, f"{what} lacks {name}")
                right = False
        if not right:
            return None
        marked = Marked(kind(**values), node, nodes, within)
        self.found.append(marked)
        return marked

    def _value(self, node: yaml.Node, kind: Any, what: str) -> tuple[Any, list[Marked[Any]]] | None:
        within = _struct_of(kind)
        if within is not None and isinstance(node, yaml.SequenceNode):
            marked = [self.struct(item, within, f"{CALLED[within]} {i + 1}") for i, item in enumerate(node.value)]
            found = [m for m in marked if m is not None]
            right = self._convert([None] * len(marked), _of_nothing(kind), node, what) is not _REFUSED and len(found) == len(marked)
            return ([m.value for m in found], found) if right else None
        try:
            plain = self._constructor.construct_document(node)
        except (yaml.YAMLError, ValueError, OverflowError):
            self.problem(node, f"{what} can't be read")
            return None
        converted = self._convert(plain, kind, node, what)
        return None if converted is _REFUSED else (converted, [])

    def _convert(self, value: object, kind: Any, node: yaml.Node, what: str) -> Any:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as exc:
            text = str(exc).split(" - at ")[0]
            words = _words_of(kind)
            if words and isinstance(value, str):
                text = f"must be one of {', '.join(words)}{did_you_mean(value, words)}"
            self.problem(node, f"{what}: {text[0].lower()}{text[1:]}")
            return _REFUSED


_REFUSED = object()


@cache
def _fields_of(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """By name. Working them out takes longer than reading a rule by them."""
    return {f.name: f for f in msgspec.structs.fields(kind)}


def _of_nothing(kind: Any) -> Any:
    """A list with the bounds of `kind`, whose items are looked at by themselves."""
    return Annotated[list[None], get_args(kind)[1]] if get_origin(kind) is Annotated else list[None]


def _struct_of(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that `kind` is a list of."""
    bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    args = get_args(bare)
    if get_origin(bare) is list and isinstance(args[0], type) and issubclass(args[0], msgspec.Struct):
        return args[0]
    return None


def _words_of(kind: Any) -> list[str]:
    """The words that a value of `kind` may be, when it is one of some."""
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, StrEnum):
            return [member.value for member in one]
    return []
