"""Each rung of the degraded ladder under load: what a fault costs, and how soon full service is back. `-s` prints the figures."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.payments import payments
from deploy.ports import free_ports
from deploy.stack import Stack
from gateway.contracts.model_meta import MODEL_FILE
from gateway.contracts.settings import Settings
from loadtest.offered import Offered, offer, quantile
from tests.helpers import RunningCommand, running_command, wait_until
from tests.integration.gateway_helpers import make_transaction, name, post, ready_without
from tests.slow_line import SlowLine
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration
READY_WITHIN_S = 60
RATE, CALM_S, FAULT_S, AFTER_S = 200.0, 3.0, 6.0, 6.0
BACK_WITHIN_S = 2.0
PROMISED_S = 0.1
SENDER_LATE_MS_MOST = 50.0


@dataclasses.dataclass
class Served:
    settings: Settings
    stack: Stack
    line: SlowLine
    command: RunningCommand


@pytest.fixture(scope="module")
def served(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway with the budgets it ships with, whose Redis is behind a line of ours."""
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "models")
    with SlowLine(settings.redis_port).running() as line:
        own = dataclasses.replace(
            settings,
            gateway_port=free_ports(1)[0],
            model_dir=str(folder / "models"),
            redis_url=f"redis://{settings.host}:{line.port}/0",
            instance_id=name("faults"),
        )
        with running_command(own, "serve", log_path=folder / "gateway.log") as command:
            command.wait_until(lambda: ready_without(own, "redis", "model", "kafka"), READY_WITHIN_S, "the gateway is ready")
            # The first batches of a process compile and connect.
            asyncio.run(offer(own.host, own.gateway_port, lambda _: 100.0, 3, payments(name("warm"))))
            yield Served(own, stack, line, command)


def stopped(served: Served) -> Callable[[], None]:
    pid = served.stack.pid("redis")
    assert pid
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


def slowed(served: Served, delay_s: float) -> Callable[[], None]:
    served.line.delay_s = delay_s
    return lambda: setattr(served.line, "delay_s", 0.0)


def killed(served: Served, service: str) -> Callable[[], None]:
    served.stack.kill(service)
    return lambda: served.stack.start([service])


FAULTS: dict[str, Callable[[Served], Callable[[], None]]] = {
    "redis stopped": stopped,
    "redis 50 ms slower": lambda served: slowed(served, 0.05),
    "redis 200 ms slower": lambda served: slowed(served, 0.2),
    "redis killed": lambda served: killed(served, "redis"),
    "kafka killed": lambda served: killed(served, "kafka"),
}


async def under_load(served: Served, fault: Callable[[Served], Callable[[], None]]) -> tuple[Offered, float, float]:
    """(what became of the load, when the fault came, when it was over), the times in seconds of the run."""
    own, loop = served.settings, asyncio.get_running_loop()
    duration_s = CALM_S + FAULT_S + AFTER_S
    offering = asyncio.create_task(offer(own.host, own.gateway_port, lambda _: RATE, duration_s, payments(name("fault"))))
    began_s = loop.time()
    await asyncio.sleep(CALM_S)  # sleeps: load before the fault
    heal = await asyncio.to_thread(fault, served)
    from_s = loop.time() - began_s
    try:
        await asyncio.sleep(FAULT_S)  # sleeps: load during the fault
        healed_s = loop.time() - began_s
    finally:
        await asyncio.to_thread(heal)
    return await offering, from_s, healed_s


def back_after_s(run: Offered, healed_s: float) -> float:
    """How long after the end of the fault the first answer came that had everything: a miss later on is no part of it."""
    full = [s.at_s for s in run.samples if s.at_s > healed_s and not {"request_only", "static_policy"} & kinds_of(s.degraded)]
    return min(full, default=float("inf")) - healed_s


def kinds_of(degraded: str) -> set[str]:
    return {kind.strip('"') for kind in degraded.split(",")}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_features_or_acknowledgements_and_no_answer(served: Served, fault: str) -> None:
    run, from_s, healed_s = asyncio.run(under_load(served, FAULTS[fault]))
    kinds = Counter(s.degraded or "full" for s in run.samples if from_s <= s.at_s < healed_s)
    latencies, calm = run.answered(from_s, healed_s), run.answered(0.5, from_s)
    print(
        f"{fault}: {len(run.samples)} requests {dict(run.statuses())}, p99 {quantile(latencies, 0.99) * 1000:.0f} ms"
        f" (before {quantile(calm, 0.99) * 1000:.0f}), {dict(kinds)}, back after {back_after_s(run, healed_s):.2f} s"
    )
    assert set(run.statuses()) == {200}
    assert run.mixed_up == 0
    if "redis" in fault:
        assert kinds['"request_only"'] > 0.8 * sum(kinds.values())
    if run.late_ms > SENDER_LATE_MS_MOST:
        pytest.skip(f"the sender itself was {run.late_ms:.0f} ms late: its times tell nothing")
    assert quantile(latencies, 0.99) < PROMISED_S
    if "killed" not in fault:
        assert back_after_s(run, healed_s) < BACK_WITHIN_S


