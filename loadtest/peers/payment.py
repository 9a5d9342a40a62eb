"""Our transaction as a pydantic model: what a FastAPI service declares as its body."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.contracts.transaction import AMOUNT_MINOR_MAX, BIN_PATTERN, COUNTRY_PATTERN, ID_PATTERN, MCC_PATTERN

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Country = Annotated[str, Field(pattern=COUNTRY_PATTERN)]


class Payment(BaseModel):
    model_config = ConfigDict(extra="forbid")

    transaction_id: Id
    event_time_ms: int
    card_id: Id
    customer_id: Id
    merchant_id: Id
    amount_minor: Annotated[int, Field(ge=0, le=AMOUNT_MINOR_MAX)]
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    channel: Literal["pos", "ecom", "atm", "moto"]
    mcc: Annotated[str, Field(pattern=MCC_PATTERN)]
    country: Country
    device_id: Id | None = None
    ip: Id | None = None
    card_bin: Annotated[str, Field(pattern=BIN_PATTERN)] | None = None
    card_country: Country | None = None
    latitude: Annotated[float, Field(ge=-90, le=90)] | None = None
    longitude: Annotated[float, Field(ge=-180, le=180)] | None = None
