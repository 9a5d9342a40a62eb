"""`fraudgate retrain`: a new challenger from the newest matured labels, once or every so many hours. Never a champion.

Joins the feature jobs, which make the training set, with the export, which trains, asks for admission and registers. For a scheduler it
runs once and ends; a machine without one keeps it running with --every-hours.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from deltalake.exceptions import DeltaError

from deploy.locked import locked
from deploy.repeating import HOUR_S, repeat
from feature_jobs.matured import Matured, newly_matured
from feature_jobs.training_set import DAY_MS, LABEL_DELAY_DAYS, NoHistoryError, write_training_set
from gateway.contracts.decision import Route
from gateway.contracts.model_meta import REGISTERED_NAME
from gateway.contracts.settings import Settings, load_settings
from model_export.commands import refusal, report, train_and_register
from model_export.errors import ModelExportError, NothingNewError
from model_export.promotion import RETRAIN
from model_export.registry import Registry
from model_export.versions import ModelVersion

LABELS_MIN = 100
HOURS_MAX = 24 * 366
LOCK_FILE = ".retrain.lock"


class RetrainRunningError(RuntimeError):
    """Another retraining works on the same directory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`labels_min` is how many payments must have got a label since the last training; `days` how far back to train, None: all."""

    name: str = REGISTERED_NAME
    labels_min: int = LABELS_MIN
    label_delay_days: int = LABEL_DELAY_DAYS
    days: int | None = None


@dataclass(frozen=True)
class Attempt:
    """`version` is what was registered, None when nothing was; `admitted` whether it is challenger now; `said` tells why, for a person."""

    version: str | None
    admitted: bool
    said: str


def attempt(settings: Settings, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Attempt:
    """One retraining, or the reason why there is none.

    Raises a `ModelExportError`, `NoHistoryError` or `RetrainRunningError`; then no alias has moved.
    """
    registry = Registry(settings.mlflow)
    registry.check()
    busy = RetrainRunningError(f"another fraudgate retrain is at work in {settings.home_path}")
    with locked(settings.home_path / LOCK_FILE, busy):
        versions = registry.versions(plan.name)
        matured = _matured(settings, plan, last_trained(versions))
        if matured.payments < plan.labels_min:
            return Attempt(
                None,
                False,
                f"{matured.payments} newly matured labels since the last training, {plan.labels_min} are needed: skipped",
            )
        from_ms = None if plan.days is None else matured.until_ms - plan.days * DAY_MS
        say(f"{matured.payments} newly matured labels; computing the features of their payments")
        made = write_training_set(settings, from_ms=from_ms, as_of_ms=matured.as_of_ms, label_delay_days=plan.label_delay_days)
        known = frozenset(v.training_data for v in versions if v.training_data is not None and v.admission is not None)
        try:
            outcome = train_and_register(settings, made.version, Route.CHALLENGER, plan.name, say, action=RETRAIN, known_data=known)
        except NothingNewError as exc:
            return Attempt(None, False, f"{exc}: skipped")
    if not outcome.admission.passed:
        return Attempt(outcome.registered.version, False, f"{report(outcome)}\n{refusal(outcome)}")
    return Attempt(outcome.registered.version, True, report(outcome))


def last_trained(versions: list[ModelVersion]) -> ModelVersion | None:
    """The newest version whose registration came to its end and that says what it was trained on."""
    return next((v for v in versions if v.admission is not None and v.training_as_of_ms is not None), None)


def _matured(settings: Settings, plan: Plan, last: ModelVersion | None) -> Matured:
    return newly_matured(
        settings,
        label_delay_days=plan.label_delay_days,
        since_as_of_ms=None if last is None else last.training_as_of_ms,
        since_until_ms=None if last is None else last.training_until_ms,
    )


def retrain(argv: list[str]) -> int:
    """Exit status 0 when a challenger was made or there was nothing to do, 1 when it failed or the model was refused."""
    parser = argparse.ArgumentParser(
        prog="fraudgate retrain",
        description="Trains a challenger on the newest matured labels when enough of them are new. It never touches the champion.",
    )
    parser.add_argument("--name", default=REGISTERED_NAME, help="registered name (default: %(default)s)")
    parser.add_argument(
        "--labels-min", type=int, default=LABELS_MIN, metavar="N", help="newly matured labels needed (default: %(default)s)"
    )
    parser.add_argument(
        "--label-delay-days",
        type=int,
        default=LABEL_DELAY_DAYS,
        metavar="N",
        help="payments younger than this are left out: their labels are still to come (default: %(default)s)",
    )
    parser.add_argument("--days", type=int, metavar="N", help="train on the newest N days of what has matured (default: all)")
    parser.add_argument("--every-hours", type=float, metavar="H", help="go on, with an attempt every H hours (default: once)")
    options = parser.parse_args(argv)
    for name, least in (("labels_min", 0), ("label_delay_days", 0), ("days", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if options.every_hours is not None and not (math.isfinite(options.every_hours) and 0 < options.every_hours <= HOURS_MAX):
        parser.error(f"--every-hours must be above 0 and at most {HOURS_MAX}")
    settings = load_settings()
    plan = Plan(name=options.name, labels_min=options.labels_min, label_delay_days=options.label_delay_days, days=options.days)
    if options.every_hours is None:
        return _told(settings, plan)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    return repeat(lambda: _told(settings, plan), options.every_hours * HOUR_S, stop)


def _told(settings: Settings, plan: Plan) -> int:
    try:
        made = attempt(settings, plan, lambda line: print(f"{line} ...", flush=True))
    except (ModelExportError, NoHistoryError, RetrainRunningError, DeltaError, OSError) as exc:
        print(f"fraudgate retrain: {exc}", file=sys.stderr, flush=True)
        return 1
    print(made.said, flush=True)
    return 1 if made.version is not None and not made.admitted else 0