def test_a_redis_behind_a_slow_line_costs_its_features_until_the_line_is_well_again(served: Served) -> None:
    own = served.settings
    for delay_s in (0.05, 0.2):
        served.line.delay_s = delay_s
        wait_until(lambda: "request_only" in post(own, make_transaction(name("slow")))[1]["degraded"], 10, "Redis is left out")
        answers = [post(own, make_transaction(name("slow"))) for _ in range(20)]
        assert {status for status, _ in answers} == {200}
        assert {tuple(answer["degraded"]) for _, answer in answers} == {("request_only",)}
        served.line.delay_s = 0.0
        wait_until(lambda: "request_only" not in post(own, make_transaction(name("well")))[1]["degraded"], 10, "Redis is back")


def test_a_corrupt_model_is_refused_and_without_any_the_rules_decide(served: Served, tmp_path: Path) -> None:
    own = served.settings
    [model_path] = Path(own.model_dir).rglob(MODEL_FILE)
    good = model_path.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 0xFF
    write_model(Path(own.model_dir), version="bad", seed=2)
    [second] = [p for p in Path(own.model_dir).rglob(MODEL_FILE) if p != model_path]
    second.write_bytes(bytes(bad))
    served.command.wait_until(lambda: "model: champion refused" in served.command.log(), 10, "the model is refused")
    status, answer = post(own, make_transaction(name("refused")))
    assert (status, answer["model"]["version"]) == (200, "1")
    own = dataclasses.replace(own, gateway_port=free_ports(1)[0], instance_id=name("bare"))
    with running_command(own, "serve", "--no-kafka", log_path=tmp_path / "bare.log") as bare:
        bare.wait_until(lambda: ready_without(own, "redis"), READY_WITHIN_S, "it is ready without a model")
        bare.wait_until(
            lambda: "rules_only" in post(own, make_transaction(name("bare")))[1]["degraded"], 10, "the rules decide on features"
        )
        status, answer = post(own, make_transaction(name("bare")))
        assert (status, answer["model"], answer["probability"]) == (200, None, None)


def test_a_callers_own_deadline_costs_it_the_features_and_nobody_else(served: Served) -> None:
    async def both() -> tuple[Offered, Offered]:
        own = served.settings
        calls = [
            offer(own.host, own.gateway_port, lambda _: 50.0, 3, payments(name("d")), headers=headers)
            for headers in (b"fraudgate-deadline-ms: 12\r\n", b"")
        ]
        hurried, patient = await asyncio.gather(*calls)
        return hurried, patient

    hurried, patient = asyncio.run(both())
    assert set(hurried.statuses()) == set(patient.statuses()) == {200}
    assert all("request_only" in s.degraded or "static_policy" in s.degraded for s in hurried.samples)
    assert any("request_only" not in s.degraded for s in patient.samples)


@pytest.mark.slow
def test_a_model_swapped_under_load_costs_no_answer_and_every_decision_has_a_whole_model(served: Served) -> None:
    own, versions = served.settings, [str(v) for v in range(2, 6)]

    async def both() -> Offered:
        offering = asyncio.create_task(offer(own.host, own.gateway_port, lambda _: RATE, 12, payments(name("model"))))
        for version in versions:
            await asyncio.sleep(2)  # sleeps: load between two swaps
            await asyncio.to_thread(write_model, Path(own.model_dir), version, int(version))
        return await offering

    run = asyncio.run(both())
    print(f"{len(run.samples)} requests, {dict(run.statuses())}, p99 {quantile(run.answered(), 0.99) * 1000:.0f} ms")
    assert set(run.statuses()) == {200}
    assert not any({"rules_only", "static_policy"} & kinds_of(s.degraded) for s in run.samples if "request_only" not in s.degraded)
    wait_until(
        lambda: post(own, make_transaction(name("last")))[1]["model"]["version"] == versions[-1], 10, "the last model serves"
    )


def storm(own: Settings, requests: int) -> tuple[int, int]:
    """(answers seen, answers that were another's) while callers close their connection 5 ms after they asked."""
    seen = wrong = 0
    of = payments(name("storm"))

    async def call(i: int) -> None:
        nonlocal seen, wrong
        transaction_id, body = of(i)
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(own.host, own.gateway_port)
            try:
                writer.write(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                async with asyncio.timeout(0.005 if i % 2 else 2):
                    answer = await reader.read(4096)
                seen += b"200 OK" in answer
                wrong += b"200 OK" in answer and f'"{transaction_id}"'.encode() not in answer
            finally:
                writer.close()

    async def all_of_them() -> None:
        for begin in range(0, requests, 50):
            await asyncio.gather(*[call(i) for i in range(begin, min(begin + 50, requests))])

    asyncio.run(all_of_them())
    return seen, wrong


def test_a_storm_of_callers_that_leave_gives_nobody_another_cards_answer(served: Served) -> None:
    # Redis is so slow that some of its replies come after their batch gave up.
    served.line.delay_s = 0.035
    seen, wrong = storm(served.settings, 3000)
    served.line.delay_s = 0.0
    assert wrong == 0
    assert seen > 1000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_storm_of_a_million_callers_mixes_nothing_up(served: Served) -> None:
    requests = int(os.environ.get("STORM_REQUESTS", "1000000"))
    served.line.delay_s = 0.03
    seen, wrong = storm(served.settings, requests)
    served.line.delay_s = 0.0
    print(f"{requests} callers, {seen} answers seen, {wrong} of another's")
    assert wrong == 0
