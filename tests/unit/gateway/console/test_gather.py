import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.console.gather import LINGER_S, STORIES_KEPT, Gatherer, event
from gateway.console.picture import State
from gateway.console.viewers import Viewers
from gateway.contracts.features import FEATURES
from gateway.kafka.avro import encode_receipt
from gateway.metrics import Metrics
from tests.factories_history import make_receipt
from tests.unit.gateway.console.factories import STATUS, Clock, decide, make_gatherer, make_state
from tests.unit.gateway.factories import make_transaction

pytestmark = pytest.mark.anyio


def data_of(frame: bytes) -> tuple[str, dict[str, Any]]:
    head, data = frame.decode().strip().split("\n")
    assert head.startswith("event: ") and data.startswith("data: ")
    return head[7:], msgspec.json.decode(data[6:])


def sampled(state: State) -> bool:
    return state.tap.watching


async def ended(gatherer: Gatherer, viewers: Viewers, clock: Clock) -> None:
    """Long after the last has left."""
    viewers.close()
    clock.now_s += LINGER_S + 1
    await gatherer.tick()


async def test_nobody_is_asked_and_nothing_sampled_while_nobody_watches(tmp_path: Path) -> None:
    clock, metrics, state = Clock(), Metrics(), make_state(tmp_path)
    viewers = Viewers(2, metrics)
    gatherer = make_gatherer(state, metrics, clock, viewers)
    await gatherer.tick()
    assert sampled(state) is False
    assert state.jobs.trouble is None, "it was asked"
    viewer = viewers.join()
    assert viewer is not None
    await gatherer.tick()
    assert sampled(state)
    viewers.leave(viewer)
    gatherer.wake()
    clock.now_s += LINGER_S - 1
    await gatherer.tick()
    assert sampled(state), "a reload must find all as it was"
    clock.now_s += 2
    await gatherer.tick()
    assert not sampled(state)


async def test_charts_have_a_past_from_before_anybody_watched(tmp_path: Path) -> None:
    clock, metrics, state = Clock(), Metrics(), make_state(tmp_path)
    viewers = Viewers(2, metrics)
    gatherer = make_gatherer(state, metrics, clock, viewers)
    for _ in range(5):
        await gatherer.tick()
        decide(metrics, 50, ms=3.0)
        clock.now_s += 5
    name, told = data_of(await gatherer.hello())
    assert name == "hello"
    assert [point[1] for point in told["history"]] == [0, 10, 10, 10, 10, 10]
    assert told["history"][-1][2] is not None
    assert len(told["features"]) == len(FEATURES)
    await ended(gatherer, viewers, clock)


async def test_all_viewers_get_the_same_bytes_of_one_reading(tmp_path: Path) -> None:
    clock, metrics, state = Clock(), Metrics(), make_state(tmp_path)
    viewers = Viewers(2, metrics)
    gatherer = make_gatherer(state, metrics, clock, viewers)
    one, two = viewers.join(), viewers.join()
    assert one is not None and two is not None
    await gatherer.tick()
    frame = await one.frames.get()
    assert frame is await two.frames.get()
    name, told = data_of(frame)
    assert name == "frame"
    assert told["verdict"]["level"] in ("well", "watch")
    await ended(gatherer, viewers, clock)


async def test_a_story_goes_out_once_and_stays_for_those_who_come_later(tmp_path: Path) -> None:
    clock, metrics, state = Clock(), Metrics(), make_state(tmp_path)
    viewers = Viewers(2, metrics)
    gatherer = make_gatherer(state, metrics, clock, viewers)
    viewer = viewers.join()
    assert viewer is not None
    receipt = make_receipt(make_transaction("told"), rule_hits=["amount-limit"])
    state.tap._waiting.append(encode_receipt(receipt))
    await gatherer.tick()
    [story] = data_of(await viewer.frames.get())[1]["stories"]
    assert story["transaction_id"] == "told"
    assert story["texts"] == {"amount-limit": "too much"}
    assert len(story["values"]) == len(FEATURES)
    clock.now_s += 1
    await gatherer.tick()
    assert data_of(await viewer.frames.get())[1]["stories"] == []
    assert [s["transaction_id"] for s in data_of(await gatherer.hello())[1]["stories"]] == ["told"]
    for i in range(STORIES_KEPT + 5):
        state.tap._waiting.append(encode_receipt(make_receipt(make_transaction(f"t{i}"))))
        await gatherer.tick()
        await viewer.frames.get()
    assert len(data_of(await gatherer.hello())[1]["stories"]) == STORIES_KEPT
    await ended(gatherer, viewers, clock)


async def test_alerts_go_out_when_there_are_new_ones_and_not_with_each_frame(tmp_path: Path) -> None:
    clock, metrics, state = Clock(), Metrics(), make_state(tmp_path)
    viewers = Viewers(1, metrics)
    gatherer = make_gatherer(state, metrics, clock, viewers)
    viewer = viewers.join()
    assert viewer is not None
    for expected in (True, False):
        await gatherer.tick()
        assert ("alerts" in data_of(await viewer.frames.get())[1]) is expected
    state.alerts.version += 1
    await gatherer.tick()
    assert "alerts" in data_of(await viewer.frames.get())[1]
    await ended(gatherer, viewers, clock)


async def test_a_bug_in_one_frame_costs_that_frame_alone(tmp_path: Path) -> None:
    clock, metrics, state = Clock(), Metrics(), make_state(tmp_path)
    viewers, broken = Viewers(1, metrics), [True]

    def status() -> dict[str, Any]:
        if broken.pop() if broken else False:
            raise RuntimeError("a bug")
        return STATUS

    gatherer = make_gatherer(state, metrics, clock, viewers, status)
    viewer = viewers.join()
    assert viewer is not None
    gatherer._clock_s = time.monotonic
    running = asyncio.create_task(gatherer.run())
    async with asyncio.timeout(10):
        assert data_of(await viewer.frames.get())[0] == "frame"
    running.cancel()
    await asyncio.wait({running})


def test_an_event_is_one_line_of_data_whatever_is_in_it() -> None:
    assert event("x", {"a": "1\n\ndata: 2"}) == b'event: x\ndata: {"a":"1\\n\\ndata: 2"}\n\n'
