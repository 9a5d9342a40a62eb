"""From the registry to a file store or S3 and from there to a gateway, which needs no MLflow to start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from deploy.ports import free_ports
from deploy.stack import Stack
from gateway.contracts.model_meta import ADMISSION_FILE, EXPLANATION_FILE, MODEL_FILE, PACKAGE_FILES, REFERENCE_FILE, read_manifest
from gateway.contracts.settings import Settings, settings_env
from gateway.models.model import load_model
from model_export import registry_commands
from model_export.commands import train_and_register
from model_export.errors import PackageRefusedError, RegistryRefusedError, RegistryUnavailableError
from model_export.pull import pull_models
from model_export.registry import Registry
from model_export.signing import read_public_key
from model_export.url_store import UrlStore
from tests.factories_model import write_training_set
from tests.helpers import running_command
from tests.integration.gateway_helpers import make_transaction, name, post, ready_without
from tests.s3 import s3_server

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROWS = 1500
BUCKET = "models"
READY_WITHIN_S = 60
EXTRAS = (ADMISSION_FILE, EXPLANATION_FILE, REFERENCE_FILE)


@pytest.fixture
def local(stack: Stack, settings: Settings, tmp_path: Path) -> Settings:
    """The stack's MLflow with a training set and a model directory of the test's own."""
    assert stack.pid("mlflow") is not None
    mine = dataclasses.replace(settings, tables_uri=str(tmp_path / "tables"), model_dir=str(tmp_path / "models"))
    write_training_set(mine.tables, rows=ROWS)
    return mine


@pytest.fixture
def elsewhere(local: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Another machine's model directory, also for what reads the environment; nobody listens where MLflow should be."""
    other = dataclasses.replace(local, mlflow_port=free_ports(1)[0], model_dir=str(tmp_path / "elsewhere"))
    for variable, value in settings_env(other).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RegistryUnavailableError):
        Registry(other.mlflow).check()
    return other


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket on a server that speaks S3, with what its clients need in the environment."""
    with s3_server(tmp_path / "s3.log", BUCKET) as variables:
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        yield f"s3://{BUCKET}/prefix"


def trained(settings: Settings, name: str, *aliases: str) -> None:
    """Registers a model for each alias and pulls them."""
    for alias in ("champion", *aliases):
        train_and_register(settings, alias=alias, name=name)
    pull_models(settings.models_path, Registry(settings.mlflow), name)


def test_a_gateway_starts_and_scores_from_a_published_copy_with_mlflow_down(
    local: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    trained(local, "published", "shadow-a")
    url = f"file://{tmp_path}/store/models"
    assert UrlStore(url).publish(local.models_path) == 2 * (len(PACKAGE_FILES) + len(EXTRAS)) + 1
    assert registry_commands.pull(["--from", url, "--name", "published"]) == 0
    assert read_manifest(elsewhere.models_path) == read_manifest(local.models_path)
    assert load_model(elsewhere.models_path, "shadow-a") is not None
    wide = dataclasses.replace(elsewhere, feature_budget_ms=1000, decision_budget_ms=3000, publish_budget_ms=1000)
    with running_command(wide, "serve", log_path=tmp_path / "gateway.log") as command:
        command.wait_until(lambda: ready_without(wide, "redis", "model", "kafka"), READY_WITHIN_S, "the gateway is ready")
        status, answer = post(wide, make_transaction(name("copied")))
        assert command.stop()
    assert (status, answer["model"]["name"], answer["model"]["version"]) == (200, "published", "1")
    assert answer["probability"] is not None


def test_s3_carries_a_model_from_one_machine_to_another(
    local: Settings, elsewhere: Settings, s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(local, "by-s3")
    monkeypatch.setenv("FRAUDGATE_MODEL_DIR", str(local.models_path))
    assert registry_commands.publish(["--to", s3]) == 0
    monkeypatch.setenv("FRAUDGATE_MODEL_DIR", str(elsewhere.models_path))
    assert registry_commands.pull(["--from", s3, "--name", "by-s3"]) == 0
    assert "champion   by-s3 version 1  downloaded" in capsys.readouterr().out
    assert load_model(elsewhere.models_path, "champion") is not None
    assert registry_commands.pull(["--from", s3, "--name", "by-s3"]) == 0
    assert "the manifest was right already" in capsys.readouterr().out
    # One byte changed in the bucket is seen, and what was there stays.
    bucket = boto3.resource("s3", region_name="us-east-1").Bucket(BUCKET)
    stored = bucket.Object(f"prefix/by-s3-1/{MODEL_FILE}")
    stored.put(Body=stored.get()["Body"].read()[:-1] + b"x")
    (elsewhere.models_path / "by-s3-1" / MODEL_FILE).unlink()
    manifest = (elsewhere.models_path / "manifest.json").read_bytes()
    assert registry_commands.pull(["--from", s3, "--name", "by-s3"]) == 1
    assert "model.onnx is corrupted" in capsys.readouterr().err
    assert (elsewhere.models_path / "manifest.json").read_bytes() == manifest
    assert registry_commands.pull(["--from", "s3://no-such-bucket/prefix"]) == 1
    assert capsys.readouterr().err.startswith("fraudgate pull: ")


def test_a_published_file_that_was_changed_is_refused(local: Settings, tmp_path: Path) -> None:
    trained(local, "tampered")
    UrlStore(f"file://{tmp_path}/store").publish(local.models_path)
    file = tmp_path / "store/tampered-1" / MODEL_FILE
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(PackageRefusedError, match=r"model\.onnx is corrupted"):
        pull_models(tmp_path / "elsewhere", UrlStore(f"file://{tmp_path}/store"), "tampered")
    with pytest.raises(RegistryRefusedError, match=r"there is no manifest\.json"):
        pull_models(tmp_path / "elsewhere", UrlStore(f"file://{tmp_path}/nothing"), "tampered")
    assert not (tmp_path / "elsewhere" / "manifest.json").exists()


def test_a_signed_model_arrives_and_an_unsigned_one_is_refused_where_a_key_is_asked_for(
    local: Settings, elsewhere: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "model.key", tmp_path / "model.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    monkeypatch.setenv("FRAUDGATE_MODEL_PUBLIC_KEY_PATH", str(public))
    monkeypatch.setenv("FRAUDGATE_MLFLOW_URL", local.mlflow)
    train_and_register(local, name="signed")
    assert registry_commands.pull(["--name", "signed"]) == 1
    assert "version 1 is not signed" in capsys.readouterr().err
    assert not (elsewhere.models_path / "manifest.json").exists()

    train_and_register(dataclasses.replace(local, model_signing_key_path=str(private)), name="signed")
    assert registry_commands.pull(["--name", "signed"]) == 0
    entry = read_manifest(elsewhere.models_path).routes["champion"]
    assert (entry.version, entry.signature is None) == ("2", False)
    # The signature travels on with the manifest.
    UrlStore(f"file://{tmp_path}/store").publish(elsewhere.models_path)
    third = tmp_path / "third"
    pull_models(third, UrlStore(f"file://{tmp_path}/store"), "signed", read_public_key(str(public)))
    assert read_manifest(third) == read_manifest(elsewhere.models_path)


@pytest.mark.parametrize(
    ("field", "value"), [("version", "../../elsewhere"), ("directory", "../published-1"), ("directory", "/etc")]
)
def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path: Path, field: str, value: str) -> None:
    store = tmp_path / "store"
    store.mkdir()
    entry = {"name": "m", "version": "1", "directory": "m-1", "files": {}} | {field: value}
    (store / "manifest.json").write_text(json.dumps({"routes": {"champion": entry}}))
    with pytest.raises(PackageRefusedError, match="can't be one of a model"):
        pull_models(tmp_path / "models", UrlStore(f"file://{store}"), "m")


def test_an_address_that_is_none_is_refused() -> None:
    for url in ("/srv/models", "http://example.com/models", "models"):
        with pytest.raises(RegistryRefusedError, match="is no address of a model directory"):
            UrlStore(url)
