"""What the case service refuses, beside the family in gateway/errors.py, which turns it into problem+json."""

from __future__ import annotations

from gateway.errors import GatewayError


class NotFoundError(GatewayError):
    """There is no such review, list, entry, dead letter or path."""

    http_status = 404
    reason = "not_found"
    text = "there is nothing of that name here"


class ClaimedError(GatewayError):
    """Another analyst holds the review."""

    http_status = 409
    reason = "claimed"
    text = "another analyst holds this review until its lease ends"


class NotClaimedError(GatewayError):
    """Who decides or releases a review holds it."""

    http_status = 409
    reason = "not_claimed"
    text = "claim this review first; a lease that has ended counts no longer"


class DecidedError(GatewayError):
    """The review has a verdict."""

    http_status = 409
    reason = "decided"
    text = "this review has been decided"


class ListFullError(GatewayError):
    """As many entries stand on lists as may."""

    http_status = 409
    reason = "list_full"
    text = "no more entries or lists are possible; remove some first"


class InvalidError(GatewayError):
    """A value of the request can't be meant. `field` says which; the value is never repeated."""

    http_status = 422
    reason = "invalid"
    text = "a value is not what it must be"

    def __init__(self, field: str, text: str, reason: str = "invalid") -> None:
        super().__init__(f"{field}: {text}")
        self.field = field
        self.text = text
        self.reason = reason


class BodyTooLargeError(GatewayError):
    """A body larger than BODY_BYTES_MAX."""

    http_status = 413
    reason = "too_large"
    text = "the body is larger than the documented limit"


class OutboxFullError(GatewayError):
    """As many records wait for Kafka as the setting `cases_outbox_max` allows."""

    http_status = 503
    retriable = True
    reason = "outbox_full"
    text = "too many changes wait for Kafka; try again after Retry-After"


class KafkaUnavailableError(GatewayError):
    """Kafka didn't acknowledge a change in time. It may have taken it all the same: trying again changes nothing then."""

    http_status = 503
    retriable = True
    reason = "kafka_unavailable"
    text = "Kafka didn't acknowledge the change; try again after Retry-After"


CASE_ERRORS: tuple[type[GatewayError], ...] = (
    NotFoundError,
    ClaimedError,
    NotClaimedError,
    DecidedError,
    ListFullError,
    InvalidError,
    BodyTooLargeError,
    OutboxFullError,
    KafkaUnavailableError,
)
