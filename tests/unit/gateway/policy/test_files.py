"""A policy that can't be meant is refused: what is wrong, in which file, line and column, all of it at once, within bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.contracts.decision import Outcome
from gateway.contracts.lists import LISTS_MAX
from gateway.errors import PolicyRefusedError
from gateway.policy import Policy, load_policy
from gateway.policy import document as bounds
from gateway.policy.expression import DEPTH_MAX, TOKENS_MAX, ExpressionError, parse
from gateway.policy.folder import SHIPPED, digest_of, read_folder
from gateway.policy.problems import PROBLEMS_MAX
from tests.unit.gateway.policy.factories import BANDS, make_list, make_policy, make_rule, policy_files

HEAD = """version: 2
name: test
bands:
- {up_to_minor: 1000, challenge: 500, review: 700, decline: 900, without_model: approve}
- {up_to_minor: null, challenge: 300, review: 400, decline: 500, without_model: review}
"""
RULE = """rules:
- id: r1
  state: live
  owner: risk
  text: d
  when: WHEN
  outcome: review
  reason: CARD_VELOCITY
"""


def refused(policy: str = HEAD, rules: str | None = None) -> list[str]:
    """The problems of a policy of these files, one a line."""
    files = {"policy.yaml": policy.encode()} | ({} if rules is None else {"rules/a.yaml": rules.encode()})
    with pytest.raises(PolicyRefusedError) as caught:
        Policy(files, "folder")
    return str(caught.value).splitlines()


def told(when: str) -> list[str]:
    """The problems of a rule's expression, each behind its line and column."""
    lines = refused(rules=RULE.replace("WHEN", when))
    assert all(line.startswith("folder/rules/a.yaml:") for line in lines)
    return [line.removeprefix("folder/rules/a.yaml:") for line in lines]


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ("card_cuont_5m > 3", "6:9: rule 'r1': there is no field or feature card_cuont_5m; did you mean card_count_5m?"),
        ("score > 1 and amount > 3", "6:23: rule 'r1': there is no field or feature amount; did you mean amount_minor?"),
        ('country == "USA"', "6:20: rule 'r1': country is never 'USA'"),
        ('channel == "web"', "6:20: rule 'r1': channel is never 'web'; it is one of atm, ecom, moto, pos"),
        ('currency in ["EUR", "EUP"]', "6:29: rule 'r1': currency is never 'EUP'; did you mean EUR?"),
        ("mcc in [5411]", "6:17: rule 'r1': mcc is a text, and 5411 is a number"),
        ("country == 5", "6:20: rule 'r1': country is a text, and 5 is a number"),
        ("amount_minor == country", "6:25: rule 'r1': amount_minor is a number, and country is a text"),
        ('country > "DE"', "6:9: rule 'r1': texts have no order: > compares numbers"),
        ("country + 1 > 2", "6:9: rule 'r1': country is a text where a number is needed"),
        ("amount_minor", "6:9: rule 'r1': a number alone is neither true nor false: compare it with something"),
        ("country", "6:9: rule 'r1': a text alone is neither true nor false: compare it with something"),
        ("(score > 1) + 2 > 3", "6:10: rule 'r1': this is true or false where a number or a text is needed"),
        ("known(5)", "6:15: rule 'r1': a constant is always known"),
        ("known(score, score)", "6:9: rule 'r1': known(...) takes one field, feature or other number"),
        ("abs(score, 1) > 1", "6:9: rule 'r1': abs takes one number"),
        ("max(score) > 1", "6:9: rule 'r1': max takes two numbers or more"),
        ("maximum(score, 2) > 1", "6:9: rule 'r1': there is no function maximum; did you mean max?"),
        ("mxa(score, 2) > 1", "6:9: rule 'r1': there is no function mxa; did you mean max?"),
        ("known > 1", "6:9: rule 'r1': known is a function: known(...)"),
        ("score / 0 > 1", "6:17: rule 'r1': nothing can be divided by 0"),
        ("1 < 2", "6:9: rule 'r1': compares two constants"),
        ("score = 5", "6:15: rule 'r1': = has no place in an expression: write == to compare"),
        ("score > 5 && score < 9", "6:19: rule 'r1': & has no place in an expression: write and"),
        ("score > 5 score", "6:19: rule 'r1': no expression"),
        ("(score > 5", "6:9: rule 'r1': no expression: '(' was never closed"),
        ("score > 5and score < 9", "6:18: rule 'r1': a space or an operator is missing before this"),
        ('card_id in list("gone")', "6:25: rule 'r1': the policy declares no list 'gone'"),
        ("channel in 5", "6:20: rule 'r1': `in` is followed by constants in square brackets, or by list(\"id\")"),
        ("score is 5", "6:18: rule 'r1': write == or != to compare"),
    ],
)
def test_a_mistake_in_an_expression_is_told_with_line_and_column(when: str, problem: str) -> None:
    assert told(when) == [problem]


