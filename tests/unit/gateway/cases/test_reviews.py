"""The review queue through its routes: taken in once, listed by pages, held by one, decided once, with label and audit record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.api_keys import create_key
from gateway.cases import reviews
from gateway.cases.errors import ClaimedError, NotClaimedError
from gateway.cases.intake import review_of
from gateway.cases.reviews import NOTE_LENGTH_MAX, PAGE_MAX
from gateway.cases.service import CaseService, UnguardedError, now_ms
from gateway.contracts.decision import Outcome
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT, LABELS
from tests.unit.gateway.cases.factories import CARD_NUMBER, VIEW, a_service, ask, outbox, queue, receipt
from tests.unit.gateway.cases.records import audit_of, label_of

pytestmark = pytest.mark.anyio

MIB = 1_048_576


@pytest.mark.parametrize(
    ("outcome", "list_hits", "why"),
    [
        (Outcome.REVIEW, [], "review"),
        (Outcome.APPROVE, ["watched-cards"], "watch_list"),
        (Outcome.DECLINE, ["watched-cards", "blocked-cards"], "watch_list"),
        (Outcome.DECLINE, ["blocked-cards"], None),
        (Outcome.APPROVE, [], None),
    ],
)
def test_a_person_is_asked_for_reviews_and_watch_list_hits(outcome: Outcome, list_hits: list[str], why: str | None) -> None:
    found = review_of(receipt(outcome=outcome, list_hits=list_hits), VIEW)
    assert (None if found is None else found.why) == why


async def test_a_decision_that_is_read_twice_is_queued_once(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        queue(service, receipt("a"), receipt("a"))
        queue(service, receipt("a", risk_score=999))
        _, page, _ = await ask(app, "GET", "/v1/reviews")
        assert [(r["transaction_id"], r["state"]) for r in page["reviews"]] == [("a", "open")]


async def test_pages_of_every_order_hold_each_review_once(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        made = [
            receipt(f"t{i}", amount_minor=100 * (i % 3), risk_score=10 * (i % 4), decided_at_ms=now_ms() - i) for i in range(11)
        ]
        queue(service, *made)
        for order, column, falling in (
            ("amount", "amount_minor", True),
            ("risk", "risk_score", True),
            ("age", "decided_at_ms", False),
        ):
            found: list[dict[str, Any]] = []
            cursor = ""
            while True:
                status, page, _ = await ask(app, "GET", f"/v1/reviews?order={order}&limit=4{cursor}")
                assert status == 200
                found += page["reviews"]
                if page["next_cursor"] is None:
                    break
                cursor = "&cursor=" + page["next_cursor"].replace("=", "%3D")
            assert sorted(r["transaction_id"] for r in found) == sorted(f"t{i}" for i in range(11))
            values = [r[column] for r in found]
            assert values == sorted(values, reverse=falling)
        status, problem, _ = await ask(app, "GET", f"/v1/reviews?order=risk{cursor}")
        assert (status, problem["field"]) == (422, "cursor")


async def test_reviews_are_filtered(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        queue(service, receipt("a", amount_minor=5), receipt("b", amount_minor=500, merchant_id="m9"), receipt("c", risk_score=900))

        async def ids(query: str) -> list[str]:
            _, page, _ = await ask(app, "GET", f"/v1/reviews?{query}")
            return sorted(r["transaction_id"] for r in page["reviews"])

        assert await ids("amount_minor_least=500") == ["b", "c"]
        assert await ids("merchant_id=m9") == ["b"]
        assert await ids("risk_score_least=900") == ["c"]
        await ask(app, "POST", "/v1/reviews/a/claim", {}, fraudgate_analyst="ann")
        assert await ids("state=open") == ["b", "c"]
        assert await ids("state=claimed") == ["a"]
        assert await ids("why=watch_list") == []
        _, page, _ = await ask(app, "GET", "/v1/reviews?mine=true", fraudgate_analyst="ann")
        assert [r["claimed_by"] for r in page["reviews"]] == ["ann"]


async def test_one_analyst_at_a_time_holds_a_review(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        queue(service, receipt("a"))
        status, review, _ = await ask(app, "POST", "/v1/reviews/a/claim", {"lease_s": 60}, fraudgate_analyst="ann")
        assert (status, review["claimed_by"]) == (200, "ann")
        status, problem, headers = await ask(app, "POST", "/v1/reviews/a/claim", {}, fraudgate_analyst="bob")
        assert (status, problem["reason"], headers["content-type"]) == (409, "claimed", "application/problem+json")
        status, problem, _ = await ask(app, "POST", "/v1/reviews/a/release", fraudgate_analyst="bob")
        assert (status, problem["reason"]) == (409, "not_claimed")
        again, _, _ = await ask(app, "POST", "/v1/reviews/a/claim", {}, fraudgate_analyst="ann")
        released, review, _ = await ask(app, "POST", "/v1/reviews/a/release", fraudgate_analyst="ann")
        assert (again, released, review["state"]) == (200, 200, "open")
        status, _, _ = await ask(app, "POST", "/v1/reviews/a/claim", {}, fraudgate_analyst="bob")
        assert status == 200


def test_a_lease_ends_by_itself(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, _):
        queue(service, receipt("a"))
        database = service.database
        database.call(lambda c: reviews.claim(c, "a", "ann", 2000, 1000))
        with pytest.raises(ClaimedError):
            database.call(lambda c: reviews.claim(c, "a", "bob", 3000, 1999))
        assert database.call(lambda c: reviews.claim(c, "a", "bob", 3000, 2000))["claimed_by"] == "bob"
        with pytest.raises(NotClaimedError):
            database.call(lambda c: reviews.decide(c, "a", "ann", "fraud", "", 2001))
        with pytest.raises(NotClaimedError):
            database.call(lambda c: reviews.decide(c, "a", "bob", "fraud", "", 3000))


@pytest.mark.parametrize(("verdict", "is_fraud", "state"), [("fraud", True, "confirmed"), ("legitimate", False, "false_positive")])
async def test_a_verdict_becomes_a_label_and_an_audit_record(tmp_path: Path, verdict: str, is_fraud: bool, state: str) -> None:
    with a_service(tmp_path) as (service, app):
        queue(service, receipt("a", card_id="c7", amount_minor=77))
        await ask(app, "POST", "/v1/reviews/a/claim", {}, fraudgate_analyst="ann")
        body = {"verdict": verdict, "note": "the holder said so"}
        for _ in range(2):
            status, review, _ = await ask(app, "POST", "/v1/reviews/a/decide", body, fraudgate_analyst="ann")
            assert (status, review["state"], review["verdict_who"]) == (200, "decided", "ann")
        label_record, audit_record = outbox(service)
        assert (label_record.topic, label_record.key, audit_record.topic) == (LABELS, b"c7", AUDIT)
        label, audit = label_of(label_record), audit_of(audit_record)
        assert (label.is_fraud, label.source, label.state, label.amount_minor) == (is_fraud, "analyst", state, 77)
        assert (audit["who"], audit["action"], audit["subject"], audit["reason"]) == (
            "ann",
            "review_decided",
            "a",
            "the holder said so",
        )
        assert json.loads(audit["after"])["state"] == state
        _, story, _ = await ask(app, "GET", "/v1/reviews/a")
        assert [(known["who"], known["state"]) for known in story["labels"]] == [("ann", state)]
        other = {"verdict": "fraud" if verdict == "legitimate" else "legitimate"}
        status, problem, _ = await ask(app, "POST", "/v1/reviews/a/decide", other, fraudgate_analyst="ann")
        assert (status, problem["reason"]) == (409, "decided")
        status, problem, _ = await ask(app, "POST", "/v1/reviews/a/claim", {}, fraudgate_analyst="ann")
        assert (status, problem["reason"]) == (409, "decided")


async def test_a_verdict_that_the_outbox_has_no_room_for_is_not_taken(tmp_path: Path) -> None:
    with a_service(tmp_path, cases_outbox_max=2) as (service, app):
        queue(service, receipt("a"), receipt("b"))
        answers = []
        for name in ("a", "b"):
            await ask(app, "POST", f"/v1/reviews/{name}/claim", {})
            answers.append(await ask(app, "POST", f"/v1/reviews/{name}/decide", {"verdict": "fraud"}))
        assert [status for status, _, _ in answers] == [200, 503]
        assert (answers[1][1]["reason"], answers[1][2]["retry-after"]) == ("outbox_full", "1")
        assert len(outbox(service)) == 2
        _, story, _ = await ask(app, "GET", "/v1/reviews/b")
        assert (story["review"]["state"], story["labels"]) == ("claimed", [])


async def test_the_story_has_features_by_name_with_ages(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        made = receipt("a", rule_hits=["velocity"], list_hits=["watched-cards"], tiles_age_ms=1500)
        queue(service, made)
        status, told, _ = await ask(app, "GET", "/v1/reviews/a")
        assert status == 200
        features = {f["name"]: f for f in told["story"]["features"]}
        assert features["amount_minor"]["age_ms"] == 0
        assert features["card_count_5m"]["age_ms"] == 1500
        assert len(features) == len(made["features"])
        assert told["texts"] == {"velocity": "many payments in five minutes", "watched-cards": "Cards to look at."}
        assert told["story"]["digests"]["policy"] == made["policy_digest"]
        assert told["story"]["transaction"]["merchant_id"] == made["transaction"]["merchant_id"]


def test_features_of_other_code_have_no_names_here(tmp_path: Path) -> None:
    found = review_of(receipt("a", feature_fingerprint="other"), VIEW)
    assert found is not None and json.loads(found.story)["features"] is None


async def test_what_cannot_be_meant_is_a_problem_that_repeats_no_value(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        queue(service, receipt("a"))
        await ask(app, "POST", "/v1/reviews/a/claim", {})
        cases: list[tuple[str, str, Any, int, str]] = [
            ("GET", "/v1/reviews/none", None, 404, "not_found"),
            ("GET", "/v1/nothing", None, 404, "not_found"),
            ("PUT", "/v1/reviews", None, 405, "method_not_allowed"),
            ("GET", f"/v1/reviews?limit={PAGE_MAX + 1}", None, 422, "invalid"),
            ("GET", "/v1/reviews?cursor=secret-cursor", None, 422, "invalid"),
            ("GET", "/v1/reviews?order=secret", None, 422, "invalid"),
            ("POST", "/v1/reviews/a/claim", {"lease_s": 9}, 422, "invalid"),
            ("POST", "/v1/reviews/a/claim", b"{secret", 422, "malformed_json"),
            ("POST", "/v1/reviews/a/claim", {"secret": 1}, 422, "unknown_field"),
            ("POST", "/v1/reviews/a/decide", {"verdict": "secret"}, 422, "invalid"),
            ("POST", "/v1/reviews/a/decide", {"verdict": "fraud", "note": "n" * (NOTE_LENGTH_MAX + 1)}, 422, "invalid"),
            ("POST", "/v1/reviews/a/decide", {"verdict": "fraud", "note": f"card {CARD_NUMBER}"}, 422, "card_number"),
            ("POST", "/v1/reviews/a/decide", b" " * (MIB + 1), 413, "too_large"),
        ]
        for method, path, body, status, reason in cases:
            got, problem, headers = await ask(app, method, path, body)
            assert (got, problem["reason"], headers["content-type"]) == (status, reason, "application/problem+json"), path
            assert "secret" not in json.dumps(problem).replace("secrets", "") and CARD_NUMBER not in json.dumps(problem)
        got, _, _ = await ask(app, "GET", f"/v1/reviews?limit={PAGE_MAX}")
        noted, _, _ = await ask(app, "POST", "/v1/reviews/a/decide", {"verdict": "fraud", "note": "n" * NOTE_LENGTH_MAX})
        assert (got, noted) == (200, 200)


async def test_each_route_asks_for_a_key_of_its_scope(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.json"
    review, _ = create_key(path, "ann", ["review"], 100)
    admin, _ = create_key(path, "root", ["admin"], 3)
    with a_service(tmp_path, api_keys_path=str(path)) as (service, app):
        queue(service, receipt("a"))
        assert (await ask(app, "GET", "/v1/reviews"))[0] == 401
        assert (await ask(app, "GET", "/v1/reviews", authorization="Bearer fg_wrong"))[0] == 401
        assert (await ask(app, "GET", "/v1/reviews", authorization=f"Bearer {admin}"))[0] == 403
        assert (await ask(app, "GET", "/v1/lists", x_api_key=review))[0] == 403
        assert (await ask(app, "GET", "/v1/reviews", x_api_key=review))[0] == 200
        # The header that anybody may send names nobody where keys do.
        status, claimed, _ = await ask(app, "POST", "/v1/reviews/a/claim", {}, x_api_key=review, fraudgate_analyst="boss")
        assert (status, claimed["claimed_by"]) == (200, "ann")
        _, keys, _ = await ask(app, "GET", "/v1/keys", x_api_key=admin)
        assert [key["name"] for key in keys["keys"]] == ["ann", "root"] and "sha256" not in json.dumps(keys)
        answers = [await ask(app, "GET", "/v1/lists", x_api_key=admin) for _ in range(3)]
        assert [status for status, _, _ in answers] == [200, 200, 429]
        assert (await ask(app, "GET", "/healthz"))[0] == 200
        for secret in (review, admin):
            assert secret not in caplog.text + service.metrics.text().decode()


def test_without_keys_it_listens_on_loopback_alone(tmp_path: Path) -> None:
    with pytest.raises(UnguardedError):
        CaseService(Settings(home=str(tmp_path), host="0.0.0.0"))  # noqa: S104


async def test_decided_reviews_are_forgotten_after_their_time_and_open_ones_never(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        queue(service, receipt("a"), receipt("b"))
        await ask(app, "POST", "/v1/reviews/a/claim", {})
        await ask(app, "POST", "/v1/reviews/a/decide", {"verdict": "fraud"})
        assert service.database.call(lambda c: reviews.forget(c, before_ms=now_ms() - 1000, most=10)) == 0
        assert service.database.call(lambda c: reviews.forget(c, before_ms=now_ms() + 1000, most=10)) == 1
        assert (await ask(app, "GET", "/v1/reviews/a"))[0] == 404
        assert (await ask(app, "GET", "/v1/reviews/b"))[0] == 200


async def test_a_bug_is_a_problem_too_and_shows_nothing_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_service(tmp_path) as (service, app):

        async def broken(*_: object) -> None:
            raise KeyError("secret")

        monkeypatch.setattr(service, "lists", broken)
        # For the server's log; it was answered before.
        with pytest.raises(KeyError):
            await ask(app, "GET", "/v1/lists")
        assert 'reason="internal"' in service.metrics.text().decode()


async def test_the_api_describes_itself(tmp_path: Path) -> None:
    with a_service(tmp_path) as (_, app):
        status, schema, _ = await ask(app, "GET", "/openapi.json")
        assert status == 200
        assert {"/v1/reviews", "/v1/labels", "/v1/lists/{list_id}/entries", "/v1/dead-letters"} < set(schema["paths"])
        assert "Problem" in schema["components"]["schemas"]
        assert (await ask(app, "GET", "/readyz"))[0] == 503
