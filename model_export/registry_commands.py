"""What a person does with registered models: fraudgate pull, publish, models, promote, rollback, demote."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway.contracts.decision import Route
from gateway.contracts.model_meta import REGISTERED_NAME
from gateway.contracts.settings import Settings, load_settings
from model_export import promotion
from model_export.errors import ModelExportError
from model_export.pull import ModelSource, Pulled, pull_models
from model_export.pull_loop import Patience, keep_pulling, pull_patiently
from model_export.registry import Registry
from model_export.signing import read_public_key
from model_export.url_store import UrlStore
from model_export.versions import ModelVersion

ROUTE_WIDTH_MIN = 11
PULL_S_MAX = 86_400


def pull(argv: list[str]) -> int:
    """`fraudgate pull`: the models of the aliases champion, challenger and shadow... into the gateway's model directory.

    Returns 0, or 1 with a message when the directory was left as it was.
    """
    options = _pull_options(argv)
    settings = load_settings()

    def say(line: str) -> None:
        print(f"fraudgate pull: {line}", file=sys.stderr, flush=True)

    try:
        key = read_public_key(settings.model_public_key_path)
        source: ModelSource = Registry(settings.mlflow) if options.url is None else UrlStore(options.url)
        if options.every_s is not None:
            stop = threading.Event()
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, lambda *_: stop.set())
            changed = Change(settings.models_path)
            keep_pulling(
                lambda: changed.tell(pull_models(settings.models_path, source, options.name, key)), options.every_s, stop, say
            )
            return 0
        patience = Patience(options.wait_s, keep=options.or_keep, without=options.or_without)
        pull_patiently(
            lambda: _tell_pulled(settings.models_path, pull_models(settings.models_path, source, options.name, key)),
            settings.models_path,
            patience,
            say if options.wait_s or options.or_keep or options.or_without else lambda _: None,
        )
    except (ModelExportError, OSError) as exc:
        return _fail("pull", exc)
    return 0


def _pull_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fraudgate pull",
        description="Brings the models of the aliases champion, challenger and shadow... to the gateway's model directory.",
    )
    parser.add_argument("--name", default=REGISTERED_NAME, help="registered name (default: %(default)s)")
    parser.add_argument(
        "--from",
        dest="url",
        metavar="URL",
        help="a published model directory, file:///... or s3://bucket/prefix, instead of MLflow",
    )
    parser.add_argument("--every-s", type=float, metavar="N", help="stay, and pull every N seconds until SIGTERM")
    parser.add_argument(
        "--wait-s", type=float, default=0.0, metavar="N", help="try again for so long when it fails (default: once)"
    )
    parser.add_argument(
        "--or-keep",
        action="store_true",
        help="when it fails and the model directory holds whole models: leave it at those, status 0",
    )
    parser.add_argument(
        "--or-without",
        action="store_true",
        help="when it fails to the end: status 0 all the same; the gateway decides by rules alone",
    )
    options = parser.parse_args(argv)
    if options.every_s is not None and not 1 <= options.every_s <= PULL_S_MAX:
        parser.error(f"--every-s must be in 1..{PULL_S_MAX}")
    if not 0 <= options.wait_s <= PULL_S_MAX:
        parser.error(f"--wait-s must be in 0..{PULL_S_MAX}")
    return options


class Change:
    """Tells of a pull that changed something, and of the first."""

    def __init__(self, models_path: Path) -> None:
        self._models_path = models_path
        self._first = True

    def tell(self, pulled: Pulled) -> None:
        if self._first or pulled.changed:
            _tell_pulled(self._models_path, pulled)
        self._first = False


def _tell_pulled(models_path: Path, pulled: Pulled) -> None:
    width = max(ROUTE_WIDTH_MIN, *(len(route) + 1 for route in pulled.routes))
    for route, entry in sorted(pulled.routes.items()):
        note = "downloaded" if entry.version in pulled.fetched else "there already"
        print(f"{route:<{width}}{entry.name} version {entry.version}  {note}  {models_path / entry.directory}")
    print("the manifest has changed" if pulled.changed else "the manifest was right already", flush=True)


def publish(argv: list[str]) -> int:
    """`fraudgate publish`: the gateway's model directory, packages first and manifest last, to a place that `pull --from` reads.

    Returns 0, or 1 with a message; then the manifest that is there still names what it named.
    """
    parser = argparse.ArgumentParser(
        prog="fraudgate publish", description="Copies the gateway's model directory to where fraudgate pull --from reads it."
    )
    parser.add_argument("--to", dest="url", required=True, metavar="URL", help="file:///... or s3://bucket/prefix")
    options = parser.parse_args(argv)
    try:
        copied = UrlStore(options.url).publish(load_settings().models_path)
    except (ModelExportError, OSError) as exc:
        return _fail("publish", exc)
    print(f"{copied} files copied to {options.url}; bring them to a gateway with: fraudgate pull --from {options.url}")
    return 0


def models(argv: list[str]) -> int:
    """`fraudgate models`: the registered versions, newest first. Returns 0, or 1 with a message."""
    parser = argparse.ArgumentParser(prog="fraudgate models", description="Registered versions, newest first.")
    parser.add_argument("--name", default=REGISTERED_NAME, help="registered name (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        registry = _registry(load_settings())
        versions = registry.versions(options.name)
    except ModelExportError as exc:
        return _fail("models", exc)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(versions), indent=2).decode())
    else:
        print(
            versions_table(versions) if versions else f"no version of {options.name} is registered; make one with: fraudgate train"
        )
    return 0


def promote(argv: list[str]) -> int:
    """`fraudgate promote VERSION`: an alias to an admitted version. Returns 0, or 1 with a message when nothing moved."""
    parser = _change_parser("promote", "Points an alias at an admitted version.")
    parser.add_argument("version", help="version of the model: fraudgate models lists them")
    parser.add_argument("--alias", default=Route.CHAMPION.value, help="champion, challenger or shadow... (default: %(default)s)")
    options = parser.parse_args(argv)
    settings = load_settings()
    try:
        moves = promotion.promote(
            _registry(settings), settings.models_path, options.name, options.version, options.alias, reason=options.reason
        )
    except (ModelExportError, OSError) as exc:
        return _fail("promote", exc)
    if not moves:
        print(f"version {options.version} of {options.name} is {options.alias} already")
    _tell(moves)
    return 0


def rollback(argv: list[str]) -> int:
    """`fraudgate rollback`: the former champion again. Returns 0, or 1 with a message when nothing moved."""
    parser = _change_parser("rollback", "Makes the former champion champion again; a second time: the one before that.")
    options = parser.parse_args(argv)
    settings = load_settings()
    try:
        move = promotion.rollback(_registry(settings), settings.models_path, options.name, reason=options.reason)
    except (ModelExportError, OSError) as exc:
        return _fail("rollback", exc)
    _tell([move])
    return 0


def demote(argv: list[str]) -> int:
    """`fraudgate demote ALIAS`: takes a challenger or a shadow out. Returns 0, or 1 with a message when nothing moved."""
    parser = _change_parser("demote", "Takes the alias of a challenger or of a shadow away.")
    parser.add_argument("alias", help="challenger or shadow...")
    options = parser.parse_args(argv)
    settings = load_settings()
    try:
        move = promotion.demote(_registry(settings), settings.models_path, options.name, options.alias, reason=options.reason)
    except (ModelExportError, OSError) as exc:
        return _fail("demote", exc)
    _tell([move])
    return 0


def versions_table(versions: list[ModelVersion]) -> str:
    rows: list[tuple[str, ...]] = [
        ("version", "aliases", "admission", "against", "AP", "AUC", "training set", "rows", "created", "code")
    ]
    for v in versions:
        table_version = "-" if v.training_table_version is None else str(v.training_table_version)
        rows.append(
            (
                v.version,
                ", ".join(v.aliases) or "-",
                v.admission or "missing",
                v.against or "-",
                *(f"{v.metrics[m]:.4f}" if m in v.metrics else "-" for m in ("test_average_precision", "test_auc")),
                table_version,
                "-" if v.training_rows is None else str(v.training_rows),
                datetime.fromtimestamp(v.created_at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M"),
                v.code_version or "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _change_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"fraudgate {command}", description=description)
    parser.add_argument("--name", default=REGISTERED_NAME, help="registered name (default: %(default)s)")
    parser.add_argument("--reason", default="", help="why, for the audit entry")
    return parser


def _registry(settings: Settings) -> Registry:
    registry = Registry(settings.mlflow)
    registry.check()
    return registry


def _tell(moves: list[promotion.Moved]) -> None:
    for move in moves:
        before = "nothing" if move.before is None else f"version {move.before}"
        after = "nothing" if move.after is None else f"version {move.after}"
        print(f"{move.alias}: from {before} to {after}")
    if moves:
        print("bring it to the gateway with: fraudgate pull")


def _fail(command: str, exc: Exception) -> int:
    print(f"fraudgate {command}: {exc}", file=sys.stderr)
    return 1
