"""`python -m loadtest.peers.empty_fastapi PORT`: a FastAPI endpoint with a pydantic body that does nothing."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI

from loadtest.peers.payment import Payment

app = FastAPI()


@app.post("/score")
async def score(payment: Payment) -> dict[str, str | int]:
    return {"transaction_id": payment.transaction_id, "decision": "approve", "risk_score": 0}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