def test_a_list_is_asked_of_its_own_field_alone() -> None:
    lists = yaml.safe_dump({"lists": [make_list("bad", "block")]})
    lines = refused(HEAD + lists, RULE.replace("WHEN", 'merchant_id in list("bad") or card_id in list("bda")'))
    assert [line.split(": ", 2)[2] for line in lines] == [
        "the list 'bad' holds values of card_id: card_id in list('bad')",
        "the policy declares no list 'bda'; did you mean bad?",
    ]


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("nope > 1", "6:9"),
        ("   nope > 1", "6:12"),
        ("'nope > 1'", "6:10"),
        ("'channel == ''pos'' and nope > 1'", "6:33"),
        ('"score > 1 and nope > 1"', "6:24"),
        ("score > 1\n    and nope > 1", "7:9"),
        ("|\n    score > 1 and\n      nope > 1\n", "8:7"),
        ("|-\n\n\n    nope > 1\n", "9:5"),
        (">-\n    score > 1\n    and score < 5\n    and nope > 1\n", "9:9"),
        ("'score > 1\n\n    and   nope > 1'", "8:11"),
    ],
)
def test_the_place_in_an_expression_is_found_however_yaml_writes_it(written: str, place: str) -> None:
    assert told(written) == [f"{place}: rule 'r1': there is no field or feature nope"]


def test_all_problems_of_all_files_are_told_at_once_in_order() -> None:
    policy = HEAD.replace("review: 700", "review: 100").replace("name: test", "name: 5\nnmae: x")
    rules = RULE.replace("WHEN", "nope > 1 or nope_too > 1").replace("state: live", "state: alive").replace("  text: d\n", "")
    rules += RULE.replace("rules:\n", "").replace("r1", "r2").replace("WHEN", 'nope > 1 or card_id in list("l")')
    policy += "alerts: [{name: a, rules: [gone, r1]}]\n"
    files = {"policy.yaml": policy.encode(), "rules/a.yaml": rules.encode(), "rules/b.yaml": b"rules: 7\n", "stray.yaml": b"x"}
    with pytest.raises(PolicyRefusedError) as caught:
        Policy(files, "folder")
    assert str(caught.value).splitlines() == [
        "folder/policy.yaml:2:7: policy's name: expected `str`, got `int`",
        "folder/policy.yaml:3:1: policy has no 'nmae'; did you mean name?",
        "folder/rules/a.yaml:2:3: rule 1 lacks text",
        "folder/rules/a.yaml:3:10: rule 1's state: must be one of live, shadow, off; did you mean live?",
        "folder/rules/a.yaml:12:9: rule 'r2': there is no field or feature nope",
        "folder/rules/b.yaml:1:8: file's rules: expected `array`, got `int`",
        "folder/stray.yaml:1:1: a policy has policy.yaml and rules/*.yaml",
    ]


