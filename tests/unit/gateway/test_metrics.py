from gateway.metrics import LATENCY_BOUNDS_MS, Metrics


def test_a_batch_of_latencies_is_counted_in_its_buckets() -> None:
    metrics = Metrics()
    metrics.latency_ms.observe("http", [0.4, 1.0, 1.1, 9999.0])
    metrics.latency_ms.observe("http", [3.0])
    text = metrics.text().decode()
    for bound, count in (("0.5", 1), ("1.0", 2), ("2.0", 3), ("3.0", 4), ("5000.0", 4), ("+Inf", 5)):
        assert f'fraudgate_decision_latency_ms_bucket{{door="http",le="{bound}"}} {count}.0' in text
    assert 'fraudgate_decision_latency_ms_sum{door="http"} 10004.5' in text


def test_the_buckets_are_dense_up_to_the_promise() -> None:
    assert list(LATENCY_BOUNDS_MS) == sorted(set(LATENCY_BOUNDS_MS))
    assert {float(n) for n in range(1, 21)} <= set(LATENCY_BOUNDS_MS)
    assert 150.0 in LATENCY_BOUNDS_MS
