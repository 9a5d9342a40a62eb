"""Traffic shared between real models on a real gateway: shares changed under load, shadows, the guard, exploration."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import msgspec
import numpy as np
import pytest

from deploy.stack import Stack
from deploy.topics import create_topics, register_schemas
from gateway.contracts.audit import read_audit
from gateway.contracts.decision import Receipt
from gateway.contracts.model_meta import read_manifest, write_manifest
from gateway.contracts.routing import point_of, route_salt
from gateway.contracts.settings import Settings
from gateway.contracts.topics import ALERTS, SHADOW_SCORES, TOPICS
from gateway.contracts.transaction import encode_json
from gateway.contracts.wire import unframe
from gateway.models.model import load_model
from loadtest.offered import Offered, offer
from tests.helpers import RunningCommand, run_command, running_command, wait_until
from tests.integration.gateway_helpers import (
    Decisions,
    Tail,
    gateway_of_its_own,
    make_transaction,
    name,
    post,
    ready_without,
    request,
)
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration
READY_WITHIN_S = 60
# The champion declines what is above the first, the challenger what is above the second.
CHAMPION_ABOVE, CHALLENGER_ABOVE = 60_000, 25_000
BY_BOTH, BY_CHALLENGER, BY_NONE = 80_000, 40_000, 1_000


def write_models(folder: Path, shadows: int = 0) -> None:
    routes = {}
    for i, above in enumerate((CHAMPION_ABOVE, CHALLENGER_ABOVE, *[10_000] * shadows)):
        route = ("champion", "challenger", "shadow", "shadow-2", "shadow-3")[i]
        routes[route] = write_model(folder, str(i + 1), i, above_minor=above, rows=4000, trees=30).routes["champion"]
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), routes=routes))


@pytest.fixture
def own(stack: Stack, settings: Settings, tmp_path: Path) -> Settings:
    assert stack.pid("kafka")
    create_topics(settings)
    register_schemas(settings)
    return gateway_of_its_own(settings, tmp_path, "routes")


@pytest.fixture
def serve(own: Settings, tmp_path: Path) -> Iterator[Callable[[], RunningCommand]]:
    """Starts the gateway, with two workers."""
    with contextlib.ExitStack() as running:

        def start() -> RunningCommand:
            log_path = tmp_path / f"gateway-{time.time_ns()}.log"
            command = running.enter_context(running_command(own, "serve", "--workers", "2", "--no-kafka", log_path=log_path))
            command.wait_until(lambda: command.log().count("serves (pid") == 2, READY_WITHIN_S, "the workers serve")
            command.wait_until(
                lambda: all(ready_without(own, "redis", "model") for _ in range(8)), READY_WITHIN_S, "the workers are ready"
            )
            command.wait_until(
                lambda: command.log().count("knows its schemas") == 2, READY_WITHIN_S, "the workers know the schemas"
            )
            return command

        yield start


def load(settings: Settings, rate: float, duration_s: float, prefix: str, amount_of: Callable[[int], int]) -> Offered:
    def request_of(i: int) -> tuple[str, bytes]:
        t = make_transaction(f"{prefix}-{i}", amount_minor=amount_of(i))
        return t.transaction_id, encode_json(t)

    return asyncio.run(offer(settings.host, settings.gateway_port, lambda _: rate, duration_s, request_of, 200))


def receipts_of(decisions: Decisions, prefix: str, count: int) -> list[Receipt]:
    """In the order of their decisions."""

    def ours() -> list[Receipt]:
        return [r for r in decisions.receipts() if r.transaction_id.startswith(prefix)]

    decisions.read_until(lambda: len(ours()) >= count)
    found = ours()
    assert len(found) == len({r.transaction_id for r in found}) == count
    return sorted(found, key=lambda r: r.decided_at_ms)


def metric(settings: Settings, sample: str) -> float:
    with urllib.request.urlopen(f"{settings.gateway}/metrics", timeout=10) as reply:  # noqa: S310
        lines = reply.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample)


def records(tail: Tail, topic: str) -> list[dict[str, Any]]:
    schema = fastavro.parse_schema(json.loads(TOPICS[topic].schema_text))
    found: list[Any] = [fastavro.schemaless_reader(io.BytesIO(unframe(m.value() or b"")[1]), schema, None) for m in tail.messages]
    return found


def test_a_share_changed_under_load_is_in_force_soon_and_costs_no_answer(
    own: Settings, serve: Callable[[], RunningCommand]
) -> None:
    write_models(own.models_path)
    serve()
    challenger = load_model(own.models_path, "challenger")
    assert challenger is not None
    decisions, changed_ms = Decisions(own), []

    def change() -> None:
        assert run_command(own, "route", "--challenger-share", "0.6", "--reason", "a test").returncode == 0
        changed_ms.append(time.time_ns() // 1_000_000)

    timer = threading.Timer(4, change)
    timer.start()
    prefix = name("share")
    offered = load(own, 200, 14, prefix, lambda i: BY_NONE)
    timer.join()
    assert set(offered.statuses()) == {200}
    assert offered.mixed_up == 0
    receipts = receipts_of(decisions, prefix, len(offered.samples))
    decisions.close()
    salt, changed = route_salt(challenger.digest), changed_ms[0]
    # The command itself takes a second or two to start and to end.
    before = [r for r in receipts if r.decided_at_ms < changed - 3000]
    after = [r for r in receipts if r.decided_at_ms > changed + 3000]
    assert len(before) > 50
    assert len(after) > 200
    for part, share in ((before, 0.1), (after, 0.6)):
        assert {r.routed_by for r in part} == {"share"}
        for r in part:
            expected = "challenger" if point_of(r.transaction.card_id.encode(), salt) < share else "champion"
            assert r.route == expected
    for r in receipts:
        assert r.model_version == {"champion": "1", "challenger": "2"}[r.route or ""]
    counts = Counter(r.route for r in after)
    assert abs(counts["challenger"] / len(after) - 0.6) < 0.15
    [entry], _ = read_audit(own.models_path)
    assert (entry.action, entry.subject, entry.before, entry.after, entry.reason) == (
        *("route", "challenger_share", "0.1", "0.6"),
        "a test",
    )
    status, told = request(own, "GET", "/routing")
    assert (status, told["challenger_share"], told["challenger"]["version"], told["routed_by"]) == (200, 0.6, "2", "share")
    shown = run_command(own, "route")
    assert "0.6 of the cards (routed by share)" in shown.stdout
    assert metric(own, 'fraudgate_routed_total{route="challenger"}') == sum(r.route == "challenger" for r in receipts)


def test_every_shadow_has_its_scores_on_the_topic_and_no_part_in_the_answer(
    own: Settings, serve: Callable[[], RunningCommand]
) -> None:
    write_models(own.models_path, shadows=3)
    serve()
    decisions, shadows, prefix = Decisions(own), Tail(own, SHADOW_SCORES), name("shadow")
    offered = load(own, 100, 2, prefix, lambda i: 100 * i + 1)
    assert set(offered.statuses()) == {200}
    receipts = {r.transaction_id: r for r in receipts_of(decisions, prefix, len(offered.samples))}
    assert {r.route for r in receipts.values()} == {"champion", "challenger"}
    shadows.read_until(lambda: len(shadows.messages) >= 3 * len(receipts))
    scores = records(shadows, SHADOW_SCORES)
    assert len(scores) == 3 * len(receipts)
    models = {m.digest: m for route in ("shadow", "shadow-2", "shadow-3") if (m := load_model(own.models_path, route)) is not None}
    assert Counter(s["model_digest"] for s in scores) == dict.fromkeys(models, len(receipts))
    for s in random.Random(1).sample(scores, 50):
        receipt, model = receipts[s["transaction_id"]], models[s["model_digest"]]
        assert s["probability"] == model.probability(np.array([receipt.features], np.float32))[0]
        assert (s["event_time_ms"], s["model_version"]) == (receipt.transaction.event_time_ms, model.ref.version)
    # What shadows read changed nothing: each card, seen once, is at its first event.
    assert {r.features[1] for r in receipts.values()} <= {0.0} or all(
        seq >= 0 for r in receipts.values() for seq in r.observed_seq[:3]
    )
    decisions.close()
    shadows.close()


def test_a_challenger_with_doubled_declines_is_out_within_2000_payments_and_stays_out_until_it_is_cleared(
    own: Settings, serve: Callable[[], RunningCommand]
) -> None:
    write_models(own.models_path)
    gateway = serve()
    decisions, alerts, prefix = Decisions(own), Tail(own, ALERTS), name("guard")
    rnd = random.Random(3)
    # The champion declines 3 %, the challenger 6 %.
    amounts = rnd.choices([BY_BOTH, BY_CHALLENGER, BY_NONE], [3, 3, 94], k=10_000)
    offered = load(own, 250, 10, prefix, lambda i: amounts[i])
    assert set(offered.statuses()) == {200}
    receipts = receipts_of(decisions, prefix, len(offered.samples))
    out_at = next(i for i, r in enumerate(receipts) if r.routed_by == "guard")
    print(f"the challenger was out after {out_at} payments")
    assert out_at <= 2000
    assert all(r.route == "champion" for r in receipts if r.routed_by == "guard")
    assert any(r.route == "challenger" for r in receipts[:out_at])
    # Two workers: the second may follow a moment later.
    assert all(r.routed_by == "guard" for r in receipts if r.decided_at_ms > receipts[out_at].decided_at_ms + 4000)
    wait_until(lambda: metric(own, "fraudgate_guard_out") == 1, 20, "both workers keep it out")
    alerts.read_until(lambda: any(a["kind"] == "guard" for a in records(alerts, ALERTS)))
    told = [a for a in records(alerts, ALERTS) if a["kind"] == "guard"]
    assert len(told) == 1
    assert "challenger fraudgate 2 is out" in told[0]["detail"]
    entries, _ = read_audit(own.models_path)
    assert [(e.action, e.before) for e in entries] == [("guard", "2")]
    assert "guard: challenger fraudgate 2 is out" in gateway.log()

    assert gateway.stop(40)
    again = serve()
    prefix = name("restarted")
    offered = load(own, 50, 2, prefix, lambda i: BY_NONE)
    receipts = receipts_of(decisions, prefix, len(offered.samples))
    assert {(r.route, r.routed_by) for r in receipts} == {("champion", "guard")}

    cleared = run_command(own, "route", "--clear-guard", "--reason", "retrained")
    assert cleared.returncode == 0, cleared.stderr
    again.wait_until(lambda: request(own, "GET", "/routing")[1]["routed_by"] == "share", 20, "the challenger is let in")
    wait_until(lambda: metric(own, "fraudgate_challenger_share") == 0.1, 20, "both workers let it in")
    prefix = name("cleared")
    offered = load(own, 50, 4, prefix, lambda i: BY_NONE)
    # Its counts are forgotten too: it isn't out again at once.
    assert {r.routed_by for r in receipts_of(decisions, prefix, len(offered.samples))[-50:]} == {"share"}
    assert [e.action for e in read_audit(own.models_path)[0]] == ["guard", "clear-guard"]
    decisions.close()
    alerts.close()


def test_exploration_approves_a_share_of_the_declined_and_stops_at_the_days_cap(
    own: Settings, serve: Callable[[], RunningCommand]
) -> None:
    write_models(own.models_path)
    serve()
    decisions = Decisions(own)
    cap_minor = 10 * BY_BOTH
    options = (
        "--explore-share",
        "0.25",
        "--explore-amount-max-minor",
        str(BY_BOTH),
        "--explore-loss-max-minor-per-day",
        str(cap_minor),
    )
    before = post(own, make_transaction(name("before"), amount_minor=BY_BOTH))[1]
    assert before["decision"] == "decline"
    assert run_command(own, "route", "--challenger-share", "0", *options).returncode == 0
    wait_until(
        lambda: all(request(own, "GET", "/routing")[1]["routing"]["explore_share"] == 0.25 for _ in range(8)), 20, "it is in force"
    )
    prefix = name("explore")
    offered = load(own, 20, 12, prefix, lambda i: BY_BOTH)
    assert set(offered.statuses()) == {200}
    receipts = receipts_of(decisions, prefix, len(offered.samples))
    assert {r.policy_decision for r in receipts} == {"decline"}
    explored = [r for r in receipts if r.decision == "approve"]
    assert {r.propensity for r in explored} == {0.25}
    assert {r.propensity for r in receipts if r.decision == "decline"} == {0.75, 1.0}
    spent = len(explored) * BY_BOTH
    # Two workers, each of which knows the other's part a second later: 20 payments a second, a quarter of them explored.
    assert cap_minor - BY_BOTH < spent <= cap_minor + 2 * 20 * BY_BOTH
    assert {r.propensity for r in receipts[-20:]} == {1.0}
    wait_until(lambda: metric(own, "fraudgate_explore_spent_minor") == spent, 10, "the day's total is known")
    assert metric(own, "fraudgate_explored_minor_total") == spent
    decisions.close()


def test_the_command_refuses_what_can_not_be_and_writes_nothing(own: Settings) -> None:
    refused = run_command(own, "route", "--challenger-share", "1.5")
    assert (refused.returncode, "challenger_share must be between 0 and 1" in refused.stderr) == (1, True)
    assert not own.models_path.exists()
    shown = run_command(own, "route", "--json")
    told = json.loads(shown.stdout)
    assert (told["from_file"], told["gateway"], told["routing"]["challenger_share"]) == (False, None, 0.1)
