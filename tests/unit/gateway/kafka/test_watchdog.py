"""A Kafka door that stands still is restarted, and the process ended if that doesn't help; nothing else is."""

from __future__ import annotations

from confluent_kafka import KafkaException

from gateway.kafka.watchdog import Watchdog

LIMIT_S = 60.0


class FakeBroker:
    """Stands for GroupProbe: what it says about the group is set by hand."""

    def __init__(self) -> None:
        self.behind_now: dict[int, int] = {}
        self.unreadable: set[int] = set()
        self.down = False

    def behind(self) -> dict[int, int]:
        if self.down:
            raise KafkaException
        return dict(self.behind_now)

    def readable(self, partition: int, offset: int) -> bool:
        assert self.behind_now[partition] == offset
        return partition not in self.unreadable


class Watched:
    def __init__(self, ours: frozenset[int] | None = frozenset({0, 1})) -> None:
        self.broker = FakeBroker()
        self.now_s = 1000.0
        self.acts: list[str] = []
        self.standstills_s: list[float] = []
        self.ours = ours
        self.watchdog = Watchdog(
            self.broker,
            LIMIT_S,
            ours=lambda: self.ours,
            restart=lambda: self.acts.append("restart"),
            leave=lambda: self.acts.append("leave"),
            note=self.standstills_s.append,
            clock_s=lambda: self.now_s,
        )

    def look_for(self, seconds: float) -> None:
        """A look each second."""
        for _ in range(int(seconds)):
            self.watchdog.look()
            self.now_s += 1


def test_a_partition_that_stands_still_gets_a_new_session_and_then_a_new_process() -> None:
    watched = Watched()
    watched.broker.behind_now = {0: 50}
    watched.look_for(LIMIT_S)
    assert watched.acts == []
    watched.look_for(1)
    assert watched.acts == ["restart"]
    watched.look_for(LIMIT_S)
    assert watched.acts == ["restart", "leave"]


def test_progress_after_a_new_session_is_enough() -> None:
    watched = Watched()
    watched.broker.behind_now = {0: 50}
    watched.look_for(LIMIT_S + 1)
    watched.broker.behind_now = {0: 51}
    watched.look_for(LIMIT_S)
    assert watched.acts == ["restart"]


def test_a_slow_door_and_an_idle_one_are_left_alone() -> None:
    watched = Watched()
    for offset in range(10):
        watched.broker.behind_now = {0: offset} if offset % 2 else {0: offset, 1: offset}
        watched.look_for(LIMIT_S - 1)
    watched.broker.behind_now = {}
    watched.look_for(3 * LIMIT_S)
    assert watched.acts == []


def test_partitions_of_other_gateways_are_theirs_and_a_door_in_no_group_answers_for_all() -> None:
    watched = Watched()
    watched.broker.behind_now = {3: 50}
    watched.look_for(3 * LIMIT_S)
    assert watched.acts == []
    watched.ours = None
    watched.look_for(LIMIT_S + 1)
    assert watched.acts == ["restart"]


def test_what_nobody_can_read_is_not_waited_for() -> None:
    watched = Watched()
    watched.broker.behind_now, watched.broker.unreadable = {0: 50}, {0}
    watched.look_for(5 * LIMIT_S)
    assert watched.acts == []


def test_time_without_a_broker_does_not_count() -> None:
    watched = Watched()
    watched.broker.behind_now = {0: 50}
    watched.look_for(LIMIT_S - 1)
    watched.broker.down = True
    watched.look_for(5 * LIMIT_S)
    watched.broker.down = False
    watched.look_for(LIMIT_S)
    assert watched.acts == []


def test_how_long_a_readable_partition_stands_still_is_told_until_it_moves() -> None:
    watched = Watched()
    watched.broker.behind_now = {0: 50}
    watched.look_for(LIMIT_S - 1)
    assert watched.standstills_s[-1] == 0
    watched.look_for(12)
    assert watched.standstills_s[-1] == LIMIT_S + 10
    watched.broker.behind_now = {0: 51}
    watched.look_for(1)
    assert watched.standstills_s[-1] == 0


def test_what_nobody_can_read_does_not_stand_still() -> None:
    watched = Watched()
    watched.broker.behind_now, watched.broker.unreadable = {0: 50}, {0}
    watched.look_for(5 * LIMIT_S)
    assert set(watched.standstills_s) == {0}