def test_no_more_problems_are_told_than_anybody_reads() -> None:
    rules = "rules:\n" + "- {id: 5}\n" * 200
    lines = refused(rules=rules)
    assert len(lines) == PROBLEMS_MAX + 1
    assert lines[-1] == "and more"


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("{", "2:1: no YAML: did not find expected node content"),
        ("a: b: c", "1:5: no YAML: mapping values are not allowed in this context"),
        ("a: 1\n---\nb: 1\n", "2:1: no YAML: but found another document"),
        ("", "1:1: the file is empty"),
        ("- 5", "1:1: policy is written as a mapping of version, name, bands, lists, alerts"),
        (HEAD.replace("version: 2", "version: 3"), "1:10: policy's version: invalid enum value 3"),
        (HEAD.replace("version: 2\n", ""), "1:1: policy lacks version"),
        (HEAD + "name: again\n", "6:1: name is given twice"),
        (HEAD + "lists: &x []\n", "6:8: anchors and aliases have no place in a policy"),
        (HEAD + "lists: [[[[[[[[1]]]]]]]]\n", "6:15: nested deeper than 8"),
        (HEAD.replace("up_to_minor: null", "up_to_minor: 2000"), "5:17: the last band has up_to_minor: null"),
        (HEAD.replace("up_to_minor: 1000", "up_to_minor: null"), "4:17: only the last band has up_to_minor: null"),
        (HEAD.replace("up_to_minor: 1000", "up_to_minor: 0"), "4:17: band 1's up_to_minor: expected `int` >= 1"),
        (HEAD.replace("challenge: 500", "challenge: 800"), "4:47: scores must rise from challenge to review to decline"),
        (HEAD.replace("decline: 900", "decline: 1002"), "4:61: band 1's decline: expected `int` <= 1001"),
        (HEAD.replace("decline: 900", "decline: '900'"), "4:61: band 1's decline: expected `int`, got `str`"),
        (HEAD.replace("without_model: approve", "without_model: open"), "must be one of approve, challenge, review, decline"),
        (HEAD + "rules: []\n", "6:1: rules stand in files of their own, rules/*.yaml"),
        (HEAD + "lists: [{id: a, field: card, kind: block, owner: o, text: t}]", "6:24: must be one of card_id"),
        (HEAD + "lists: [{id: a, field: card_id, kind: blok, owner: o, text: t}]", "6:39: list 1's kind"),
        (
            HEAD + "lists: [{id: a, field: card_id, kind: allow, outcome: approve, owner: o, text: t}]",
            "6:55: an allow list has no outcome",
        ),
        (
            HEAD + "lists: [{id: a, field: card_id, kind: block, outcome: approve, owner: o, text: t}]",
            "6:55: a block list asks for more than approve",
        ),
        (HEAD + "lists: [{id: a b, field: card_id, kind: block, owner: o, text: t}]", "6:14: list 1's id"),
        (HEAD + "alerts: [{name: a}]", "6:10: an alert names outcomes, rules or lists"),
        (HEAD + "alerts: [{name: a, rules: [gone]}]", "6:27: the policy has no rule 'gone'"),
        (HEAD + "alerts: [{name: a, lists: [gone]}]", "6:27: the policy has no list 'gone'"),
        (HEAD + "alerts: [{name: a, outcomes: [declin]}]", "6:30: alert 1's outcomes"),
    ],
)
def test_a_policy_file_that_can_not_be_meant_is_refused_with_its_place(policy: str, problem: str) -> None:
    [line] = refused(policy)
    assert problem in line
    assert line.startswith("folder/policy.yaml:")


@pytest.mark.parametrize("what", ["rules", "lists", "alerts"])
def test_an_id_that_is_given_twice_is_refused_where_it_is_given_again(what: str) -> None:
    alert = {"name": "a", "outcomes": ["decline"]}
    twice: dict[str, Any] = {"lists": (make_list("a", "block"),) * 2} if what == "lists" else {"alerts": (alert, alert)}
    rules = [make_rule("score > 1")] * 2 if what == "rules" else []
    with pytest.raises(PolicyRefusedError, match="is given twice") as caught:
        make_policy(*rules, **({} if what == "rules" else twice))
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_not_text_is_refused_with_its_place() -> None:
    with pytest.raises(PolicyRefusedError, match=r"policy\.yaml:2:7: not UTF-8"):
        Policy({"policy.yaml": HEAD.encode().replace(b"test", b"\xff")}, "folder")


# Version 1.


def test_the_first_version_is_refused_with_how_to_write_it_now(tmp_path: Path) -> None:
    old = "version: 1\nname: default\nbands: []\nrules:\n  - id: a\n    when:\n      - {feature: card_count_5m, op: '>=', value: 10}\n"
    [line] = refused(old)
    assert line.startswith("folder/policy.yaml:1:10: version 1 is no longer read: ")
    assert "when: card_count_5m >= 10" in line
    (tmp_path / "old.yaml").write_text(old)
    with pytest.raises(PolicyRefusedError, match="a policy is a folder now"):
        load_policy(str(tmp_path / "old.yaml"))


# Bounds, each at its limit and one beyond.


