"""A policy's files as one: bands, lists, alert routes and rules, each checked against the others. All problems are told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from gateway.contracts.decision import Outcome
from gateway.errors import PolicyRefusedError
from gateway.policy.document import (
    FILES_MAX,
    LIST_FIELDS,
    POLICY_BYTES_MAX,
    POLICY_FILE,
    RULES_FOLDER,
    RULES_MAX,
    AlertRoute,
    Band,
    Document,
    ListDeclaration,
    ListKind,
    Marked,
    PolicyFile,
    Rule,
    RulesFile,
)
from gateway.policy.expression import ExpressionError, parse
from gateway.policy.folder import HOW_TO_WRITE
from gateway.policy.problems import Problems, did_you_mean
from gateway.policy.tree import Test

T = TypeVar("T", ListDeclaration, AlertRoute, Rule)
DEFAULT_OUTCOME: dict[ListKind, Outcome] = {
    ListKind.BLOCK: Outcome.DECLINE,
    ListKind.WATCH: Outcome.REVIEW,
    ListKind.ALLOW: Outcome.APPROVE,
}


@dataclass(frozen=True)
class Declared:
    """`rules` are in the order of the files' names and of the text, each with its checked expression and the file it stands in."""

    name: str
    bands: tuple[Band, ...]
    lists: tuple[ListDeclaration, ...]
    alerts: tuple[AlertRoute, ...]
    rules: tuple[tuple[Rule, Test, str], ...]


def declared(files: Mapping[str, bytes], source: str) -> Declared:
    """What `files` declare, by their names in the folder. Raises `PolicyRefusedError`; `source` is where they came from."""
    if len(files) > FILES_MAX or sum(map(len, files.values())) > POLICY_BYTES_MAX:
        raise PolicyRefusedError(f"{source}: more than {FILES_MAX} files or {POLICY_BYTES_MAX} bytes")
    reader = _Reader()
    if POLICY_FILE not in files:
        reader.problems.add(POLICY_FILE, 1, 1, "the file is missing")
    for name, data in sorted(files.items()):
        if name == POLICY_FILE:
            reader.policy_file(name, data)
        elif name.startswith(f"{RULES_FOLDER}/") and name.endswith(".yaml"):
            reader.rules_file(name, data)
        else:
            reader.problems.add(name, 1, 1, f"a policy has {POLICY_FILE} and {RULES_FOLDER}/*.yaml")
    found = reader.checked()
    reader.problems.raise_any(source)
    assert found is not None, "what is None was told"
    return found


