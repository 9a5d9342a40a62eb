"""`fraudgate train`, as far as the model is concerned: from the training set to a registered model that was admitted, or refused."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.decision import Route
from gateway.contracts.model_meta import REGISTERED_NAME, is_route
from gateway.contracts.settings import Settings, load_settings
from model_export.admission import Admission, Champion, admit, read_champion
from model_export.admission import report as admission_report
from model_export.dataset import read_training_set
from model_export.errors import ModelExportError, NothingNewError, OtherFeaturesError, PromotionRefusedError
from model_export.export import export
from model_export.metrics import REPORT_THRESHOLDS
from model_export.package import RegisteredModel, verify_package
from model_export.plots import plots
from model_export.policy_bands import read_bands
from model_export.promotion import TRAIN, promote
from model_export.reference import with_reference
from model_export.registry import Registry
from model_export.signing import read_signing_key
from model_export.training import TrainedModel, probabilities
from model_export.training import train as train_model
from model_export.versions import data_digest


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training came to. `alias` is the one that points at the version now, None for a version that was refused.

    `seconds` has the wall time of each step: read, train, export, admission, register.
    """

    registered: RegisteredModel
    alias: str | None
    model: TrainedModel
    admission: Admission
    rows: int
    training_set_version: int
    seconds: dict[str, float]


def train_and_register(
    settings: Settings,
    version: int | None = None,
    alias: str = Route.CHAMPION,
    name: str = REGISTERED_NAME,
    say: Callable[[str], None] = lambda _: None,
    *,
    action: str = TRAIN,
    known_data: frozenset[str] = frozenset(),
) -> Outcome:
    """Trains on the training set's `version` (None: the newest), asks for admission, registers, and points `alias` at what passed.

    A version that is refused is registered too, so that it can be looked at, and gets no alias. `say` hears what begins. The registry
    is asked first, so that nobody waits for a training whose result can't be kept. Raises a `ModelExportError`, `NothingNewError` when
    the rows are those of a digest in `known_data`; then nothing is promoted.
    """
    registry = Registry(settings.mlflow)
    registry.check()
    if not is_route(alias):
        raise PromotionRefusedError(
            f"{alias!r} is no route of the gateway: champion, challenger, or a name that begins with shadow"
        )
    bands = read_bands(settings.policy_path)
    signing_key = read_signing_key(settings.model_signing_key_path)
    watch = _Watch()
    data = read_training_set(settings.tables, version)
    if known_data and data_digest(data) in known_data:
        raise NothingNewError(
            f"a model of exactly the {data.rows} rows of version {data.version} of {data.table} is registered already"
        )
    champion, no_champion = _champion(registry, name)
    watch.lap("read")
    say(f"training on {data.rows} rows by {data.features.shape[1]} features, {data.frauds} of them frauds")
    model = train_model(data)
    watch.lap("train")
    say(f"exporting {model.trees} trees to ONNX and comparing them with XGBoost")
    exported = with_reference(export(model.booster, data.features), data, model, bands)
    watch.lap("export")
    admission = admit(exported, model, data, bands, champion, no_champion)
    watch.lap("admission")
    say(f"registering in MLflow at {settings.mlflow}")
    test = model.split.test
    pictures = plots(data.is_fraud[test], probabilities(model.booster, data.features[test]))
    registered = registry.register(name, data, model, exported, admission, pictures=pictures, signing_key=signing_key)
    if admission.passed:
        reason = f"trained on version {data.version} of {data.table}"
        promote(registry, settings.models_path, name, registered.version, alias, reason=reason, action=action)
    watch.lap("register")
    return Outcome(
        registered=registered,
        alias=alias if admission.passed else None,
        model=model,
        admission=admission,
        rows=data.rows,
        training_set_version=data.version,
        seconds=watch.laps,
    )


