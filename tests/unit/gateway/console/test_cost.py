"""What the console costs the gateway: CPU of this thread, so that a busy machine doesn't matter much. -s prints it."""

import time
from collections.abc import Callable
from pathlib import Path

from gateway.console import picture
from gateway.console.gather import event
from gateway.console.samples import Reading
from gateway.console.stories import story_for_page
from gateway.console.tap import Tap
from gateway.contracts.decision import Outcome
from gateway.kafka.avro import encode_receipt
from gateway.metrics import Metrics
from tests.factories_history import make_receipt
from tests.unit.gateway.console.factories import CASES, JOBS, decide, make_state, own_of
from tests.unit.gateway.console.test_tap_and_viewers import result
from tests.unit.gateway.factories import make_transaction


def cpu_us(work: Callable[[], object], times: int) -> float:
    """The least of three rounds, a call."""
    work()
    rounds = []
    for _ in range(3):
        began_ns = time.thread_time_ns()
        for _ in range(times):
            work()
        rounds.append((time.thread_time_ns() - began_ns) / times / 1000)
    return min(rounds)


def test_a_decision_costs_less_than_two_microseconds_while_somebody_watches_and_a_look_while_nobody_does() -> None:
    tap, batch = Tap(), [result()] * 60 + [result(Outcome.DECLINE)] * 4

    def unwatched() -> None:
        if tap is not None and tap.watching:
            tap.offer(batch)

    idle_us = cpu_us(unwatched, 500)
    tap.watching = True
    watched_us = cpu_us(unwatched, 20) / len(batch)
    print(f"\na batch while nobody watches: {idle_us:.2f} us; a decision while somebody does: {watched_us:.2f} us")
    # Generous for a machine that does other things: a decision costs the gateway dozens.
    assert idle_us < 2
    assert watched_us < 2


def test_a_frame_costs_the_event_loop_a_few_milliseconds_a_second_at_most(tmp_path: Path) -> None:
    metrics, state = Metrics(), make_state(tmp_path)
    for s in range(11):
        for outcome in Outcome:
            decide(metrics, 1000, 3.0, outcome.value)
        state.window.add(Reading(float(s), own_of(metrics)))
    state.jobs.note(JOBS, "", 10.0)
    state.cases.note(CASES, "", 10.0)
    read_us = cpu_us(lambda: own_of(metrics), 5)
    frame_us = cpu_us(
        lambda: event("frame", picture.frame(state, 10.0, 10_000) | {"point": picture.point(state.window, 10_000)}), 20
    )
    receipt = encode_receipt(make_receipt(make_transaction("t")))
    story_us = cpu_us(lambda: story_for_page(receipt, {}), 5)
    print(f"\na reading {read_us:.0f} us, a frame {frame_us:.0f} us, a story {story_us:.0f} us")
    assert read_us + frame_us < 15_000
    assert story_us < 2_000
