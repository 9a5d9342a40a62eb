"""From the Delta table through a real MLflow server to a directory that the gateway can load, and what a broken registry costs."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
from mlflow import MlflowClient

from deploy.ports import free_ports
from deploy.receipts import CannotExplainError, Logged, model_of
from deploy.services import data_path
from deploy.stack import Stack
from gateway.contracts.audit import read_audit
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import (
    GOLDEN_FILE,
    GOLDEN_TOLERANCE,
    INPUT_NAME,
    METADATA_FILE,
    MODEL_FILE,
    OUTPUT_NAME,
    REFERENCE_FILE,
    ModelMetadata,
    read_manifest,
    sha256_file,
)
from gateway.contracts.reference import decode
from gateway.contracts.settings import Settings, settings_env
from gateway.models.model import load_model
from model_export import commands, registry_commands
from model_export.admission import read_report
from model_export.commands import Outcome, train_and_register
from model_export.errors import PackageRefusedError, PromotionRefusedError, RegistryUnavailableError
from model_export.export import Export, export, to_onnx
from model_export.promotion import demote, promote, rollback
from model_export.pull import pull_models
from model_export.registry import Registry
from model_export.training import train
from tests.factories_model import make_rows, make_training_set, write_training_set
from tests.helpers import HOST, run_command

pytestmark = pytest.mark.integration

# Each test registers under a name of its own, so that they share one MLflow.
ROWS = 1500


@pytest.fixture
def local(stack: Stack, settings: Settings, tmp_path: Path) -> Settings:
    """The stack's MLflow with a training set and a model directory of the test's own."""
    assert stack.pid("mlflow") is not None
    mine = dataclasses.replace(settings, tables_uri=str(tmp_path / "tables"), model_dir=str(tmp_path / "models"))
    write_training_set(mine.tables, rows=ROWS)
    return mine


@pytest.fixture
def nowhere(local: Settings) -> Settings:
    """The same, but nobody listens where MLflow should be."""
    return dataclasses.replace(local, mlflow_port=free_ports(1)[0])


def pull(settings: Settings, name: str) -> list[str]:
    """The versions that a pull downloaded."""
    return pull_models(settings.models_path, Registry(settings.mlflow), name).fetched


def artifacts(settings: Settings, outcome: Outcome) -> Path:
    """Where the server keeps the files of a version."""
    client = MlflowClient(settings.mlflow)
    run_id = client.get_model_version(outcome.registered.name, outcome.registered.version).run_id
    found = list(data_path(settings, "mlflow").glob(f"artifacts/*/{run_id}/artifacts/model"))
    assert len(found) == 1
    return found[0]


def test_a_training_set_becomes_a_model_that_computes_its_golden_rows(local: Settings) -> None:
    outcome = train_and_register(local, name="whole-way")
    assert (outcome.registered.version, outcome.training_set_version) == ("1", 0)
    assert pull(local, "whole-way") == ["1"]

    entry = read_manifest(local.models_path).routes["champion"]
    directory = local.models_path / entry.directory
    metadata = msgspec.json.decode((directory / METADATA_FILE).read_bytes(), type=ModelMetadata)
    assert (metadata.name, metadata.version, metadata.feature_fingerprint) == ("whole-way", "1", FINGERPRINT)
    assert (metadata.training_table_version, metadata.training_rows) == (0, outcome.model.training_rows)
    assert metadata.metrics["test_auc"] == outcome.model.metrics["test_auc"]
    # What drift is told from came along.
    assert decode((directory / REFERENCE_FILE).read_bytes()).rows == outcome.rows
    serving = load_model(local.models_path, "champion")
    assert serving is not None
    assert serving.digest == outcome.registered.sha256[MODEL_FILE]
    session = onnxruntime.InferenceSession(directory / MODEL_FILE, providers=["CPUExecutionProvider"])
    with np.load(directory / GOLDEN_FILE) as golden:
        scored = session.run([OUTPUT_NAME], {INPUT_NAME: golden["features"]})[0][:, 1]
        assert np.abs(scored - golden["probability"]).max() <= GOLDEN_TOLERANCE


def test_the_registry_shows_how_the_model_came_about(local: Settings) -> None:
    outcome = train_and_register(local, name="shown")
    client = MlflowClient(local.mlflow)
    version = client.get_model_version_by_alias("shown", "champion")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training_table_version"] == "0"
    assert run.data.params["base_score"] == str(outcome.model.params["base_score"])
    assert run.data.params["trees"] == str(outcome.model.trees)
    assert run.data.metrics["test_average_precision"] == outcome.model.metrics["test_average_precision"]
    assert read_report(artifacts(local, outcome)) == outcome.admission
    assert outcome.admission.passed
    assert {"label flips", "latency at batch 64", "quality", "slices"} <= {check.name for check in outcome.admission.checks}
    assert "code_version" in run.data.params
    pictures = {Path(f.path).name for f in client.list_artifacts(version.run_id, "plots")}
    assert pictures == {"precision_recall.png", "calibration.png", "score_histogram.png"}
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, msgspec.json.decode(dataset.source)["delta_version"]) == ("training_set", 0)


def test_training_again_makes_the_next_version_and_moves_the_alias(local: Settings) -> None:
    train_and_register(local, name="again")
    pull(local, "again")
    write_training_set(local.tables, rows=ROWS, seed=2)
    assert train_and_register(local, name="again").registered.version == "2"
    assert pull(local, "again") == ["2"]
    assert read_manifest(local.models_path).routes["champion"].version == "2"
    # An older version of the table can be trained on, and another alias leaves the champion alone.
    outcome = train_and_register(local, 0, "challenger", "again")
    assert outcome.training_set_version == 0
    assert pull(local, "again") == ["3"]
    routes = {route: entry.version for route, entry in read_manifest(local.models_path).routes.items()}
    assert routes == {"champion": "2", "challenger": "3"}


def test_pulling_twice_changes_no_file(local: Settings) -> None:
    train_and_register(local, name="twice")
    pull(local, "twice")

    def files() -> dict[Path, tuple[int, int, int]]:
        return {p: (s.st_ino, s.st_mtime_ns, s.st_size) for p in local.models_path.rglob("*") if p.is_file() for s in [p.stat()]}

    before = files()
    assert pull(local, "twice") == []
    assert files() == before


def test_an_artifact_corrupted_in_the_registry_is_refused_and_the_old_model_stays(local: Settings) -> None:
    train_and_register(local, name="corrupted")
    pull(local, "corrupted")
    manifest = (local.models_path / "manifest.json").read_bytes()
    second = train_and_register(local, name="corrupted")
    file = artifacts(local, second) / MODEL_FILE
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    with pytest.raises(PackageRefusedError, match=r"version 2: model\.onnx is corrupted"):
        pull(local, "corrupted")
    assert (local.models_path / "manifest.json").read_bytes() == manifest
    entry = read_manifest(local.models_path).routes["champion"]
    assert sha256_file(local.models_path / entry.directory / MODEL_FILE) == entry.files[MODEL_FILE]


def test_a_refused_export_is_registered_for_a_look_and_gets_no_alias(local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    train_and_register(local, name="refused")
    foreign = train(make_training_set(ROWS, 9), threads=1, rounds_max=3).booster
    monkeypatch.setattr(commands, "export", lambda *a: dataclasses.replace(export(*a), onnx_bytes=to_onnx(foreign)))
    outcome = train_and_register(local, name="refused")
    assert outcome.alias is None
    assert "training rows" in {check.name for check in outcome.admission.failed()}
    versions = {v.version: (v.admission, v.aliases) for v in Registry(local.mlflow).versions("refused")}
    assert versions == {"1": ("passed", ["champion"]), "2": ("refused", [])}
    with pytest.raises(PromotionRefusedError, match="version 2 of refused was refused admission"):
        promote(Registry(local.mlflow), local.models_path, "refused", "2", "champion")
    # Nor does it reach a gateway when somebody moves the alias by hand.
    MlflowClient(local.mlflow).set_registered_model_alias("refused", "champion", "2")
    with pytest.raises(PackageRefusedError, match="version 2 was refused admission"):
        pull(local, "refused")


def test_a_model_worse_than_the_champion_is_refused_by_quality(local: Settings) -> None:
    train_and_register(local, name="worse")
    rows = make_rows(ROWS, seed=2)
    # The labels of the older rows are shuffled, so that nothing can be learnt; those of the newest are true.
    times = rows["event_time_ms"].to_numpy()
    older = times < np.quantile(times, 0.85)
    labels = rows["is_fraud"].to_numpy(zero_copy_only=False).copy()
    labels[older] = np.random.default_rng(3).permutation(labels[older])
    spoilt = rows.set_column(rows.schema.get_field_index("is_fraud"), "is_fraud", pa.array(labels))
    write_training_set(local.tables, data=spoilt)
    outcome = train_and_register(local, name="worse")
    assert outcome.admission.champion == "1"
    assert "quality" in {check.name for check in outcome.admission.failed()}
    assert MlflowClient(local.mlflow).get_model_version_by_alias("worse", "champion").version == "1"


def test_a_registration_that_breaks_off_leaves_the_alias_where_it_was(local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    train_and_register(local, name="broken-off")

    def breaks(_: Export, directory: Path) -> None:
        raise OSError(f"no space left in {directory}")

    monkeypatch.setattr("model_export.registry.write_export", breaks)
    with pytest.raises(OSError, match="no space left"):
        train_and_register(local, name="broken-off")
    client = MlflowClient(local.mlflow)
    assert client.get_model_version_by_alias("broken-off", "champion").version == "1"
    experiment = client.get_experiment_by_name("broken-off")
    assert experiment is not None
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert sorted(statuses) == ["FAILED", "FINISHED"]


def test_with_mlflow_down_training_says_how_to_start_it_before_it_trains(nowhere: Settings) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryUnavailableError) as refused:
        train_and_register(nowhere, name="down")
    assert time.monotonic() - started < 10
    assert all(part in str(refused.value) for part in (nowhere.mlflow, "FRAUDGATE_MLFLOW_URL", "fraudgate up"))


def test_with_mlflow_down_the_models_pulled_before_stay(local: Settings, nowhere: Settings) -> None:
    train_and_register(local, name="stays")
    pull(local, "stays")
    before = {p: p.stat() for p in local.models_path.rglob("*") if p.is_file()}
    with pytest.raises(RegistryUnavailableError):
        pull(nowhere, "stays")
    assert {p: p.stat() for p in local.models_path.rglob("*") if p.is_file()} == before


def test_a_server_that_accepts_and_never_answers_is_given_up(local: Settings) -> None:
    with socket.create_server((HOST, 0)) as silent:
        url = f"http://{HOST}:{silent.getsockname()[1]}"
        with pytest.raises(RegistryUnavailableError, match="does not answer"):
            Registry(url, timeout_s=0.2).check()


# MLflow's own store, which else runs in the server's process, uses what SQLAlchemy deprecates.
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_a_registry_without_a_server_serves_as_well(local: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Such a store puts the files under the working directory.
    monkeypatch.chdir(tmp_path)
    fileless = dataclasses.replace(local, mlflow_url=f"sqlite:///{tmp_path}/mlflow.db")
    train_and_register(fileless, name="serverless")
    assert pull(fileless, "serverless") == ["1"]
    assert Registry(fileless.mlflow).find("serverless", "challenger") is None


@pytest.fixture
def environment(local: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """`local`, also for what reads the environment."""
    for name, value in settings_env(local).items():
        monkeypatch.setenv(name, value)
    return local


def test_the_commands_train_and_pull(environment: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    write_training_set(environment.tables, rows=ROWS, seed=2)
    assert commands.train(["--training-set-version", "0", "--name", "by-hand"]) == 0
    printed = capsys.readouterr().out
    assert "trained on version 0" in printed
    assert "registered as by-hand version 1, which is now champion" in printed
    assert "FAILED" not in printed
    pulled = run_command(environment, "pull", "--name", "by-hand")
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert "champion   by-hand version 1  downloaded" in pulled.stdout


def test_the_commands_say_in_one_line_what_is_missing(environment: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.train(["--training-set-version", "5", "--name", "nobody"]) == 1
    assert "can't be read at version 5" in capsys.readouterr().err
    assert registry_commands.pull(["--name", "nobody"]) == 1
    assert "no model nobody with the alias champion" in capsys.readouterr().err
    assert not environment.models_path.exists()


def aliases(settings: Settings, name: str) -> dict[str, str]:
    return dict(MlflowClient(settings.mlflow).get_registered_model(name).aliases)


def test_promote_and_rollback_move_the_alias_and_leave_an_entry_each(local: Settings) -> None:
    registry, home = Registry(local.mlflow), local.models_path
    for alias in ("champion", "challenger", "shadow-b"):
        train_and_register(local, alias=alias, name="moves")
    promote(registry, home, "moves", "2", "champion", reason="won the comparison")
    # It is champion now, and challenger no more.
    assert aliases(local, "moves") == {"champion": "2", "shadow-b": "3"}
    promote(registry, home, "moves", "3", "champion")
    assert promote(registry, home, "moves", "3", "champion") == []
    assert rollback(registry, home, "moves", reason="too many alerts").after == "2"
    # A second rollback goes on to the one before, not back to where the first came from.
    assert rollback(registry, home, "moves").after == "1"
    with pytest.raises(PromotionRefusedError, match="was champion before version 1"):
        rollback(registry, home, "moves")
    assert demote(registry, home, "moves", "shadow-b").before == "3"
    assert aliases(local, "moves") == {"champion": "1"}

    entries, unreadable = read_audit(home)
    assert unreadable == 0
    assert [(e.action, e.subject, e.before, e.after) for e in entries] == [
        ("train", "champion", None, "1"),
        ("train", "challenger", None, "2"),
        ("train", "shadow-b", None, "3"),
        ("promote", "champion", "1", "2"),
        ("promote", "challenger", "2", None),
        ("promote", "champion", "2", "3"),
        ("rollback", "champion", "3", "2"),
        ("rollback", "champion", "2", "1"),
        ("demote", "shadow-b", "3", None),
    ]
    assert entries[3].reason == "won the comparison"
    # Every machine sees them in the registry, in any order within one millisecond.
    assert sorted(registry.audit("moves"), key=entries.index) == entries


def test_promote_refuses_what_has_no_version_no_report_or_no_route(local: Settings) -> None:
    registry, home = Registry(local.mlflow), local.models_path
    train_and_register(local, name="refuses")
    client = MlflowClient(local.mlflow)
    first = client.get_model_version("refuses", "1")
    unfinished = client.create_model_version("refuses", first.source, first.run_id).version
    for version, alias, reason in (
        ("77", "champion", "no version 77"),
        (str(unfinished), "champion", "no admission report"),
        ("1", "best", "is no route"),
    ):
        with pytest.raises(PromotionRefusedError, match=reason):
            promote(registry, home, "refuses", version, alias)
    with pytest.raises(PromotionRefusedError, match="not taken away"):
        demote(registry, home, "refuses", "champion")
    assert aliases(local, "refuses") == {"champion": "1"}


def test_an_audit_entry_that_cannot_be_written_leaves_the_alias_where_it_was(local: Settings) -> None:
    train_and_register(local, name="unaudited")
    train_and_register(local, alias="challenger", name="unaudited")
    blocked = local.models_path / "a-file"
    blocked.write_text("")
    with pytest.raises(OSError, match="a-file"):
        promote(Registry(local.mlflow), blocked, "unaudited", "2", "champion")
    assert aliases(local, "unaudited") == {"champion": "1", "challenger": "2"}


def test_the_commands_list_promote_and_roll_back(environment: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    name = ["--name", "listed"]
    train_and_register(environment, name="listed")
    train_and_register(environment, alias="challenger", name="listed")
    assert registry_commands.promote(["2", "--reason", "better", *name]) == 0
    assert registry_commands.promote(["9", *name]) == 1
    assert registry_commands.models(name) == 0
    printed = capsys.readouterr()
    assert "champion: from version 1 to version 2" in printed.out
    assert "there is no version 9 of listed" in printed.err
    assert [line.split()[:4] for line in printed.out.splitlines()[-2:]] == [
        ["2", "champion", "passed", "1"],
        ["1", "-", "passed", "-"],
    ]
    assert registry_commands.rollback(name) == 0
    capsys.readouterr()
    assert registry_commands.models(["--json", *name]) == 0
    listed = {v["version"]: v for v in msgspec.json.decode(capsys.readouterr().out)}
    assert listed["1"]["aliases"] == ["champion"]
    assert (listed["1"]["training_table_version"], listed["1"]["training_rows"]) == (0, ROWS)
    assert listed["1"]["training_data"] == listed["2"]["training_data"]
    assert 0 < listed["1"]["metrics"]["test_average_precision"] <= 1


def make_logged(name: str, version: str, digest: str) -> Logged:
    return Logged(
        transaction_id="t1",
        decision="decline",
        risk_score=900,
        probability=0.9,
        reasons=[],
        rule_hits=[],
        degraded=[],
        model_name=name,
        model_version=version,
        model_digest=digest,
        route="champion",
        policy_decision=None,
        feature_fingerprint=FINGERPRINT,
        policy_digest="",
        list_hits=None,
        lists_version=None,
        received_at_ms=0,
        decided_at_ms=0,
        features=np.zeros(len(FEATURE_NAMES), np.float32),
        transaction=None,
    )


def test_a_model_that_no_directory_holds_any_more_is_explained_from_the_registry(local: Settings) -> None:
    outcome = train_and_register(local, name="explained")
    digest = outcome.registered.sha256[MODEL_FILE]
    assert not list(local.models_path.glob(f"*/{METADATA_FILE}"))
    with model_of(local, make_logged("explained", "1", digest)) as loaded:
        assert loaded.model.digest == digest
        assert loaded.explainer.trees == outcome.model.trees
    with (
        pytest.raises(CannotExplainError, match="is another model than the receipt's"),
        model_of(local, make_logged("explained", "1", "0" * 64)),
    ):
        pass
    with pytest.raises(CannotExplainError, match="is neither in"), model_of(local, make_logged("explained", "99", digest)):
        pass
