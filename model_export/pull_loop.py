"""Pulling where nobody watches: before a gateway starts, and beside it for as long as it runs. Called by `fraudgate pull`.

A gateway that starts needs a model, or must be known to go without; one that runs gets what the aliases point at now. Neither may fail
because the registry is down: `Patience` says how long to wait and what then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model_export.errors import ModelExportError
from model_export.package import current_manifest, installed

RETRY_S = 5.0


@dataclass(frozen=True)
class Patience:
    """`wait_s`: how long to try again. Then, or at once with `keep` when the directory holds whole models, what is there will do;
    with `without`, nothing will do too.
    """

    wait_s: float = 0.0
    keep: bool = False
    without: bool = False


def whole(models_path: Path) -> bool:
    """Whether the manifest is there and every file that it names, with its very content."""
    manifest = current_manifest(models_path)
    return manifest is not None and bool(manifest.routes) and all(installed(models_path, e) for e in manifest.routes.values())


def pull_patiently(
    once: Callable[[], None],
    models_path: Path,
    patience: Patience,
    say: Callable[[str], None],
    clock_s: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> bool:
    """Calls `once` until it succeeds or patience ends. False when the models that are there have to do.

    Raises what `once` raised last, a `ModelExportError` or OSError, when they can't.
    """
    give_up = clock_s() + patience.wait_s
    while True:
        try:
            once()
        except (ModelExportError, OSError) as exc:
            say(str(exc))
            if patience.keep and whole(models_path):
                say("the models that are there stay")
                return False
            if clock_s() + RETRY_S > give_up:
                if not patience.without:
                    raise
                say("going on without a model")
                return False
            pause(RETRY_S)
        else:
            return True


def keep_pulling(once: Callable[[], None], every_s: float, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Calls `once` every `every_s` seconds until `stop` is set. A failure is told when it is new: the registry may be down for hours."""
    told = ""
    while not stop.is_set():
        try:
            once()
            told = ""
        except (ModelExportError, OSError) as exc:
            if str(exc) != told:
                told = str(exc)
                say(told)
        stop.wait(every_s)
