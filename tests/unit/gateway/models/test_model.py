import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, read_manifest, sha256_file, write_manifest
from gateway.errors import ModelRefusedError
from gateway.models.model import ModelSlot, load_model
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.anyio


def test_a_good_model_scores_as_its_golden_rows_say(tmp_path: Path) -> None:
    write_model(tmp_path)
    model = load_model(tmp_path, "champion")
    assert model is not None
    with np.load(tmp_path / "fraudgate-1" / GOLDEN_FILE) as golden:
        assert np.allclose(model.probability(golden["features"]), golden["probability"], atol=1e-6)
    assert (model.ref.name, model.ref.version, model.ref.route) == ("fraudgate", "1", "champion")


def test_no_manifest_and_no_such_route_are_no_model(tmp_path: Path) -> None:
    assert load_model(tmp_path, "champion") is None
    write_model(tmp_path)
    assert load_model(tmp_path, "challenger") is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"feature_fingerprint": "0" * 16}, "trained on features"),
        ({"feature_names": list(reversed(FEATURE_NAMES))}, "another order"),
        ({"onnx_sha256": "0" * 64}, "belong to another model file"),
    ],
)
def test_a_model_of_other_features_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    write_model(tmp_path, **changes)
    with pytest.raises(ModelRefusedError, match=why):
        load_model(tmp_path, "champion")


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
def test_a_changed_file_is_refused(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    path = tmp_path / "fraudgate-1" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelRefusedError, match="is not what the manifest says"):
        load_model(tmp_path, "champion")


def sign_again(model_dir: Path, name: str) -> None:
    manifest = read_manifest(model_dir)
    entry = manifest.routes["champion"]
    files = entry.files | {name: sha256_file(model_dir / entry.directory / name)}
    write_manifest(model_dir, msgspec.structs.replace(manifest, routes={"champion": msgspec.structs.replace(entry, files=files)}))


@pytest.mark.parametrize("off", [1e-3, np.nan])
def test_a_golden_row_that_differs_is_refused(tmp_path: Path, off: float) -> None:
    write_model(tmp_path)
    path = tmp_path / "fraudgate-1" / GOLDEN_FILE
    with np.load(path) as golden:
        features, probability = golden["features"], golden["probability"].copy()
    probability[5] += off
    np.savez(path, features=features, probability=probability)
    sign_again(tmp_path, GOLDEN_FILE)
    with pytest.raises(ModelRefusedError, match="golden row differs"):
        load_model(tmp_path, "champion")


def test_bytes_that_are_no_model_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "fraudgate-1" / MODEL_FILE
    path.write_bytes(b"no model")
    sign_again(tmp_path, MODEL_FILE)
    with pytest.raises(ModelRefusedError):
        load_model(tmp_path, "champion")


def test_a_manifest_may_not_point_outside(tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "elsewhere")
    entry = msgspec.structs.replace(manifest.routes["champion"], directory="../elsewhere/fraudgate-1")
    write_manifest(tmp_path / "models", msgspec.structs.replace(manifest, routes={"champion": entry}))
    with pytest.raises(ModelRefusedError, match="outside"):
        load_model(tmp_path / "models", "champion")


async def test_the_slot_swaps_to_a_good_model_and_keeps_it_when_a_bad_one_comes(tmp_path: Path) -> None:
    swaps: list[str] = []
    refusals: list[None] = []
    slot = ModelSlot(tmp_path, lambda m: swaps.append(m.ref.version if m else "none"), lambda: refusals.append(None))
    await slot.refresh()
    assert swaps == []
    write_model(tmp_path, "1")
    await slot.refresh()
    assert slot.model is not None
    write_model(tmp_path, "2", feature_fingerprint="0" * 16)
    await slot.refresh()
    await slot.refresh()
    assert (slot.model.ref.version, len(refusals)) == ("1", 1)
    assert slot.refused is not None
    write_model(tmp_path, "3", seed=2)
    await slot.refresh()
    assert slot.model.ref.version == "3"
    assert swaps == ["1", "3"]


async def test_a_manifest_that_can_not_be_read_leaves_the_old_model(tmp_path: Path) -> None:
    write_model(tmp_path)
    slot = ModelSlot(tmp_path)
    await slot.refresh()
    (tmp_path / MANIFEST_FILE).write_bytes(b"{")
    await slot.refresh()
    assert slot.model is not None
    assert slot.refused is not None


async def test_the_watcher_notices_a_new_manifest(tmp_path: Path) -> None:
    changed = asyncio.Event()
    slot = ModelSlot(tmp_path, lambda _: changed.set())
    watcher = asyncio.create_task(slot.watch(poll_s=0.01))
    write_model(tmp_path)
    async with asyncio.timeout(10):
        await changed.wait()
    watcher.cancel()
    await asyncio.wait({watcher})
