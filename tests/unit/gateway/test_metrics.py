from gateway.metrics import Metrics


def quality(metrics: Metrics, door: str) -> tuple[float, float]:
    """(good, bad) decisions."""
    good, bad = (
        metrics.registry.get_sample_value("fraudgate_sli_decisions_total", {"door": door, "quality": q}) for q in ("good", "bad")
    )
    assert good is not None
    assert bad is not None
    return good, bad


def test_a_batch_of_latencies_is_counted_in_its_buckets() -> None:
    metrics = Metrics()
    metrics.latency_s.observe("http", [0.0004, 0.001, 0.0011, 9.999])
    metrics.latency_s.observe("http", [0.003])
    text = metrics.text().decode()
    for bound, count in (("0.0005", 1), ("0.001", 2), ("0.002", 3), ("0.003", 4), ("5.0", 4), ("+Inf", 5)):
        assert f'fraudgate_decision_latency_seconds_bucket{{door="http",le="{bound}"}} {count}.0' in text
    assert 'fraudgate_decision_latency_seconds_sum{door="http"} 10.0045' in text


def test_an_answer_is_good_up_to_the_promise_and_bad_beyond_it() -> None:
    metrics = Metrics()
    metrics.http_level.answered([0.001, 0.1, 0.1001, 3.0])
    metrics.http_level.answered([0.1])
    metrics.http_level.failed(5)
    assert quality(metrics, "http") == (3, 7)
    assert quality(metrics, "kafka") == (0, 0)


def test_through_kafka_a_second_is_in_time() -> None:
    metrics = Metrics()
    metrics.kafka_level.answered([0.1001, 1.0])
    metrics.kafka_level.answered([1.001])
    assert quality(metrics, "kafka") == (2, 1)


def test_every_kind_of_decision_shows_as_0_before_the_first() -> None:
    text = Metrics().text().decode()
    assert 'fraudgate_decisions_total{door="kafka",outcome="decline"} 0.0' in text
    assert "_created" not in text
