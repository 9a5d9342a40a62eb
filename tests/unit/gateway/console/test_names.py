"""The console reads metrics of other processes by name and label: what it asks for is what they export."""

from prometheus_client import generate_latest

from feature_jobs.metrics import Metrics as JobMetrics
from gateway.cases.metrics import CaseMetrics
from gateway.console import picture
from gateway.console.samples import samples_of
from gateway.console.sources import read_cases, read_jobs
from gateway.console.tables import TABLE_OF, Tables


def test_tables_are_read_from_what_the_feature_jobs_really_export() -> None:
    jobs = JobMetrics()
    for i, (query, table) in enumerate(TABLE_OF.items()):
        jobs.rows.labels(table).inc(100 + i)
        jobs.freshness_seconds.labels(query).set(1 + i)
        jobs.batch(query, 0.5)
        jobs.up.labels(query).set(1)
    jobs.drift_psi.labels("risk_score").set(0.3)
    jobs.drift_alarm.labels("risk_score").set(1)
    read = read_jobs(generate_latest(jobs.registry))
    tables = Tables()
    tables.note(read, 0.0)
    jobs.batch("gold", 0.5)
    tables.note(read_jobs(generate_latest(jobs.registry)), 7.0)
    rows = tables.shown(read, 9.0, flowing_s=9.0)
    assert [(t["rows"], t["fresh_s"], t["written_s"]) for t in rows] == [(100, 1, None), (101, 2, None), (102, 3, 2.0)]
    assert picture._drift(read)["alarms"] == ["risk_score"]


def test_the_queue_is_read_from_what_the_case_service_really_exports() -> None:
    cases = CaseMetrics()
    cases.open.set(4)
    cases.connected.set(1)
    assert read_cases(generate_latest(cases.registry)).total("fraudgate_cases_reviews_open") == 4
    assert samples_of(cases.registry.collect()).total("fraudgate_cases_kafka_connected") == 1
