"""`python -m loadtest.peers.empty_uvicorn PORT`: reads the body and answers 200 bytes. What HTTP in Python costs at the least."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

BODY = b'{"decision":"approve","padding":"' + b"x" * 165 + b'"}'
assert len(BODY) == 200
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"200")]

Message = MutableMapping[str, Any]


async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", lifespan="off", access_log=False, log_level="warning")
