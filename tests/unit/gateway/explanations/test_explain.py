"""An explanation that isn't the model's is refused, and codes are those of what raises the score."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from gateway.contracts.decision import Route
from gateway.contracts.explanation import Explanation, ExplanationError, decode_explanation, encode_explanation
from gateway.contracts.feature_reasons import MODEL_REASONS
from gateway.contracts.features import FEATURE_INDEX, FEATURES
from gateway.contracts.model_meta import EXPLANATION_FILE, GOLDEN_FILE, read_manifest, sha256_file, write_manifest
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.explanations.explain import Explainer, leading_codes, load_explainer, with_model_codes
from gateway.models.model import load_model
from tests.factories_model import make_model_dir, risky_row, safe_row
from tests.unit.gateway.factories import write_model

CHAMPION = Route.CHAMPION.value


@dataclass(frozen=True)
class Files:
    folder: Path
    content: bytes
    golden: npt.NDArray[np.float32]
    probability: npt.NDArray[np.float32]

    @property
    def explanation(self) -> Explanation:
        return decode_explanation(self.content)


def files_of(model_dir: Path, seed: int = 1) -> Files:
    make_model_dir(model_dir, seed=seed, trees=20)
    folder = model_dir / read_manifest(model_dir).routes[CHAMPION].directory
    with np.load(folder / GOLDEN_FILE) as golden:
        return Files(folder, (folder / EXPLANATION_FILE).read_bytes(), golden["features"], golden["probability"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(tmp_path_factory.mktemp("models"), seed=9)


def packed(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def arrays_of(e: Explanation) -> dict[str, Any]:
    return {name: getattr(e, name) for name in Explanation.__dataclass_fields__}


def edited(e: Explanation, name: str, place: int, value: float) -> bytes:
    changed = getattr(e, name).copy()
    changed[place] = value
    return packed(**{**arrays_of(e), name: changed})


def a_split(e: Explanation) -> int:
    return int(np.flatnonzero(e.feature >= 0)[0])


def a_leaf(e: Explanation) -> int:
    return int(np.flatnonzero(e.feature < 0)[0])


def test_the_models_own_is_accepted(files: Files) -> None:
    explainer = load_explainer(files.content, files.golden, files.probability)
    assert explainer.trees == 20
    assert np.allclose(1 / (1 + np.exp(-explainer.margin(files.golden))), files.probability, atol=1e-6)
    assert encode_explanation(files.explanation) == files.content


def test_another_models_is_refused(files: Files, others: Files) -> None:
    with pytest.raises(ExplanationError, match="golden row's margin differs"):
        load_explainer(others.content, files.golden, others.probability)
    with pytest.raises(ExplanationError, match="explains another model"):
        load_explainer(others.content, others.golden, files.probability)
    with pytest.raises(ExplanationError, match="golden margins of 255 golden rows"):
        load_explainer(files.content, files.golden[1:], files.probability[1:])


def test_a_probability_that_was_calibrated_is_accepted(files: Files) -> None:
    load_explainer(files.content, files.golden, np.sqrt(files.probability))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda e: b"", "not a zip file"),
        (lambda e: encode_explanation(e)[:-100], "not a zip file"),
        (lambda e: packed(feature=e.feature), "not a file in the archive|tree_starts"),
        (lambda e: packed(**{**arrays_of(e), "value": e.value.astype(np.float64)}), "value is not one row of float32"),
        (lambda e: packed(**{**arrays_of(e), "value": e.value[:-1]}), "differ in length"),
        (lambda e: packed(**{**arrays_of(e), "median": e.median[:-1]}), f"not of {len(FEATURES)} features"),
        (lambda e: packed(**{**arrays_of(e), "golden_margin": np.zeros(9_000_000, np.float32)}), "bytes, at most"),
        (lambda e: packed(**{**arrays_of(e), "feature": np.array([{}], object)}), "Object arrays"),
        (lambda e: edited(e, "tree_starts", 1, 0), "one after the other"),
        (lambda e: edited(e, "feature", a_split(e), len(FEATURES)), "by a feature that isn't there"),
        (lambda e: edited(e, "threshold", a_split(e), np.nan), "not finite"),
        (lambda e: edited(e, "value", a_leaf(e), np.inf), "not finite"),
        (lambda e: edited(e, "cover", 1, 0.0), "without cover"),
        (lambda e: edited(e, "left", a_split(e), 0), "behind its parent"),
        (lambda e: edited(e, "left", a_split(e), len(e.feature)), "behind its parent"),
        (lambda e: edited(e, "left", a_split(e), int(e.right[a_split(e)])), "no parent or several"),
        (lambda e: edited(e, "left", a_leaf(e), a_leaf(e) + 1), "a leaf has children"),
        (lambda e: edited(e, "golden_margin", 0, 5.0 + e.golden_margin[0]), "golden row's margin differs"),
    ],
)
def test_what_is_not_whole_and_sound_is_refused(files: Files, spoil: Callable[[Explanation], bytes], why: str) -> None:
    with pytest.raises(ExplanationError, match=why):
        load_explainer(spoil(files.explanation), files.golden, files.probability)


def test_a_path_of_too_many_features_is_refused(files: Files) -> None:
    depth = 33
    split = np.arange(0, 2 * depth, 2)
    nodes = 2 * depth + 1
    feature, left, right = np.full(nodes, -1, np.int32), np.full(nodes, -1, np.int32), np.full(nodes, -1, np.int32)
    feature[split], left[split], right[split] = np.arange(depth), split + 1, split + 2
    chain = replace(
        files.explanation,
        tree_starts=np.array([0, nodes], np.int32),
        feature=feature,
        left=left,
        right=right,
        threshold=np.zeros(nodes, np.float32),
        missing_left=np.zeros(nodes, bool),
        value=np.where(feature < 0, 1, 0).astype(np.float32),
        cover=np.ones(nodes, np.float32),
    )
    with pytest.raises(ExplanationError, match="a path has 33 different features"):
        Explainer(decode_explanation(encode_explanation(chain)))


def test_a_risky_payment_is_risky_for_the_reasons_it_was_made_risky_by(files: Files) -> None:
    explainer = load_explainer(files.content, files.golden, files.probability)
    [codes] = explainer.codes(risky_row())
    assert {Reason.AMOUNT_HIGH, Reason.CARD_MANY_MERCHANTS} == set(codes[:2])
    assert not {Reason.AMOUNT_HIGH, Reason.CARD_MANY_MERCHANTS} & set(explainer.codes(safe_row())[0])


def test_a_codes_side_is_that_of_the_value(files: Files) -> None:
    explainer = Explainer(
        replace(files.explanation, median=np.full(len(FEATURES), 3, np.float32), unusual=np.full(len(FEATURES), 9, np.float32))
    )
    row = np.zeros(len(FEATURES), np.float32)
    place, amount = FEATURE_INDEX["card_count_5m"], FEATURE_INDEX["card_amount_ratio_30d"]
    for value, reason in [
        (3.0, Reason.CARD_LITTLE_USED),
        (4.0, Reason.CARD_MUCH_USED),
        (10.0, Reason.CARD_VELOCITY),
        (np.nan, Reason.CARD_LITTLE_USED),
    ]:
        row[place] = value
        assert explainer.reason_of(row)[place] is reason
    # Twice the usual is far from it, whatever other cards do.
    for value, reason in [(2.0, Reason.AMOUNT_AS_USUAL), (2.1, Reason.AMOUNT_UNUSUAL), (np.nan, Reason.CARD_LITTLE_USED)]:
        row[amount] = value
        assert explainer.reason_of(row)[amount] is reason


def test_contributions_by_code_add_up_to_those_by_feature(files: Files) -> None:
    explainer = load_explainer(files.content, files.golden, files.probability)
    of_features = explainer.contributions(files.golden)
    by_reason = explainer.by_reason(files.golden, of_features)
    assert by_reason.shape == (len(files.golden), len(MODEL_REASONS))
    assert np.allclose(by_reason.sum(axis=1), of_features.sum(axis=1), atol=1e-12)
    for row, found in zip(files.golden[:20], by_reason, strict=False):
        expected = dict.fromkeys(MODEL_REASONS, 0.0)
        for reason, value in zip(explainer.reason_of(row), explainer.contributions(row[None])[0].tolist(), strict=True):
            expected[reason] += value
        assert np.allclose(found, list(expected.values()), atol=1e-12)


def test_the_largest_codes_that_raise_the_score_are_named_and_crumbs_are_not() -> None:
    values = np.zeros((3, len(MODEL_REASONS)))
    place = {reason: i for i, reason in enumerate(MODEL_REASONS)}
    for row, named in enumerate(
        (
            {
                Reason.NEW_DEVICE: 1.0,
                Reason.AMOUNT_HIGH: 3.0,
                Reason.CROSS_BORDER: 2.0,
                Reason.CARD_TRAVEL: 1.5,
                Reason.IP_BUSY: 0.9,
            },
            {Reason.NEW_DEVICE: 1.0, Reason.AMOUNT_HIGH: 0.04, Reason.CROSS_BORDER: -5.0},
        )
    ):
        for reason, value in named.items():
            values[row, place[reason]] = value
    codes = leading_codes(values)
    assert codes[0] == [Reason.AMOUNT_HIGH, Reason.CROSS_BORDER, Reason.CARD_TRAVEL, Reason.NEW_DEVICE]
    assert codes[1] == [Reason.NEW_DEVICE]
    assert codes[2] == []


def test_of_two_codes_that_contradict_each_other_the_larger_is_named() -> None:
    place = {reason: i for i, reason in enumerate(MODEL_REASONS)}
    values = np.zeros((1, len(MODEL_REASONS)))
    for reason, value in ((Reason.DEVICE_BUSY, 3.0), (Reason.DEVICE_LITTLE_KNOWN, 2.0), (Reason.NEW_DEVICE, 1.0)):
        values[0, place[reason]] = value
    assert leading_codes(values) == [[Reason.DEVICE_BUSY, Reason.NEW_DEVICE]]


@pytest.mark.parametrize(
    ("reasons", "codes", "merged"),
    [
        ([Reason.MODEL_SCORE_HIGH], [Reason.NEW_DEVICE, Reason.AMOUNT_HIGH], [Reason.NEW_DEVICE, Reason.AMOUNT_HIGH]),
        ([Reason.MODEL_SCORE_HIGH], [], [Reason.MODEL_SCORE_HIGH]),
        ([], [Reason.NEW_DEVICE], [Reason.NEW_DEVICE]),
        ([Reason.MODEL_SCORE_HIGH, Reason.IP_MANY_CARDS], [Reason.NEW_DEVICE], [Reason.IP_MANY_CARDS, Reason.NEW_DEVICE]),
        ([Reason.CARD_VELOCITY, Reason.MODEL_SCORE_HIGH], [Reason.CARD_VELOCITY], [Reason.CARD_VELOCITY]),
        (
            [Reason.CARD_VELOCITY, Reason.MODEL_SCORE_HIGH, Reason.IP_MANY_CARDS],
            [Reason.NEW_DEVICE, Reason.AMOUNT_HIGH, Reason.CARD_TRAVEL],
            [Reason.CARD_VELOCITY, Reason.IP_MANY_CARDS, Reason.NEW_DEVICE, Reason.AMOUNT_HIGH],
        ),
    ],
)
def test_the_rules_reasons_come_first_then_the_models(reasons: list[Reason], codes: list[Reason], merged: list[Reason]) -> None:
    found = with_model_codes(reasons, codes)
    assert found == merged
    assert len(found) <= REASONS_MAX


def test_a_model_is_loaded_with_its_explainer(tmp_path: Path) -> None:
    make_model_dir(tmp_path, trees=5)
    model = load_model(tmp_path, CHAMPION)
    assert model is not None
    assert model.explainer is not None
    assert model.explainer.trees == 5


def test_a_model_without_explanation_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path, CHAMPION)
    assert model is not None
    assert model.explainer is None
    assert "has no explanation" in caplog.text


def test_a_model_whose_explanation_is_anothers_serves_without(
    tmp_path: Path, others: Files, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_model_dir(tmp_path, trees=5)
    entry = manifest.routes[CHAMPION]
    path = tmp_path / entry.directory / EXPLANATION_FILE
    path.write_bytes(others.content)
    signed = msgspec.structs.replace(entry, files=entry.files | {EXPLANATION_FILE: sha256_file(path)})
    write_manifest(tmp_path, msgspec.structs.replace(manifest, routes={CHAMPION: signed}))
    with caplog.at_level(logging.ERROR):
        model = load_model(tmp_path, CHAMPION)
    assert model is not None
    assert model.explainer is None
    assert "can't be used: a golden row's margin differs" in caplog.text