@dataclass
class _Reader:
    problems: Problems = field(default_factory=Problems)
    _policy: Document | None = None
    _whole: PolicyFile | None = None
    _rules: list[tuple[Document, Marked[Rule]]] = field(default_factory=list)
    # Some rule can't be read, so that its id isn't known.
    _rules_lack: bool = False

    def policy_file(self, name: str, data: bytes) -> None:
        document = Document(name, data, self.problems)
        root = document.root()
        if root is None:
            return
        if isinstance(root, yaml.MappingNode):
            for key, value in root.value:
                if key.value == "version" and value.value == "1":
                    document.problem(value, f"version 1 is no longer read: {HOW_TO_WRITE}")
                    return
                if key.value == "rules":
                    document.problem(key, f"rules stand in files of their own, {RULES_FOLDER}/*.yaml")
                    return
        found = document.struct(root, PolicyFile, "policy")
        self._policy = document
        if found is not None:
            self._whole = found.value
            self._bands(document, found.within["bands"])

    def rules_file(self, name: str, data: bytes) -> None:
        document = Document(name, data, self.problems)
        root = document.root()
        self._rules_lack |= root is None or document.struct(root, RulesFile, "file") is None
        self._rules += [(document, marked) for marked in document.found if isinstance(marked.value, Rule)]

    def checked(self) -> Declared | None:
        """Everything, None when any of it is wrong."""
        if len(self._rules) > RULES_MAX:
            document, rule = self._rules[RULES_MAX]
            document.problem(rule.node, f"more than {RULES_MAX} rules")
            return None
        lists: dict[str, str] | None = None
        if self._policy is not None:
            document = self._policy
            declarations = [m for m in document.found if isinstance(m.value, ListDeclaration)]
            routes = [m for m in document.found if isinstance(m.value, AlertRoute)]
            self._unique([(document, m) for m in declarations], "id")
            self._unique([(document, m) for m in routes], "name")
            for declaration in declarations:
                self._list(document, declaration)
            # Where one can't be read nobody knows which lists there are.
            lists = {m.value.id: m.value.field for m in declarations} if self._whole is not None else None
            for route in routes:
                self._alert(document, route, lists)
        self._unique(list(self._rules), "id")
        rules = [self._rule(document, rule, lists) for document, rule in self._rules if not self.problems.enough]
        if self._whole is None or self.problems.found:
            return None
        return Declared(
            name=self._whole.name,
            bands=tuple(self._whole.bands),
            lists=tuple(self._whole.lists),
            alerts=tuple(self._whole.alerts),
            rules=tuple(rule for rule in rules if rule is not None),
        )

    def _unique(self, marked: list[tuple[Document, Marked[Any]]], name: str) -> None:
        seen: set[str] = set()
        for document, found in marked:
            value = getattr(found.value, name)
            if value in seen:
                document.problem(found.nodes[name], f"the {name} {value!r} is given twice")
            seen.add(value)

    def _bands(self, document: Document, bands: list[Marked[Band]]) -> None:
        last = 0
        for i, found in enumerate(bands):
            band, nodes = found.value, found.nodes
            if (band.up_to_minor is None) != (i == len(bands) - 1):
                which = "the last band has" if band.up_to_minor is not None else "only the last band has"
                document.problem(nodes["up_to_minor"], f"{which} up_to_minor: null")
            elif band.up_to_minor is not None and band.up_to_minor <= last:
                document.problem(nodes["up_to_minor"], f"up_to_minor must rise from band to band: the one before has {last}")
            last = band.up_to_minor or last
            if band.review < band.challenge:
                document.problem(nodes["review"], "scores must rise from challenge to review to decline")
            if band.decline < band.review:
                document.problem(nodes["decline"], "scores must rise from challenge to review to decline")

    def _list(self, document: Document, found: Marked[ListDeclaration]) -> None:
        declaration, nodes = found.value, found.nodes
        if declaration.field not in LIST_FIELDS:
            hint = did_you_mean(declaration.field, LIST_FIELDS)
            document.problem(nodes["field"], f"must be one of {', '.join(LIST_FIELDS)}{hint}")
        if declaration.kind is ListKind.ALLOW:
            for name in ("outcome", "reason"):
                if name in nodes:
                    document.problem(nodes[name], f"an allow list has no {name}: it keeps rules and score from asking for one")
        elif declaration.kind is ListKind.BLOCK and declaration.outcome is Outcome.APPROVE:
            document.problem(nodes["outcome"], "a block list asks for more than approve")

    def _alert(self, document: Document, found: Marked[AlertRoute], lists: Mapping[str, str] | None) -> None:
        route = found.value
        rules = None if self._rules_lack else {rule.value.id for _, rule in self._rules}
        for name, ids, known in (("rules", route.rules, rules), ("lists", route.lists, lists)):
            for one in ids:
                if known is not None and one not in known:
                    document.problem(found.nodes[name], f"the policy has no {name[:-1]} {one!r}{did_you_mean(one, known)}")
        if not (route.outcomes or route.rules or route.lists):
            document.problem(found.node, "an alert names outcomes, rules or lists: it would tell of every payment")

    def _rule(self, document: Document, found: Marked[Rule], lists: Mapping[str, str] | None) -> tuple[Rule, Test, str] | None:
        rule, node = found.value, found.nodes["when"]
        try:
            return rule, parse(rule.when, lists or {}), document.file
        except ExpressionError as exc:
            for offset, text in exc.problems:
                if lists is not None or "declares no list" not in text:
                    document.problem_within(node, offset, f"rule {rule.id!r}: {text}")
            return None
