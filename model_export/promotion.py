"""Which version an alias points at, changed with a record of it: train, promote, rollback, demote.

Called by `fraudgate train`, `promote`, `rollback`, `demote` and `retrain`. Each change is a move of an alias in the registry, an entry
in the audit file of the model directory, and the same entry as a tag of the registered model, which every machine sees. The gateway
follows at the next `fraudgate pull`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gateway.contracts.audit import AuditEntry, append_audit
from gateway.contracts.decision import Route
from gateway.contracts.model_meta import is_route
from model_export.admission import PASSED
from model_export.errors import PromotionRefusedError
from model_export.package import RegisteredModel
from model_export.versions import ModelVersion

TRAIN, RETRAIN, PROMOTE, ROLLBACK, DEMOTE = "train", "retrain", "promote", "rollback", "demote"
REASON_CHARS_MAX = 500


class Aliases(Protocol):
    """What of a registry is needed here: `model_export.registry.Registry`. Its methods raise a `ModelExportError`."""

    def version(self, name: str, version: str) -> ModelVersion | None: ...

    def find(self, name: str, alias: str) -> RegisteredModel | None: ...

    def set_alias(self, name: str, alias: str, version: str) -> None: ...

    def remove_alias(self, name: str, alias: str) -> None: ...

    def note_audit(self, name: str, entry: AuditEntry) -> None: ...

    def audit(self, name: str) -> list[AuditEntry]: ...


@dataclass(frozen=True, kw_only=True)
class Moved:
    """`alias` pointed at version `before` (None: at none) and points at `after` (None: it is gone)."""

    alias: str
    before: str | None
    after: str | None


def promote(
    registry: Aliases, models_path: Path, name: str, version: str, alias: str, *, reason: str = "", action: str = PROMOTE
) -> list[Moved]:
    """Points `alias` at an admitted version. A challenger that becomes champion is challenger no more, so two moves are possible.

    Nothing moves when it points there already. There is no way past the admission. Raises `PromotionRefusedError`, or OSError when the
    audit file can't be written; then no alias has moved. Raises what the registry raises; when it went away between the move and its
    tag, the audit file alone has the entry.
    """
    _check_words(alias, reason)
    _check_admitted(registry, name, version)
    before = _pointed(registry, name, alias)
    moves = []
    if before != version:
        moves.append(_move(registry, models_path, name, Moved(alias=alias, before=before, after=version), action, reason))
    if alias == Route.CHAMPION.value and _pointed(registry, name, Route.CHALLENGER.value) == version:
        gone = Moved(alias=Route.CHALLENGER.value, before=version, after=None)
        moves.append(_move(registry, models_path, name, gone, action, "it is champion now"))
    return moves


def rollback(registry: Aliases, models_path: Path, name: str, *, reason: str = "") -> Moved:
    """Makes the former champion champion again: the one that the present champion took the alias from. Again: the one before that.

    Raises like `promote`.
    """
    alias = Route.CHAMPION.value
    _check_words(alias, reason)
    now = _pointed(registry, name, alias)
    if now is None:
        raise PromotionRefusedError(f"there is no champion of {name} to roll back from")
    target = former(registry.audit(name), alias, now)
    if target is None:
        raise PromotionRefusedError(f"nothing tells which version of {name} was champion before version {now}")
    _check_admitted(registry, name, target)
    return _move(registry, models_path, name, Moved(alias=alias, before=now, after=target), ROLLBACK, reason)


def demote(registry: Aliases, models_path: Path, name: str, alias: str, *, reason: str = "") -> Moved:
    """Takes an alias away: a challenger or a shadow leaves. Raises like `promote`, also for champion, without which nothing scores."""
    _check_words(alias, reason)
    if alias == Route.CHAMPION.value:
        raise PromotionRefusedError("a champion is replaced, by fraudgate promote or rollback, and not taken away")
    before = _pointed(registry, name, alias)
    if before is None:
        raise PromotionRefusedError(f"no version of {name} has the alias {alias}")
    return _move(registry, models_path, name, Moved(alias=alias, before=before, after=None), DEMOTE, reason)


def former(entries: list[AuditEntry], alias: str, version: str) -> str | None:
    """What `alias` pointed at before `version` took it, by the newest entry that says so, rollbacks aside.

    A rollback from 3 to 2 doesn't make 3 the version before 2, so a second rollback goes on to the one before 2.
    """
    for entry in reversed(entries):
        if entry.subject == alias and entry.after == version and entry.action != ROLLBACK:
            return entry.before
    return None


def _move(registry: Aliases, models_path: Path, name: str, move: Moved, action: str, reason: str) -> Moved:
    """The alias, then the record of it; without the record the alias goes back, so that no change is without its entry."""
    _point(registry, name, move.alias, move.after)
    try:
        entry = append_audit(models_path, action=action, subject=move.alias, before=move.before, after=move.after, reason=reason)
    except OSError:
        _point(registry, name, move.alias, move.before)
        raise
    registry.note_audit(name, entry)
    return move


def _point(registry: Aliases, name: str, alias: str, version: str | None) -> None:
    if version is None:
        registry.remove_alias(name, alias)
    else:
        registry.set_alias(name, alias, version)


def _pointed(registry: Aliases, name: str, alias: str) -> str | None:
    found = registry.find(name, alias)
    return None if found is None else found.version


def _check_words(alias: str, reason: str) -> None:
    if not is_route(alias):
        raise PromotionRefusedError(
            f"{alias!r} is no route of the gateway: champion, challenger, or a name that begins with shadow"
        )
    if len(reason) > REASON_CHARS_MAX:
        raise PromotionRefusedError(f"a reason has at most {REASON_CHARS_MAX} characters, this one has {len(reason)}")


def _check_admitted(registry: Aliases, name: str, version: str) -> None:
    found = registry.version(name, version)
    if found is None:
        raise PromotionRefusedError(f"there is no version {version} of {name}; fraudgate models lists them")
    if found.admission is None:
        raise PromotionRefusedError(f"version {version} of {name} has no admission report; train anew with: fraudgate train")
    if found.admission != PASSED:
        raise PromotionRefusedError(f"version {version} of {name} was refused admission; its run in MLflow names the failed checks")