def test_as_many_rules_as_allowed_load_and_one_more_is_refused() -> None:
    rules = [make_rule("score > 1", f"r{i}", text="t") for i in range(bounds.RULES_MAX + 1)]
    assert len(make_policy(*rules[:-1]).rules) == bounds.RULES_MAX
    with pytest.raises(PolicyRefusedError, match=f"<= {bounds.RULES_MAX}"):
        make_policy(*rules)
    files = policy_files(*rules[:600])
    files["rules/more.yaml"] = policy_files(*rules[600:])["rules/all.yaml"]
    with pytest.raises(PolicyRefusedError, match=rf"rules/more\.yaml:\d+:3: more than {bounds.RULES_MAX} rules"):
        Policy(files, "folder")


@pytest.mark.parametrize(
    ("most", "part"),
    [
        (LISTS_MAX, lambda n: {"lists": tuple(make_list(f"l{i}", "block") for i in range(n))}),
        (bounds.ALERTS_MAX, lambda n: {"alerts": tuple({"name": f"a{i}", "outcomes": ["decline"]} for i in range(n))}),
        (bounds.BANDS_MAX, lambda n: {"bands": (*(BANDS[0] | {"up_to_minor": i + 1} for i in range(n - 1)), BANDS[1])}),
        (bounds.WEBHOOKS_MAX, lambda n: {"alerts": ({"name": "a", "outcomes": ["decline"], "webhooks": ["w"] * n},)}),
    ],
)
def test_as_many_of_each_as_allowed_load_and_one_more_is_refused(most: int, part: Any) -> None:
    make_policy(**part(most))
    with pytest.raises(PolicyRefusedError, match=f"length <= {most}"):
        make_policy(**part(most + 1))


def test_as_many_files_and_bytes_as_allowed_are_read_and_one_more_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "policy.yaml").write_text(HEAD)
    for i in range(bounds.FILES_MAX - 1):
        (tmp_path / "rules" / f"{i}.yaml").write_text("rules: []\n")
    assert len(load_policy(str(tmp_path)).files) == bounds.FILES_MAX
    (tmp_path / "rules/one-more.yaml").write_text("rules: []\n")
    with pytest.raises(PolicyRefusedError, match="files"):
        load_policy(str(tmp_path))
    (tmp_path / "rules/one-more.yaml").unlink()
    size = sum(map(len, read_folder(tmp_path).values()))
    (tmp_path / "policy.yaml").write_text(HEAD + "#" * (bounds.POLICY_BYTES_MAX - size))
    found = load_policy(str(tmp_path))
    assert sum(map(len, found.files.values())) == bounds.POLICY_BYTES_MAX
    (tmp_path / "policy.yaml").write_text(HEAD + "#" * (bounds.POLICY_BYTES_MAX - size + 1))
    with pytest.raises(PolicyRefusedError, match="bytes"):
        load_policy(str(tmp_path))
    with pytest.raises(PolicyRefusedError, match="bytes"):
        Policy(found.files | {"rules/x.yaml": b"rules: []"}, "folder")


def test_an_expression_is_as_long_and_as_deep_as_allowed_and_no_more() -> None:
    longest = "score > 1".ljust(bounds.EXPRESSION_LENGTH_MAX)
    parse(longest, {})
    deepest = "(" * DEPTH_MAX + "score > 1" + ")" * DEPTH_MAX
    parse(deepest, {})
    # A comparison, its left side, and what is within.
    most_nested = "abs(" * (DEPTH_MAX - 1) + "score" + ")" * (DEPTH_MAX - 1) + " > 1"
    parse(most_nested, {})
    words = " and ".join(["score>1"] * ((TOKENS_MAX + 1) // 4))
    parse(words, {})
    for text in (longest + " ", f"({deepest})", f"abs({most_nested[:-4]}) > 1", words + " and score>1"):
        with pytest.raises(ExpressionError):
            parse(text, {})


# Folders.


def test_the_shipped_policy_loads_and_its_digest_follows_names_and_bytes() -> None:
    shipped = load_policy("")
    assert len(shipped.rules) >= 8
    assert shipped.files == read_folder(SHIPPED)
    assert shipped.digest == digest_of(shipped.files)
    assert Policy(shipped.files, "again").digest == shipped.digest
    renamed = {name.replace("travel", "trips"): data for name, data in shipped.files.items()}
    changed = shipped.files | {"policy.yaml": shipped.files["policy.yaml"] + b"\n"}
    moved = {"policy.yaml": b"ab", "rules/a.yaml": b""}
    digests = [digest_of(files) for files in (shipped.files, renamed, changed, moved, {"policy.yaml": b"a", "rules/a.yaml": b"b"})]
    assert len(set(digests)) == len(digests)


def test_rules_are_read_in_the_order_of_their_files_and_hidden_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    files = policy_files(make_rule("score > 1", "in-b"))
    (tmp_path / "policy.yaml").write_bytes(files["policy.yaml"])
    (tmp_path / "rules/b.yaml").write_bytes(files["rules/all.yaml"])
    (tmp_path / "rules/a.yaml").write_bytes(policy_files(make_rule("score > 1", "in-a"))["rules/all.yaml"])
    for name in (".a.yaml.swp", ".draft.yaml", "README.md"):
        (tmp_path / "rules" / name).write_text("no rule")
    loaded = load_policy(str(tmp_path))
    assert loaded.rule_ids == ("in-a", "in-b")
    assert sorted(loaded.files) == ["policy.yaml", "rules/a.yaml", "rules/b.yaml"]


@pytest.mark.parametrize("name", ["more.yml", "more.json"])
def test_a_rules_file_that_would_be_passed_over_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "policy.yaml").write_text(HEAD)
    (tmp_path / "rules" / name).write_text("rules: []")
    with pytest.raises(PolicyRefusedError, match=r"end in \.yaml"):
        load_policy(str(tmp_path))


def test_a_folder_that_is_not_there_or_has_no_policy_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PolicyRefusedError, match=str(path)):
            load_policy(str(path))


