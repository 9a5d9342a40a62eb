"""Bodies and answers of the case service, as FastAPI checks and documents them. Unknown fields and other types than these are refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gateway.cases.reviews import NOTE_LENGTH_MAX, State, Verdict
from gateway.contracts.label import Label, LabelSource, LabelState
from gateway.contracts.lists import REASON_CHARS_MAX
from gateway.contracts.transaction import TEXT_LENGTH_MAX

LABELS_MAX = 1000
LEASE_S_MIN, LEASE_S_MAX = 10, 86_400
INT64_MAX = 2**63 - 1
Id = Annotated[str, Field(min_length=1, max_length=TEXT_LENGTH_MAX)]
Millis = Annotated[int, Field(ge=0, le=INT64_MAX)]
Reason = Annotated[str, Field(max_length=REASON_CHARS_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ClaimBody(_Body):
    """How long to hold a review, seconds; the setting `cases_lease_s` when it isn't said."""

    lease_s: Annotated[int, Field(ge=LEASE_S_MIN, le=LEASE_S_MAX)] | None = None


class DecideBody(_Body):
    """What the analyst found, and why."""

    verdict: Verdict
    note: Annotated[str, Field(max_length=NOTE_LENGTH_MAX)] = ""


class LabelBody(_Body):
    """What became known about a payment. `reported_at_ms` is when; sent again with the same values it is the same label."""

    transaction_id: Id
    card_id: Id
    is_fraud: bool
    source: LabelSource
    state: LabelState
    reported_at_ms: Millis
    amount_minor: Millis | None = None
    effective_at_ms: Millis | None = None

    def label(self) -> Label:
        return Label(**self.model_dump())


class LabelsBody(_Body):
    """All of them are taken, or none."""

    labels: Annotated[list[LabelBody], Field(min_length=1, max_length=LABELS_MAX)]
    reason: Reason = ""


class EntryBody(_Body):
    """Who is to stand on a list, until when (null: for ever) and why."""

    entity_value: Id
    expires_at_ms: Millis | None = None
    reason: Annotated[str, Field(min_length=1, max_length=REASON_CHARS_MAX)]


class Review(BaseModel):
    """`why`: review (the outcome) or watch_list. `claimed_by` and `claimed_until_ms` while somebody holds it."""

    transaction_id: str
    state: State
    why: str
    outcome: str
    risk_score: int
    amount_minor: int
    currency: str
    card_id: str
    customer_id: str
    merchant_id: str
    event_time_ms: int
    decided_at_ms: int
    queued_at_ms: int
    claimed_by: str | None
    claimed_until_ms: int | None
    verdict: str | None
    note: str | None
    verdict_who: str | None
    verdict_at_ms: int | None


class ReviewPage(BaseModel):
    """`next_cursor` is null on the last page."""

    reviews: list[Review]
    next_cursor: str | None


class KnownLabel(LabelBody):
    """A label, with who brought it and when."""

    who: str
    at_ms: int


class Story(BaseModel):
    """`story` is the receipt with features by name, value and age; `texts` what rules and lists that were hit tell an analyst."""

    review: Review
    story: dict[str, Any]
    texts: dict[str, str]
    labels: list[KnownLabel]


class LabelPage(BaseModel):
    labels: list[KnownLabel]


class LabelsTaken(BaseModel):
    """`new` of `received` weren't known before."""

    received: int
    new: int


class ListSummary(BaseModel):
    """`entries` counts expired ones too."""

    id: str
    field: str
    kind: str
    owner: str
    text: str
    entries: int


class Lists(BaseModel):
    lists: list[ListSummary]


class Entry(BaseModel):
    entity_value: str
    expires_at_ms: int | None
    reason: str
    who: str
    at_ms: int


class EntryPage(BaseModel):
    """`next_after` is null on the last page."""

    entries: list[Entry]
    next_after: str | None


class ListVersion(BaseModel):
    """The version of all lists from which on the change holds; receipts carry the version they were decided by."""

    version: int


class DeadLetter(BaseModel):
    id: int
    webhook: str
    message_id: str
    kind: str
    subject: str
    body: dict[str, Any]
    created_at_ms: int
    attempts: int
    failure: str
    dead_at_ms: int


class DeadLetterPage(BaseModel):
    dead_letters: list[DeadLetter]
    next_after: int | None


class Key(BaseModel):
    """An API key, without anything of it."""

    name: str
    scopes: list[str]
    rate_per_s: int
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None


class Keys(BaseModel):
    keys: list[Key]
