"""The hash that shares cards and draws explorations: the kernel against plain Python, and what a split needs of it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gateway.contracts.routing import EXPLORE_SALT, point_of, route_salt
from gateway.kernels.intake import CARD, TRANSACTION_ID
from gateway.kernels.points import points
from gateway.scoring.job import requests_of
from tests.unit.gateway.factories import make_job, make_transaction

SALTS = [0, EXPLORE_SALT, route_salt("ab" * 32), 2**64 - 1]


@pytest.mark.parametrize("salt", SALTS)
@pytest.mark.parametrize(("place", "field"), [(CARD, "card_id"), (TRANSACTION_ID, "transaction_id")])
def test_the_kernels_points_are_those_of_plain_python(salt: int, place: int, field: str) -> None:
    transactions = [
        make_transaction(f"t{i}", card_id="c" + hashlib.sha256(bytes([i])).hexdigest()[: i % 60], device_id="d" * (i % 3) or None)
        for i in range(100)
    ]
    requests = requests_of([make_job(t) for t in transactions])
    rows = np.arange(99, -1, -3)
    found = np.empty(len(rows))
    points(requests.buf, requests.starts, requests.lengths, rows, place, np.uint64(salt), found)
    assert found.tolist() == [point_of(getattr(transactions[i], field).encode(), salt) for i in rows]


def test_a_point_stays_what_it_is() -> None:
    # Receipts are explained by it for years: these numbers must not change.
    assert point_of(b"card-1", route_salt("ab" * 32)) == 0.35015015373766323
    assert point_of(b"t1", EXPLORE_SALT) == 0.9739804087645919


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_neighbouring_cards_are_shared_evenly_and_each_challenger_gets_others(share: float) -> None:
    cards = [f"card-{i:06d}".encode() for i in range(20_000)]
    first, second = (np.array([point_of(card, route_salt(digest * 32)) for card in cards]) < share for digest in ("ab", "cd"))
    sigma = np.sqrt(share * (1 - share) / len(cards))
    assert abs(first.mean() - share) < 4 * sigma
    assert abs(second.mean() - share) < 4 * sigma
    # Independent draws: the part that both get is share squared.
    both = share * share
    assert abs((first & second).mean() - both) < 4 * np.sqrt(both * (1 - both) / len(cards))
    # And neither follows the order of the cards.
    assert abs(first[:10_000].mean() - first[10_000:].mean()) < 6 * sigma