# Alerts.


def test_an_alert_takes_the_decisions_that_it_names() -> None:
    alerts = (
        {"name": "declines", "outcomes": ["decline"], "amount_minor_least": 100},
        {"name": "causes", "rules": ["r1"], "lists": ["bad"]},
        {"name": "both", "outcomes": ["review"], "rules": ["r1"]},
    )
    policy = make_policy(make_rule("score > 1"), lists=(make_list("bad", "block"),), alerts=alerts)

    def taking(outcome: Outcome, rules: list[str], lists: list[str], amount_minor: int = 100) -> list[str]:
        return [route.name for route in policy.alerts if route.takes(outcome, rules, lists, amount_minor)]

    assert taking(Outcome.DECLINE, [], []) == ["declines"]
    assert taking(Outcome.DECLINE, [], [], 99) == []
    assert taking(Outcome.DECLINE, ["r1"], [], 99) == ["causes"]
    assert taking(Outcome.REVIEW, ["r1", "r2"], []) == ["causes", "both"]
    assert taking(Outcome.APPROVE, ["r2"], ["bad"]) == ["causes"]
    assert taking(Outcome.REVIEW, ["r2"], ["good"]) == []


# The page.

PAGE = Path(__file__).resolve().parents[4] / "docs/policy.md"


def test_the_expressions_of_the_page_are_right() -> None:
    page = PAGE.read_text()
    block = page.split("### Expressions\n\n")[1].split("\n\n")[0]
    lists = {"trusted-merchants": "merchant_id", "blocked-cards": "card_id"}
    lines = [line.strip() for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        parse(line, lists)
    for now in re.findall(r"^\| `\{.*\}` \| `(.*)` \|$", page, re.MULTILINE):
        parse(now, {})
    for inline in ("x in [1, 2]", 'mcc not in ["5411"]', 'card_id in list("blocked-cards")'):
        assert f"`{inline}`" in page
        parse(re.sub(r"\bx\b", "score", inline), lists)


def test_the_parts_of_a_policy_on_the_page_make_one_that_loads() -> None:
    page = PAGE.read_text()
    parts = [
        yaml.safe_load(part) for part in re.findall(r"^(    (?:bands|lists|rules|alerts):\n(?:    .*\n)+)", page, re.MULTILINE)
    ]
    found = {name: value for part in parts for name, value in part.items()}
    assert set(found) == {"bands", "lists", "rules", "alerts"}
    device = make_list("blocked-devices", "block", "device_id")
    policy = {"version": 2, "name": "page", "bands": found["bands"], "lists": [*found["lists"], device], "alerts": found["alerts"]}
    rules = [*found["rules"], make_rule("score > 1", "device-many-cards")]
    Policy({"policy.yaml": yaml.safe_dump(policy).encode(), "rules/a.yaml": yaml.safe_dump({"rules": rules}).encode()}, "page")


def test_the_page_has_the_rules_that_ship() -> None:
    told = re.findall(r"^\| `([a-z-]+)` \| .* \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(told) == sorted((rule.id, rule.outcome.value) for rule in load_policy("").rules)
