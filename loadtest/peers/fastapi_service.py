"""`python -m loadtest.peers.fastapi_service PORT REDIS_URL MODEL.onnx`: the usual way to serve such a model.

FastAPI with a pydantic body, a Redis hash of features for each entity (HGETALLs in one pipeline), one model call a request. It writes
nothing, publishes nothing and has no rules. The hashes are written by
`loadtest.peers.requests.fill`.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
import redis.asyncio
import uvicorn
from fastapi import FastAPI

from gateway.contracts.features import ENTITIES, FEATURE_NAMES
from gateway.contracts.model_meta import INPUT_NAME, OUTPUT_NAME
from loadtest.peers.payment import Payment

INDEX = {name: i for i, name in enumerate(FEATURE_NAMES)}


def make_app(redis_url: str, model_path: str) -> FastAPI:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model_path, options, providers=["CPUExecutionProvider"])
    store = redis.asyncio.Redis.from_url(redis_url, max_connections=256, decode_responses=True)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await store.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/score")
    async def score(payment: Payment) -> dict[str, Any]:
        pipe = store.pipeline(transaction=False)
        for entity in ENTITIES:
            entity_id = getattr(payment, entity.field)
            if entity_id is not None:
                pipe.hgetall(f"{entity.name}:{entity_id}")
        hashes = await pipe.execute()
        row = np.full((1, len(FEATURE_NAMES)), np.nan, np.float32)
        row[0, INDEX["amount_minor"]] = payment.amount_minor
        for values in hashes:
            for field, value in values.items():
                row[0, INDEX[str(field)]] = float(value)
        probability = float(session.run([OUTPUT_NAME], {INPUT_NAME: row})[0][0, 1])
        return {
            "transaction_id": payment.transaction_id,
            "decision": "approve" if probability < 0.5 else "decline",
            "risk_score": round(probability * 1000),
            "probability": probability,
        }

    return app


if __name__ == "__main__":
    uvicorn.run(
        make_app(sys.argv[2], sys.argv[3]),
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
