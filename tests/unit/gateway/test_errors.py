import msgspec
import pytest

from gateway.contracts.reasons import Refusal
from gateway.contracts.transaction import RefusedError
from gateway.errors import HTTP_ERRORS, GatewayError, OverloadedError, Problem, problem_reply


@pytest.mark.parametrize("reason", list(Refusal))
def test_each_refusal_is_a_client_error_with_its_reason(reason: Refusal) -> None:
    status, headers, body = problem_reply(RefusedError(reason, "card_id"))
    problem = msgspec.json.decode(body, type=Problem)
    assert 400 <= status < 500
    assert (problem.status, problem.reason, problem.field) == (status, reason.value, "card_id")
    assert problem.type.endswith(reason.value)
    assert (b"content-type", b"application/problem+json") in headers


@pytest.mark.parametrize("error", HTTP_ERRORS)
def test_retriable_errors_say_when_to_try_again(error: type[GatewayError]) -> None:
    _, headers, _ = problem_reply(error())
    assert (b"retry-after" in dict(headers)) == error.retriable


def test_an_overload_says_429() -> None:
    assert problem_reply(OverloadedError())[0] == 429
