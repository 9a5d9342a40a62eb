"""`fraudgate train` and `fraudgate pull`, as far as models are concerned."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from gateway.contracts.decision import Route
from gateway.contracts.model_meta import REGISTERED_NAME
from gateway.contracts.settings import Settings, load_settings
from model_export.checks import Check, check_export, refuse_failed
from model_export.dataset import read_training_set
from model_export.errors import ModelExportError
from model_export.export import export
from model_export.metrics import REPORT_THRESHOLDS
from model_export.package import RegisteredModel
from model_export.pull import pull_models
from model_export.reference import with_reference
from model_export.registry import Registry
from model_export.training import TrainedModel
from model_export.training import train as train_model


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training came to. `seconds` has the wall time of each step: read, train, export, checks, register."""

    registered: RegisteredModel
    alias: str
    model: TrainedModel
    checks: list[Check]
    rows: int
    training_set_version: int
    seconds: dict[str, float]


def train_and_register(
    settings: Settings,
    version: int | None = None,
    alias: str = Route.CHAMPION,
    name: str = REGISTERED_NAME,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Trains on the training set's `version` (None: the newest), checks the export, registers it and points `alias` at it.

    `say` hears what begins. The registry is asked first, so that nobody waits for a training whose result can't be kept. Raises a
    `ModelExportError`; then nothing is promoted.
    """
    registry = Registry(settings.mlflow)
    registry.check()
    watch = _Watch()
    data = read_training_set(settings.tables, version)
    watch.lap("read")
    say(f"training on {data.rows} rows by {data.features.shape[1]} features, {data.frauds} of them frauds")
    model = train_model(data)
    watch.lap("train")
    say(f"exporting {model.trees} trees to ONNX and comparing them with XGBoost")
    exported = with_reference(export(model.booster, data.features), data, model, settings.policy_path)
    watch.lap("export")
    checks = check_export(exported, model.booster, data.features)
    refuse_failed(checks)
    watch.lap("checks")
    say(f"registering in MLflow at {settings.mlflow}")
    registered = registry.register(name, alias, data, model, exported, checks)
    watch.lap("register")
    return Outcome(
        registered=registered,
        alias=alias,
        model=model,
        checks=checks,
        rows=data.rows,
        training_set_version=data.version,
        seconds=watch.laps,
    )


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

    Returns 0, or 1 with a message when nothing was promoted.
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
    return 0


def _say(line: str) -> None:
    print(f"{line} ...", flush=True)


def pull(argv: list[str]) -> int:
    """`fraudgate pull`: the models of the aliases champion, challenger and shadow... into the gateway's model directory.

    Returns 0, or 1 with a message when the directory was left as it was.
    """
    parser = argparse.ArgumentParser(
        prog="fraudgate pull",
        description="Brings the models of the aliases champion, challenger and shadow... to the gateway's model directory.",
    )
    parser.add_argument("--name", default=REGISTERED_NAME, help="registered name (default: %(default)s)")
    options = parser.parse_args(argv)
    settings = load_settings()
    try:
        pulled = pull_models(settings.models_path, Registry(settings.mlflow), options.name)
    except (ModelExportError, OSError) as exc:
        print(f"fraudgate pull: {exc}", file=sys.stderr)
        return 1
    for route, entry in sorted(pulled.routes.items()):
        note = "downloaded" if entry.version in pulled.fetched else "there already"
        print(f"{route:<11}{entry.name} version {entry.version}  {note}  {settings.models_path / entry.directory}")
    print("the manifest has changed" if pulled.changed else "the manifest was right already")
    return 0


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
    lines += [f"  {'ok' if check.passed else 'FAILED':<7}{check.name:<29}{check.found}" for check in outcome.checks]
    lines.append("")
    lines.append("  " + ", ".join(f"{step} {seconds:.1f} s" for step, seconds in outcome.seconds.items()))
    lines.append(
        f"registered as {outcome.registered.name} version {outcome.registered.version}, which is now {outcome.alias}; "
        "bring it to the gateway with: fraudgate pull"
    )
    return "\n".join(lines)
