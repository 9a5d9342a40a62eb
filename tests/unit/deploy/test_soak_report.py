"""What the report of a soak says of its sender."""

from __future__ import annotations

from deploy.soak.report import peaks_text


def test_seconds_in_which_payments_waited_for_a_connection_are_told() -> None:
    peaks = [(64, 0), (512, 7), (512, 430), (90, 0)]
    assert peaks_text(peaks) == "512 at once at most, in second 1; payments waited for one in 2 seconds, 430 in second 2"


def test_a_run_in_which_nobody_waited_says_so() -> None:
    assert peaks_text([(64, 0), (66, 0)]) == "66 at once at most, in second 1; no payment waited for one"
