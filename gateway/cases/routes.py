"""The routes under /v1. Each asks for an API key of one scope; whose it is stands as `who` in claims, labels, lists and audit records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from gateway.api_keys import Scope, presented, read_keys
from gateway.cases.bodies import (
    ClaimBody,
    DeadLetterPage,
    DecideBody,
    EntryBody,
    EntryPage,
    Id,
    Key,
    Keys,
    LabelPage,
    LabelsBody,
    LabelsTaken,
    Lists,
    ListVersion,
    Reason,
    Review,
    ReviewPage,
    Story,
)
from gateway.cases.errors import CASE_ERRORS, InvalidError
from gateway.cases.labels import check_id
from gateway.cases.reviews import CURSOR_LENGTH_MAX, PAGE_MAX, Filter, Order, State
from gateway.cases.service import CaseService
from gateway.errors import ForbiddenError, GatewayError, RateLimitedError, UnauthorizedError

# Who it is where no key is asked for: on loopback, whoever says so.
ANALYST_HEADER = "fraudgate-analyst"
NOBODY = "local"
INT64_MAX = 2**63 - 1

_BY_STATUS: dict[int, list[str]] = {}
_ERRORS: tuple[type[GatewayError], ...] = (*CASE_ERRORS, UnauthorizedError, ForbiddenError, RateLimitedError)
for _error in _ERRORS:
    _BY_STATUS.setdefault(_error.http_status, []).append(_error.reason)
PROBLEMS: dict[int | str, dict[str, object]] = {
    status: {
        "description": f"reason: {', '.join(reasons)}",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, reasons in sorted(_BY_STATUS.items())
}
router = APIRouter(prefix="/v1", responses=PROBLEMS)


def service_of(request: Request) -> CaseService:
    service = request.app.state.service
    assert isinstance(service, CaseService)
    return service


def _who(request: Request, scope: Scope) -> str:
    """Raises `UnauthorizedError`, `ForbiddenError`, `RateLimitedError`."""
    keys = service_of(request).keys
    headers = request.headers
    if keys is not None:
        found = [headers.get(name) for name in ("authorization", "x-api-key")]
        authorization, x_api_key = (None if value is None else value.encode("latin-1") for value in found)
        return keys.check(presented(authorization, x_api_key), scope).name
    name = headers.get(ANALYST_HEADER, NOBODY)
    check_id(name, ANALYST_HEADER)
    return name


def reviewer(request: Request) -> str:
    return _who(request, "review")


def administrator(request: Request) -> str:
    return _who(request, "admin")


Service = Annotated[CaseService, Depends(service_of)]
Reviewer = Annotated[str, Depends(reviewer)]
Administrator = Annotated[str, Depends(administrator)]
Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]
Least = Annotated[int | None, Query(ge=0, le=INT64_MAX)]


@router.get("/reviews", tags=["reviews"], summary="Decisions that need a person")
async def list_reviews(
    service: Service,
    who: Reviewer,
    state: State | None = "open",
    why: Annotated[str | None, Query(max_length=64)] = None,
    card_id: Annotated[str | None, Query(max_length=64)] = None,
    customer_id: Annotated[str | None, Query(max_length=64)] = None,
    merchant_id: Annotated[str | None, Query(max_length=64)] = None,
    amount_minor_least: Least = None,
    risk_score_least: Least = None,
    mine: Annotated[bool, Query(description="only what the caller has claimed")] = False,
    order: Annotated[Order, Query(description="amount and risk: the greatest first; age: the oldest first")] = "age",
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(max_length=CURSOR_LENGTH_MAX)] = None,
) -> ReviewPage:
    wanted = Filter(
        state="claimed" if mine else state,
        why=why,
        card_id=card_id,
        customer_id=customer_id,
        merchant_id=merchant_id,
        amount_minor_least=amount_minor_least,
        risk_score_least=risk_score_least,
        claimed_by=who if mine else None,
    )
    found, next_cursor = await service.list_reviews(wanted, order, limit, cursor)
    return ReviewPage(reviews=[Review(**review) for review in found], next_cursor=next_cursor)


@router.get("/reviews/{transaction_id}", tags=["reviews"], summary="The story of one decision")
async def review(service: Service, who: Reviewer, transaction_id: str) -> Story:
    return Story(**await service.review(transaction_id))


@router.post("/reviews/{transaction_id}/claim", tags=["reviews"], summary="Hold a review, or go on holding it")
async def claim(service: Service, who: Reviewer, transaction_id: str, body: ClaimBody) -> Review:
    lease_s = service.settings.cases_lease_s if body.lease_s is None else body.lease_s
    return Review(**await service.claim(transaction_id, who, lease_s))


@router.post("/reviews/{transaction_id}/release", tags=["reviews"], summary="Let go of a review")
async def release(service: Service, who: Reviewer, transaction_id: str) -> Review:
    return Review(**await service.release(transaction_id, who))


@router.post(
    "/reviews/{transaction_id}/decide", tags=["reviews"], summary="Decide a review that is held; the verdict becomes a label"
)
async def decide(service: Service, who: Reviewer, transaction_id: str, body: DecideBody) -> Review:
    return Review(**await service.decide(transaction_id, who, body.verdict, body.note))


@router.post("/labels", tags=["labels"], summary="What became known about payments: chargebacks, refunds, verdicts")
async def add_labels(service: Service, who: Reviewer, body: LabelsBody) -> LabelsTaken:
    new = await service.add_labels([label.label() for label in body.labels], who, body.reason)
    return LabelsTaken(received=len(body.labels), new=new)


@router.get("/labels/{transaction_id}", tags=["labels"], summary="The labels of one transaction that came through here")
async def labels_of(service: Service, who: Reviewer, transaction_id: str) -> LabelPage:
    return LabelPage.model_validate({"labels": await service.labels_of(transaction_id)})


@router.get("/lists", tags=["lists"], summary="The lists that the policy declares")
async def all_lists(service: Service, who: Administrator) -> Lists:
    return Lists.model_validate({"lists": await service.lists()})


@router.get("/lists/{list_id}/entries", tags=["lists"], summary="Who stands on a list, by value")
async def entries(
    service: Service, who: Administrator, list_id: str, limit: Limit = 50, after: Annotated[str | None, Query(max_length=64)] = None
) -> EntryPage:
    found, next_after = await service.entries(list_id, limit, after)
    return EntryPage.model_validate({"entries": found, "next_after": next_after})


@router.post("/lists/{list_id}/entries", tags=["lists"], summary="Put somebody on a list, or change expiry and reason")
async def add_entry(service: Service, who: Administrator, list_id: str, body: EntryBody) -> ListVersion:
    return ListVersion(version=await service.add_entry(list_id, body.entity_value, body.expires_at_ms, body.reason, who))


@router.delete("/lists/{list_id}/entries/{entity_value}", tags=["lists"], summary="Take somebody off a list")
async def remove_entry(
    service: Service, who: Administrator, list_id: str, entity_value: Id, reason: Annotated[Reason, Query(min_length=1)]
) -> ListVersion:
    return ListVersion(version=await service.remove_entry(list_id, entity_value, reason, who))


@router.get("/dead-letters", tags=["webhooks"], summary="Messages that no webhook took")
async def dead_letters(
    service: Service,
    who: Administrator,
    limit: Limit = 50,
    after: Annotated[int, Query(ge=0, le=INT64_MAX)] = 0,
    webhook: Annotated[str | None, Query(max_length=64)] = None,
) -> DeadLetterPage:
    found, next_after = await service.dead_letters(limit, after, webhook)
    return DeadLetterPage.model_validate({"dead_letters": found, "next_after": next_after})


@router.post("/dead-letters/{letter_id}/retry", tags=["webhooks"], status_code=204, summary="Send a dead letter again")
async def retry_dead_letter(service: Service, who: Administrator, letter_id: int) -> None:
    await service.retry_dead_letter(_letter(letter_id), who)


@router.delete("/dead-letters/{letter_id}", tags=["webhooks"], status_code=204, summary="Remove a dead letter")
async def discard_dead_letter(service: Service, who: Administrator, letter_id: int) -> None:
    await service.discard_dead_letter(_letter(letter_id), who)


def _letter(letter_id: int) -> int:
    if not 0 <= letter_id <= INT64_MAX:
        raise InvalidError("letter_id", "must be the id of a dead letter")
    return letter_id


@router.get("/keys", tags=["keys"], summary="The API keys, without anything of them; fraudgate keys makes and revokes them")
def api_keys(service: Service, who: Administrator) -> Keys:
    path = service.settings.api_keys_path
    found = read_keys(Path(path).expanduser()).keys if path else []
    return Keys(keys=[Key.model_validate({name: getattr(key, name) for name in Key.model_fields}) for key in found])
