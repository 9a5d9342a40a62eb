"""The case service as an ASGI application: routes, problems instead of errors, bodies within bounds."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.cases.errors import BodyTooLargeError, InvalidError, NotFoundError
from gateway.cases.routes import router
from gateway.cases.service import CaseService
from gateway.errors import DrainingError, GatewayError, MethodNotAllowedError, Problem, RequestTimeoutError, problem_reply

log = logging.getLogger(__name__)

CODE_VERSION = version("fraudgate")
BODY_BYTES_MAX = 1_048_576
FIELD_LENGTH_MAX = 200


class BoundedBodies:
    """Answers 413 for a body larger than BODY_BYTES_MAX before anybody reads it whole, and 408 for one that takes `timeout_s` to arrive."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        size, more = 0, True
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > BODY_BYTES_MAX:
                await _answer(BodyTooLargeError(), send)
                return
        try:
            async with asyncio.timeout(self._timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > BODY_BYTES_MAX:
                        await _answer(BodyTooLargeError(), send)
                        return
        except TimeoutError:
            await _answer(RequestTimeoutError(), send)
            return
        body: Message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return body

        await self._app(scope, again, send)


async def _answer(error: GatewayError, send: Send) -> None:
    status, headers, body = problem_reply(error)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


def make_app(service: CaseService) -> FastAPI:
    """The application; it starts and stops `service`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    api = FastAPI(
        title="Fraudgate cases",
        version=CODE_VERSION,
        lifespan=lifespan,
        description="Reviews, labels, lists and webhooks. Errors are RFC 9457 problem+json.",
    )
    api.state.service = service
    api.include_router(router)
    api.add_middleware(BoundedBodies, timeout_s=service.settings.request_timeout_ms / 1000)

    def problem(error: GatewayError) -> Response:
        service.metrics.refused.labels(error.reason).inc()
        status, headers, body = problem_reply(error)
        return Response(body, status, {name.decode(): value.decode() for name, value in headers})

    @api.exception_handler(GatewayError)
    async def refused(_: Request, exc: GatewayError) -> Response:
        return problem(exc)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, exc: RequestValidationError) -> Response:
        return problem(_invalid(exc))

    @api.exception_handler(HTTPException)
    async def no_route(_: Request, exc: HTTPException) -> Response:
        return problem(NoMethodError() if exc.status_code == MethodNotAllowedError.http_status else NotFoundError())

    @api.exception_handler(sqlite3.Error)
    async def broken(_: Request, exc: sqlite3.Error) -> Response:
        log.error("cases: the database failed", exc_info=exc)
        return problem(DatabaseFailedError())

    @api.exception_handler(Exception)
    async def failed(_: Request, exc: Exception) -> Response:
        # A bug: the server logs it with its traceback, the caller learns no more than that.
        return problem(GatewayError())

    @api.get("/healthz", summary="Alive")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/readyz", summary="Ready, and by which policy", responses={503: {"description": "not ready"}})
    async def readyz(response: Response) -> dict[str, Any]:
        if not service.well:
            response.status_code = DrainingError.http_status
        return {
            "ready": service.well,
            "policy": service.policy.view.digest,
            "keys": service.keys is not None,
            "webhooks": sorted(service.webhooks.webhooks),
            "code_version": CODE_VERSION,
        }

    @api.get("/metrics", summary="Metrics in Prometheus' exposition format", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
            _, components = msgspec.json.schema_components((Problem,), ref_template="#/components/schemas/{name}")
            schema["components"]["schemas"].update(components)
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "fraudgate keys create"}
            }
            schema["security"] = [{"key": []}]
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    return api


class NoMethodError(GatewayError):
    """The path has other methods."""

    http_status = 405
    reason = "method_not_allowed"
    text = "this path has other methods; GET /docs shows them"


class DatabaseFailedError(GatewayError):
    """The database can't be read or written. Nothing was changed."""

    http_status = 503
    retriable = True
    reason = "database"
    text = "the database can't be used right now; try again after Retry-After"


def _invalid(exc: RequestValidationError) -> InvalidError:
    """The first thing that is wrong with a request. Where and what should be there, never the value."""
    first = exc.errors()[0]
    if first["type"] == "json_invalid":
        return InvalidError("body", "is not JSON", "malformed_json")
    place = ".".join(str(part) for part in first["loc"][1:]) or "body"
    if first["type"] == "extra_forbidden":
        # The name came from outside.
        return InvalidError("body", "has a field that is not known here", "unknown_field")
    return InvalidError(place[:FIELD_LENGTH_MAX], str(first["msg"]))
