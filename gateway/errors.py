"""What can go wrong between a caller and a decision, and the one place that turns it into an answer (RFC 9457 problem+json).

An error class carries the policy: its HTTP status, whether trying again helps, and the stable reason code. Nothing here ever
repeats a value that came from outside.
"""

from __future__ import annotations

import msgspec

from gateway.contracts.reasons import REFUSAL_TEXT, Refusal
from gateway.contracts.transaction import RefusedError

PROBLEM_TYPE_PREFIX = "urn:fraudgate:problem:"
PROBLEM_CONTENT_TYPE = b"application/problem+json"
RETRY_AFTER_S = 1


class GatewayError(Exception):
    """Base of the family. A subclass that is not answered over HTTP keeps `http_status` 500."""

    http_status = 500
    retriable = False
    reason = "internal"
    text = "the gateway failed"
    # The offending field of a request, where there is one.
    field: str | None = None


class OverloadedError(GatewayError):
    """As many transactions are in flight as the setting `in_flight_max` allows."""

    http_status = 429
    retriable = True
    reason = "overloaded"
    text = "too many transactions are in flight; try again after Retry-After"


class DrainingError(GatewayError):
    """The gateway is shutting down and takes nothing new."""

    http_status = 503
    retriable = True
    reason = "draining"
    text = "this gateway is shutting down; try again after Retry-After"


class InProgressError(GatewayError):
    """The same transaction is being decided elsewhere and has no answer yet."""

    http_status = 409
    retriable = True
    reason = "in_progress"
    text = "the same transaction is being decided right now; try again after Retry-After"


class MethodNotAllowedError(GatewayError):
    """/score knows POST alone."""

    http_status = 405
    reason = "method_not_allowed"
    text = "send a transaction with POST"


class BadExplainError(GatewayError):
    """The header Fraudgate-Explain is neither true nor false."""

    http_status = 400
    reason = "bad_explain"
    text = "Fraudgate-Explain must be true or false"


class BadDeadlineError(GatewayError):
    """The header with the caller's time limit can't be meant."""

    http_status = 400
    reason = "bad_deadline"
    text = "Fraudgate-Deadline-Ms must be a whole number of milliseconds, 1 to 999999"


class UnauthorizedError(GatewayError):
    """No API key came, or one that isn't known, is revoked or has expired. Which of them is not told."""

    http_status = 401
    reason = "unauthorized"
    text = "send an API key that is in force as Authorization: Bearer KEY, or X-Api-Key: KEY"


class ForbiddenError(GatewayError):
    """The API key has another scope."""

    http_status = 403
    reason = "forbidden"
    text = "this API key is not for that"


class RateLimitedError(GatewayError):
    """The API key has used up its calls a second."""

    http_status = 429
    retriable = True
    reason = "rate_limited"
    text = "this API key has made as many calls a second as it may; try again after Retry-After"


class MalformedRequestError(GatewayError):
    """What came is no HTTP request. The connection ends with this answer."""

    http_status = 400
    reason = "malformed_request"
    text = "not an HTTP request that can be read"


class RequestTimeoutError(GatewayError):
    """A request was begun and not finished in time. The connection ends with this answer."""

    http_status = 408
    reason = "request_timeout"
    text = "the request took too long to arrive"


class HeadTooLargeError(GatewayError):
    """Request line and headers are larger than HEAD_BYTES_MAX. The connection ends with this answer."""

    http_status = 431
    reason = "head_too_large"
    text = "the request line and headers are too large"


class ModelRefusedError(GatewayError):
    """A model of the local directory must not serve: a wrong checksum, fingerprint, width or golden row."""

    reason = "model_refused"


class PolicyRefusedError(GatewayError):
    """A policy file must not serve. The message names the place in it."""

    reason = "policy_refused"


REFUSAL_STATUS: dict[Refusal, int] = {
    **dict.fromkeys(Refusal, 422),
    Refusal.TOO_LARGE: 413,
    Refusal.NOT_UTF8: 400,
    Refusal.MALFORMED_JSON: 400,
    Refusal.DUPLICATE_KEY: 400,
    Refusal.IDEMPOTENCY_CONFLICT: 409,
}
HTTP_ERRORS: tuple[type[GatewayError], ...] = (
    OverloadedError,
    DrainingError,
    InProgressError,
    MethodNotAllowedError,
    BadDeadlineError,
    BadExplainError,
    UnauthorizedError,
    ForbiddenError,
    RateLimitedError,
    MalformedRequestError,
    RequestTimeoutError,
    HeadTooLargeError,
)
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
assert set(REFUSAL_STATUS.values()) | {e.http_status for e in HTTP_ERRORS} | {404, 500} == set(TITLES)


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457 with two members of ours: `reason`, the stable code, and `field`, the offending field where there is one."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    field: str | None = None
    retriable: bool = False


def problem_of(error: RefusedError | GatewayError) -> Problem:
    """The answer to an error."""
    if isinstance(error, RefusedError):
        status, reason, detail, field, retriable = REFUSAL_STATUS[error.reason], error.reason.value, "", error.field, False
        detail = REFUSAL_TEXT[error.reason]
    else:
        status, reason, detail, field, retriable = error.http_status, error.reason, error.text, error.field, error.retriable
    return Problem(
        type=PROBLEM_TYPE_PREFIX + reason,
        title=TITLES[status],
        status=status,
        detail=detail,
        reason=reason,
        field=field,
        retriable=retriable,
    )


_encoder = msgspec.json.Encoder()
Headers = list[tuple[bytes, bytes]]


def problem_reply(error: RefusedError | GatewayError) -> tuple[int, Headers, bytes]:
    """(status, headers, body) of the answer to an error."""
    problem = problem_of(error)
    body = _encoder.encode(problem)
    headers: Headers = [(b"content-type", PROBLEM_CONTENT_TYPE), (b"content-length", str(len(body)).encode())]
    if problem.retriable:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if problem.status == MethodNotAllowedError.http_status:
        headers.append((b"allow", b"POST"))
    if problem.status == UnauthorizedError.http_status:
        headers.append((b"www-authenticate", b"Bearer"))
    return problem.status, headers, body