def _champion(registry: Registry, name: str) -> tuple[Champion | None, str]:
    """The model to be compared with, or why there is none. Raises a `ModelExportError` for one that can't be read."""
    found = registry.find(name, Route.CHAMPION.value)
    if found is None:
        return None, "no champion yet"
    with tempfile.TemporaryDirectory(prefix="fraudgate-champion-") as tmp:
        package = Path(tmp) / "package"
        registry.download(found, package)
        try:
            verify_package(package, found.name, found.version, found.sha256)
        except OtherFeaturesError:
            return None, f"champion version {found.version} is of other features"
        return read_champion(package), ""


class _Watch:
    """Wall seconds of the steps of a piece of work."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, step: str) -> None:
        now = time.monotonic()
        self.laps[step], self._since = now - self._since, now


def train(argv: list[str]) -> int:
    """The second half of `fraudgate train`: from the Delta table `training_set` to a registered model with an alias.

    --training-set-version N   version of the table to read; default: the newest
    --alias NAME               alias to set; default: champion
    --name NAME                registered name; default: fraudgate

    Returns 0, or 1 with a message when nothing was promoted: it failed, or the model was refused admission.
    """
    parser = argparse.ArgumentParser(
        prog="fraudgate train", description="Trains XGBoost on the training set, checks its ONNX export and registers it in MLflow."
    )
    parser.add_argument("--training-set-version", type=int, metavar="N", help="Delta version to train on (default: the newest)")
    parser.add_argument("--alias", default=Route.CHAMPION.value, help="alias to point at the new version (default: %(default)s)")
    parser.add_argument("--name", default=REGISTERED_NAME, help="registered name (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        outcome = train_and_register(load_settings(), options.training_set_version, options.alias, options.name, say=_say)
    except (ModelExportError, OSError) as exc:
        print(f"fraudgate train: {exc}", file=sys.stderr)
        return 1
    print(report(outcome))
    if not outcome.admission.passed:
        print(f"fraudgate train: {refusal(outcome)}", file=sys.stderr)
        return 1
    return 0


def refusal(outcome: Outcome) -> str:
    """Which checks refused the version, with what they found."""
    failed = "; ".join(f"{check.name} ({check.found})" for check in outcome.admission.failed())
    return f"{outcome.registered.name} version {outcome.registered.version} is refused, and no alias has moved: {failed}"


def _say(line: str) -> None:
    print(f"{line} ...", flush=True)


def report(outcome: Outcome) -> str:
    """The outcome as a table for a terminal."""
    model, metrics = outcome.model, outcome.model.metrics
    test = model.split.test
    lines = [
        "",
        f"trained on version {outcome.training_set_version} of the training set: {outcome.rows} rows; {model.training_rows} oldest "
        f"to train ({model.training_frauds} frauds), {test.stop - test.start} newest to measure",
        f"{model.trees} trees kept of {model.rounds_run} grown",
        "",
        "  on the newest rows",
        f"  AUC                {metrics['test_auc']:8.4f}",
        f"  average precision  {metrics['test_average_precision']:8.4f}",
        f"  log loss           {metrics['test_log_loss']:8.4f}",
        f"  fraud rate         {metrics['test_fraud_rate']:8.4f}   mean probability {metrics['test_mean_probability']:.4f}",
        "",
        "  threshold  precision  recall  alerts",
    ]
    for threshold in REPORT_THRESHOLDS:
        precision, recall, alerts = (metrics[f"test_{what}_at_{threshold:g}"] for what in ("precision", "recall", "alert_rate"))
        lines.append(f"  {threshold:9.2f}  {precision:9.3f}  {recall:6.3f}  {alerts:6.3%}")
    lines.append("")
    lines.append(admission_report(outcome.admission))
    lines.append("")
    lines.append("  " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in outcome.seconds.items()))
    registered = f"registered as {outcome.registered.name} version {outcome.registered.version}"
    if outcome.alias is None:
        lines.append(f"{registered}, refused: no alias points at it")
    else:
        lines.append(f"{registered}, which is now {outcome.alias}; bring it to the gateway with: fraudgate pull")
    return "\n".join(lines)
