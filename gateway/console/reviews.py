"""The review queue's way through the console: an analyst's call goes on to the case service with the analyst's own key.

Only what the page needs passes: the queue, a story, and claim, release and decide. Whose verdict it is, the case service says by the key.
"""

from __future__ import annotations

import asyncio
import re

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import GatewayError

TIMEOUT_S = 5.0
BODY_BYTES_MAX = 16 * 1024
ANSWER_BYTES_MAX = 1024 * 1024
UNDER_WAY_MAX = 8
PASSED = ("authorization", "x-api-key", "fraudgate-analyst")
_read = re.compile(r"reviews(/[A-Za-z0-9._:-]{1,64})?").fullmatch
_write = re.compile(r"reviews/[A-Za-z0-9._:-]{1,64}/(claim|release|decide)").fullmatch


class NoCasesError(GatewayError):
    """The case service doesn't answer."""

    http_status = 503
    retriable = True
    reason = "no_cases"
    text = "the case service doesn't answer; reviews wait, decisions go on"


class NotPassedError(GatewayError):
    """No call that the console's page makes."""

    http_status = 404
    reason = "not_passed"
    text = "the console passes on the calls of its own page alone"


class TooMuchError(GatewayError):
    """The call's body is larger than any that the page makes."""

    http_status = 413
    reason = "too_large"
    text = "the body is larger than the console passes on"


class NotJsonError(GatewayError):
    """A form of another site could send this."""

    http_status = 422
    reason = "not_json"
    text = "send JSON, as application/json"


class Reviews:
    """`url` is the case service's root."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None
        self._under_way = asyncio.Semaphore(UNDER_WAY_MAX)

    async def pass_on(self, request: Request) -> Response:
        """Raises `NotPassedError`, `TooMuchError`, `NotJsonError`, `NoCasesError`."""
        path = request.path_params["path"]
        writes = request.method == "POST"
        if not (_write(path) if writes else _read(path)):
            raise NotPassedError
        body = b""
        if writes:
            if request.headers.get("content-type", "").split(";")[0] != "application/json":
                # A browser asks before it sends that to another site, and it is not told yes.
                raise NotJsonError
            async for part in request.stream():
                body += part
                if len(body) > BODY_BYTES_MAX:
                    raise TooMuchError
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        try:
            async with asyncio.timeout(TIMEOUT_S), self._under_way:
                return await self._ask(request, path, headers, body if writes else None)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise NoCasesError from exc

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(self, request: Request, path: str, headers: dict[str, str], body: bytes | None) -> Response:
        if self._session is None:
            self._session = aiohttp.ClientSession(trust_env=False, auto_decompress=False)
        if body is not None:
            headers["content-type"] = "application/json"
        query = dict(request.query_params)
        url = f"{self._url}/v1/{path}"
        async with self._session.request(
            request.method, url, params=query, headers=headers, data=body, allow_redirects=False
        ) as reply:
            answer = b""
            while part := await reply.content.read(ANSWER_BYTES_MAX):
                answer += part
                if len(answer) > ANSWER_BYTES_MAX:
                    raise NoCasesError
            passed = {"content-type": reply.headers.get("content-type", "application/json")}
            if "retry-after" in reply.headers:
                passed["retry-after"] = reply.headers["retry-after"]
            return Response(answer, reply.status, passed)
