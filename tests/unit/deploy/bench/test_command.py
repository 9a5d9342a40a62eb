"""What the benchmark works out of what it measured, without measuring anything: CPU an event, ratios, table, JSON, curve."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.bench import command
from deploy.bench.command import FULL, QUICK, Bench, bench
from deploy.bench.cpu import Meter, cpu_s, per_event_us, tree_of
from deploy.bench.figures import TARGETS, Figure, Target, as_json, curve, draw, ratio, spread, table, worse
from deploy.bench.load import Samples, Timing, cost_figure, decided_and_lacking, latency_figures
from deploy.bench.policy import write_policy
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES
from gateway.policy import NO_LISTS, Columns, load_policy
from gateway.scoring.job import requests_of
from tests.unit.gateway.factories import make_job, make_transaction

REQUIRED = {
    "http.cpu_us",
    "kafka.cpu_us",
    "ratio.http_to_empty_uvicorn",
    "ratio.fastapi_service_to_http",
    "ratio.mlflow_serve_to_http",
    "http.p99_ms.5000",
    "http.p99_ms.10000",
    "kafka.p99_ms.10000",
    "kafka_with_spark.p99_ms.10000",
}


def make_figure(value: float, **changes: Any) -> Figure:
    given: dict[str, Any] = {"unit": "us", "low": value, "high": value, "windows": 1, "duration_s": 5.0}
    return Figure(**(given | {"value": value} | changes))


def make_window(p99_ms: float, **changes: Any) -> dict[str, Any]:
    given = {
        "p50_ms": p99_ms / 2,
        "p99_ms": p99_ms,
        "p999_ms": p99_ms * 2,
        "seconds": 6.0,
        "achieved_per_s": 5000.0,
        "reached_rate": True,
        "censored": 0,
        "behind_p99_ms": 1.0,
        "behind_max_ms": 2.0,
    }
    return given | changes


def test_decisions_that_went_without_something_are_counted_apart_from_those_with_old_tiles() -> None:
    text = (
        'fraudgate_decisions_total{door="http",outcome="approve"} 90.0\nfraudgate_decisions_total{door="kafka",outcome="decline"} 10.0\n'
        'fraudgate_degraded_total{kind="stale_features"} 100.0\nfraudgate_degraded_total{kind="request_only"} 7.0\n'
        'fraudgate_reasons_total{outcome="model"} 3.0\nfraudgate_reasons_total{outcome="late"} 4.0\n'
    )
    assert decided_and_lacking(text) == {"decided": 100.0, "lacking": 7.0, "declined": 10.0, "explained": 3.0}


def test_the_policy_of_benchmarks_is_the_usual_one_with_other_limits_of_velocity(tmp_path: Path) -> None:
    write_policy(tmp_path / "policy")
    usual, raised = load_policy(""), load_policy(str(tmp_path / "policy"))
    assert raised.rule_ids == usual.rule_ids
    batch = [make_job(make_transaction("a", amount_minor=6_000_000)), make_job(make_transaction("b", amount_minor=5))]
    matrix = np.full((2, len(FEATURE_NAMES)), np.nan, np.float32)
    matrix[:, FEATURE_INDEX["card_count_5m"]] = 50
    columns = Columns(requests_of(batch), np.arange(2), matrix, np.zeros(2), np.zeros(2, np.int64))
    large = [rule for rule in usual.decide(columns, True, NO_LISTS).rule_hits[0] if rule != "card-burst"]
    assert usual.decide(columns, True, NO_LISTS).rule_hits == [["card-burst", *large], ["card-burst"]]
    assert raised.decide(columns, True, NO_LISTS).rule_hits == [large, []]


def test_a_rate_at_which_requests_are_refused_is_not_reached() -> None:
    samples = Samples(done=[0, 1], cpu=[{}, {}], at_s=[0.0, 1.0])
    for share, reached in ((0.001, True), (0.002, False)):
        found = latency_figures("http", 5000.0, [make_window(10.0)], samples, {"refused_share": share})
        assert found["http.p99_ms.5000"].reached_rate is reached


def test_the_table_tells_when_decisions_were_degraded() -> None:
    text = table({"http.cpu_us": make_figure(60.0, notes={"degraded_share": 0.25})})
    assert "yes, the aim, 25% of them degraded" in text


def test_the_table_tells_how_many_had_no_answer_when_the_run_ended() -> None:
    samples = Samples(done=[0, 1], cpu=[{}, {}], at_s=[0.0, 1.0])
    text = table(latency_figures("http", 5000.0, [make_window(9000.0, censored=1234, reached_rate=False)], samples, {}))
    assert "1,234 without an answer" in text and "no: below the rate" in text


def test_every_figure_that_is_promised_has_a_target() -> None:
    assert {t.key for t in TARGETS} >= REQUIRED


def test_cpu_is_counted_an_event_for_every_process_that_ran_throughout() -> None:
    before, after = {"gateway": 1.0, "redis": 2.0}, {"gateway": 1.5, "redis": 2.0, "jobs": 9.0}
    assert per_event_us(before, after, 10_000) == {"gateway": 50.0, "redis": 0.0}
    assert per_event_us(before, after, 0) == {}


def test_cpu_of_a_process_has_its_children_in_it() -> None:
    assert os.getpid() in tree_of(os.getppid())
    mine = cpu_s(os.getpid())
    assert cpu_s(os.getppid()) >= mine > 0
    assert Meter({"me": os.getpid, "nobody": lambda: None}).sample().keys() == {"me"}


def test_the_cost_of_a_run_is_the_median_of_its_windows() -> None:
    samples = Samples(
        done=[0, 100, 200, 300],
        cpu=[{"gateway": s, "redis": 0.0} for s in (0.0, 0.010, 0.030, 0.045)],
        at_s=[0.0, 1.0, 2.0, 3.0],
    )
    figure = cost_figure(samples, 3.0, 64)
    assert [figure.value, figure.low, figure.high] == pytest.approx([150, 100, 200])
    assert figure.achieved_per_s == pytest.approx(100)
    assert figure.cpu_us["gateway"] == pytest.approx(150)


def test_ratios_take_the_number_of_connections_that_flatters_least() -> None:
    http = {64: make_figure(60.0), 128: make_figure(50.0)}
    peer = {64: make_figure(30.0), 128: make_figure(30.0)}
    slow = {64: make_figure(600.0), 128: make_figure(600.0)}
    assert ratio(http, peer, worst="most").value == pytest.approx(2.0)
    assert ratio(slow, http, worst="least").value == pytest.approx(10.0)
    assert ratio(slow, http, worst="least").connections == 64
    assert worse(http).value == 60.0


def test_a_ratio_to_what_was_not_measured_is_no_number() -> None:
    assert math.isnan(ratio({64: make_figure(1.0)}, {}, worst="most").value)


def test_void_windows_do_not_count_and_a_run_of_them_is_void() -> None:
    samples = Samples(done=[0, 1], cpu=[{}, {}], at_s=[0.0, 1.0])
    late = make_window(40.0, behind_p99_ms=30.0)
    found = latency_figures("http", 5000.0, [make_window(10.0), late, make_window(12.0)], samples, {})
    figure = found["http.p99_ms.5000"]
    assert (figure.value, figure.windows, figure.void, figure.notes["void_windows"]) == (11.0, 2, False, 1)
    assert latency_figures("http", 5000.0, [late, late], samples, {})["http.p99_ms.5000"].void
    assert found.keys() == {"http.p50_ms.5000", "http.p99_ms.5000", "http.p999_ms.5000"}


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (None, "not measured"),
        (make_figure(math.nan), "not measured"),
        (make_figure(60.0), "yes, the aim"),
        (make_figure(80.0), "yes"),
        (make_figure(100.0), "no"),
        (make_figure(60.0, void=True), "void"),
        (make_figure(60.0, reached_rate=False), "no: below the rate"),
    ],
)
def test_a_promise_is_kept_only_by_a_figure_that_counts(figure: Figure | None, verdict: str) -> None:
    assert Target("k", "k", 90, 65).verdict(figure) == verdict


def test_more_is_better_where_a_peer_is_divided_by_the_gateway() -> None:
    target = Target("k", "k", 6, 8, more_is_better=True)
    assert [target.verdict(make_figure(v)) for v in (5.0, 6.5, 9.0)] == ["no", "yes", "yes, the aim"]


def sample_figures() -> dict[str, Figure]:
    samples = Samples(done=[0, 100], cpu=[{"gateway": 0.0}, {"gateway": 0.01}], at_s=[0.0, 1.0])
    found = {"http.cpu_us.64": cost_figure(samples, 1.0, 64), "http.cpu_us": make_figure(80.0, achieved_per_s=9000.0)}
    for rate, p99_ms in ((1000.0, 4.0), (5000.0, 9.0), (10_000.0, 60.0)):
        found |= latency_figures("http", rate, [make_window(p99_ms)], samples, {})
    return found | latency_figures("kafka", 10_000.0, [make_window(30.0)], samples, {})


def test_the_table_shows_what_was_measured_beside_what_was_promised() -> None:
    text = table(sample_figures())
    lines = {target.key: next(line for line in text.splitlines() if line.startswith(target.label)) for target in TARGETS}
    assert lines["http.cpu_us"].split()[-4:] == ["80.0", "90", "65", "yes"]
    assert lines["http.p99_ms.10000"].endswith("yes")
    assert lines["kafka_with_spark.p99_ms.10000"].endswith("not measured")


def test_the_json_has_each_figure_under_its_key_with_unit_rate_duration_and_cpu() -> None:
    found = json.loads(as_json(sample_figures(), {"cores": 2}))
    figure = found["http.p99_ms.5000"]
    assert (figure["value"], figure["unit"], figure["rate_per_s"], figure["duration_s"]) == (9.0, "ms", 5000.0, 6.0)
    assert figure["cpu_us"] == {"gateway": pytest.approx(100.0)}
    assert (figure["reach"], figure["reached"]) == (15, "yes")
    assert found["run"] == {"cores": 2}


def test_what_is_no_number_is_null_in_the_json() -> None:
    assert json.loads(as_json({"a": make_figure(math.nan)}, {}))["a"]["value"] is None


def test_the_curve_leaves_void_points_out_and_is_drawn_as_text_and_lines(tmp_path: Path) -> None:
    figures = sample_figures()
    figures |= latency_figures("http", 7500.0, [make_window(9.0, behind_p99_ms=50.0)], Samples(), {})
    assert curve(figures, "http")["p99"] == [(1000.0, 4.0), (5000.0, 9.0), (10_000.0, 60.0)]
    draw(figures, tmp_path / "a.svg", "2 cores")
    draw(figures, tmp_path / "b.svg", "2 cores")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    words = " ".join(ET.parse(tmp_path / "a.svg").getroot().itertext())  # noqa: S314
    for word in ("p50", "p99", "p99.9", "offered, events a second", "HTTP door", "Kafka in to Kafka out"):
        assert word in words


def test_a_curve_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    draw({}, tmp_path / "a.svg", "nothing")
    assert (tmp_path / "a.svg").exists()


def test_the_median_of_nothing_is_no_number() -> None:
    assert all(math.isnan(v) for v in spread([]))


@pytest.mark.parametrize(
    ("seconds_by_look", "looks"),
    [
        ([14.0, 9.0, 0.7, 0.0], 3),
        # One that never comes to rest is measured all the same.
        ([9.0] * FULL.warm_ups_max, FULL.warm_ups_max),
    ],
)
def test_what_is_measured_begins_when_the_broker_no_longer_compiles(
    seconds_by_look: list[float], looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spent = 0.0
    left = iter(seconds_by_look)

    def load(*_: Any, **__: Any) -> None:
        nonlocal spent
        spent += next(left)

    monkeypatch.setattr(command, "closed_loop", load)
    stage: Any = SimpleNamespace(
        gateway_alone=lambda: None, settings=SimpleNamespace(gateway="http://here"), meter=None, broker_compiling_s=lambda: spent
    )
    Bench(tmp_path, FULL)._warm_up(stage)
    assert len(list(left)) == len(seconds_by_look) - looks
    assert f"after {looks * FULL.warm_up_s:.0f} s" in capsys.readouterr().out


def test_a_full_run_measures_every_promised_rate() -> None:
    for plan in (FULL, QUICK):
        assert {5_000, 10_000} <= set(plan.http_rates) and 10_000 in plan.kafka_rates
    assert Timing(1.0, 2.0, 3).total_s == 7.0


def test_a_call_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    for wrong in (["nothing"], ["gateway", "--parts", "spark"], ["all", "--home", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            bench(wrong)
        assert ended.value.code == 2
