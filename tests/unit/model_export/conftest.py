"""A small trained model and its export, for tests that look at exports."""

from __future__ import annotations

import pytest

from model_export.dataset import TrainingSet
from model_export.export import Export, export
from model_export.training import TrainedModel, train
from tests.factories_model import make_training_set


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    return make_training_set(3000)


@pytest.fixture(scope="module")
def model(data: TrainingSet) -> TrainedModel:
    return train(data, threads=1, rounds_max=40)


@pytest.fixture(scope="module")
def exported(model: TrainedModel, data: TrainingSet) -> Export:
    return export(model.booster, data.features)
