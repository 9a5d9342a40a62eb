"""The evaluation's choice of a recipe, on a small simulated series of weeks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from model_export import evaluate as module
from model_export.benchmark import Payments
from model_export.evaluate import Evaluation, weeks_of

DAYS = 56
PER_DAY = 60
TEST_DAY = 49


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a fit takes a moment."""
    monkeypatch.setattr(module, "ROUNDS", (5, 10, 20))


def make_evaluation(seed: int = 1) -> Evaluation:
    """Payments whose fraud is more likely the larger the first of three features is; every payment has a customer of its own."""
    rng = np.random.default_rng(seed)
    rows = DAYS * PER_DAY
    features = rng.normal(size=(rows, 3)).astype(np.float32)
    fraud = rng.random(rows) < 1 / (1 + np.exp(4 - 2.5 * features[:, 0]))
    return Evaluation(Payments(np.repeat(np.arange(DAYS), PER_DAY), np.arange(rows), fraud), features, threads=1)


def test_a_model_of_the_week_ranks_the_test_week_far_better_than_chance() -> None:
    evaluation = make_evaluation()
    tested = evaluation.ours(TEST_DAY, 7)
    rate = evaluation.payments.is_fraud[tested.fold.test].mean()
    assert tested.ranking.auc > 0.8
    assert tested.ranking.ap > 3 * rate
    assert tested.probability.shape == tested.fold.test.shape


def test_the_recipe_depends_on_no_label_that_was_not_known_when_the_week_began() -> None:
    evaluation = make_evaluation()
    known = evaluation.payments.day < TEST_DAY - 7
    labels = np.where(known, evaluation.payments.is_fraud, ~evaluation.payments.is_fraud)
    changed = Evaluation(dataclasses.replace(evaluation.payments, is_fraud=labels), evaluation.features, threads=1)
    before, after = evaluation.ours(TEST_DAY, 7), changed.ours(TEST_DAY, 7)
    assert after.recipe == before.recipe
    assert after.booster.save_raw("json") == before.booster.save_raw("json")


def test_the_recipe_does_depend_on_the_validation_weeks() -> None:
    evaluation = make_evaluation()
    in_validation = (evaluation.payments.day >= TEST_DAY - 21) & (evaluation.payments.day < TEST_DAY - 14)
    labels = np.where(in_validation, ~evaluation.payments.is_fraud, evaluation.payments.is_fraud)
    changed = Evaluation(dataclasses.replace(evaluation.payments, is_fraud=labels), evaluation.features, threads=1)
    before, after = evaluation.ours(TEST_DAY, 7).recipe, changed.ours(TEST_DAY, 7).recipe
    assert before is not None
    assert after is not None
    assert after.validation_ap != before.validation_ap


def test_the_same_data_give_the_same_figures_again() -> None:
    assert make_evaluation().ours(TEST_DAY, 7).ranking == make_evaluation().ours(TEST_DAY, 7).ranking


@pytest.mark.parametrize(
    ("end_day", "weeks"),
    [
        (200, [100, 107, 114, 121]),  # enough behind: no further than three weeks on
        (121, [93, 100, 107, 114]),  # the newest whole weeks
        (107, [79, 86, 93, 100]),
        (106, [72, 79, 86, 93]),  # the named week is not whole
    ],
)
def test_the_weeks_are_the_newest_whole_ones_a_multiple_of_a_week_away(end_day: int, weeks: list[int]) -> None:
    assert weeks_of(0, end_day, 100, 7, 4) == weeks


def test_a_week_without_room_for_training_and_validation_before_it_is_left_out() -> None:
    # 7 days of delay, 7 of training, and the earlier validation week three weeks before: from day 35 on.
    assert weeks_of(0, 60, 35, 7, 4) == [35, 42, 49]
    assert weeks_of(1, 60, 35, 7, 4) == [42, 49]
    assert weeks_of(0, 63, 35, 28, 4) == [56]
