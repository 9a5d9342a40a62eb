"""The promise of the drift alarms, on the simulator: a quiet week has none, and a shift of one feature is found within ten minutes.

Features are those of the offline engine, fraud among them as ever; the reference is of two weeks, after a month of history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from feature_jobs.offline import offline_features
from feature_jobs.training_set import history_of
from gateway.contracts.drift import STEP_MS, WINDOW_MS, WINDOW_ROWS_MIN, Expected, Rows, expected_of, look
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.reference import CLOCK, DAY_MS, MEASURE_INDEX, MEASURES, Reference, bins_of, clock_values, hour_of
from loadtest.simulator import Simulator, SimulatorConfig
from model_export.reference import make_reference
from tests.agreement.test_offline_engine_equals_a_recount import silver_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HISTORY_DAYS, TRAINED_DAYS, QUIET_DAYS = 30, 14, 7
EVENTS_A_DAY = 10_000
WIDTH = len(FEATURE_NAMES)


@dataclass
class Simulated:
    reference: Reference
    expected: Expected
    event_time_ms: np.ndarray
    features: np.ndarray
    ids: np.ndarray

    def rows(self, place: np.ndarray, features: np.ndarray | None = None) -> Rows:
        bins = np.full((len(place), len(MEASURES)), -1, np.int8)
        values = self.features[place] if features is None else features
        bins[:, :WIDTH] = bins_of(self.reference.edges[:WIDTH], self.reference.bins[:WIDTH], values)
        t_ms = self.event_time_ms[place]
        clock = bins_of(self.reference.edges[CLOCK], self.reference.bins[CLOCK], clock_values(t_ms))
        return Rows(bins, clock, hour_of(t_ms).astype(np.int8), self.ids[place])

    def window(self, end_ms: int) -> np.ndarray:
        first, last = np.searchsorted(self.event_time_ms, [end_ms - WINDOW_MS, end_ms])
        return np.arange(first, last)


@pytest.fixture(scope="module", params=[21, 22])
def simulated(request: pytest.FixtureRequest) -> Simulated:
    """The quiet week and the reference of the weeks before it."""
    days = HISTORY_DAYS + TRAINED_DAYS + QUIET_DAYS
    simulator = Simulator(SimulatorConfig(seed=request.param, cards=5_000, events_per_day=EVENTS_A_DAY))
    events = list(simulator.events(days * EVENTS_A_DAY))
    labels = simulator.labels_remaining()
    known = pa.table(
        {
            "transaction_id": [label.transaction_id for label in labels],
            "is_fraud": [label.is_fraud for label in labels],
            "reported_at_ms": pa.array([label.reported_at_ms for label in labels], pa.int64()),
        }
    )
    silver = silver_of([e.transaction for e in events])
    features = offline_features(history_of(silver, known))
    t_ms = silver["event_time_ms"].to_numpy().astype(np.int64)
    fraud = np.array([e.is_fraud for e in events])
    day = (t_ms - t_ms[0] // DAY_MS * DAY_MS) / DAY_MS
    trained = (day >= HISTORY_DAYS) & (day < HISTORY_DAYS + TRAINED_DAYS)
    quiet = (day >= HISTORY_DAYS + TRAINED_DAYS) & (day < days)
    reference = make_reference(features[trained], fraud[trained], t_ms[trained])
    ids = np.stack([np.unique(silver[name].to_pylist(), return_inverse=True)[1] for name in ("card_id", "merchant_id")], axis=1)
    named = [
        silver[name].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        for name in ("device_id", "ip")
    ]
    ids = np.concatenate([ids, np.stack(named, axis=1)], axis=1).astype(np.int64)
    return Simulated(reference, expected_of(reference), t_ms[quiet], features[quiet], ids[quiet])


def test_a_quiet_week_has_no_alarm_in_any_of_its_windows(simulated: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    windows, alarms = 0, []
    t_ms = simulated.event_time_ms
    for end_ms in range(int(t_ms[0]) // STEP_MS * STEP_MS + WINDOW_MS, int(t_ms[-1]), STEP_MS):
        place = simulated.window(end_ms)
        if len(place) >= WINDOW_ROWS_MIN:
            windows += 1
            seen = look(simulated.expected, simulated.rows(place))
            alarms += [(end_ms, MEASURES[i], float(seen.psi[i])) for i in np.flatnonzero(seen.alarm)]
    with capsys.disabled():
        print(f"\n{windows} windows of a quiet week, {WIDTH} features each: {len(alarms)} alarms")
    assert windows > 7_000
    assert alarms == []


@pytest.mark.parametrize(
    "feature", ["amount_minor", "card_amount_mean_7d", "card_count_7d", "merchant_count_24h", "customer_since_last", "hour"]
)
def test_a_shift_of_one_feature_is_found_within_ten_minutes_of_stream_time(simulated: Simulated, feature: str) -> None:
    """Ten times as large from some moment on, the clock six hours wrong; at 20 moments of the week with an ordinary day's traffic."""
    i = MEASURE_INDEX[feature]
    moments = np.random.default_rng(4).permutation(len(simulated.event_time_ms) - EVENTS_A_DAY)
    tried, found = 0, 0
    for moment in moments.tolist():
        began_ms = int(simulated.event_time_ms[moment])
        # The last window that ends within ten minutes.
        place = simulated.window((began_ms + WINDOW_MS) // STEP_MS * STEP_MS)
        if len(place) < 60:
            continue
        features = simulated.features[place].copy()
        late = simulated.event_time_ms[place] >= began_ms
        features[late, i] = (features[late, i] + 6) % 24 if feature == "hour" else features[late, i] * 10
        seen = look(simulated.expected, simulated.rows(place, features))
        assert np.flatnonzero(seen.alarm).tolist() in ([i], [])
        tried += 1
        found += bool(seen.alarm[i])
        if tried == 20:
            break
    assert tried == 20
    assert found == 20, feature
