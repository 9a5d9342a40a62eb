"""What the case service needs of the policy: its lists and where alerts go. Followed while it runs, like the gateway does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.decision import Outcome
from gateway.errors import PolicyRefusedError
from gateway.policy import load_policy
from gateway.policy.document import AlertRoute, ListDeclaration, ListKind
from gateway.policy.folder import SHIPPED, digest_of, read_folder

log = logging.getLogger(__name__)

POLL_S = 1.0


@dataclass(frozen=True)
class PolicyView:
    """`lists` by id, `watched` the ids of watch lists, `texts` what a rule tells the analyst, by its id."""

    digest: str
    lists: dict[str, ListDeclaration]
    watched: frozenset[str]
    routes: tuple[AlertRoute, ...]
    texts: dict[str, str]


def load_view(path: str) -> PolicyView:
    """Raises `PolicyRefusedError`."""
    policy = load_policy(path)
    return PolicyView(
        digest=policy.digest,
        lists={d.id: d for d in policy.lists},
        watched=frozenset(d.id for d in policy.lists if d.kind is ListKind.WATCH),
        routes=policy.alerts,
        texts={rule.id: rule.text for rule in policy.rules},
    )


class PolicyWatch:
    """`view` is the policy in use: the one before while a new one is refused. Raises `PolicyRefusedError` for the first."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.view = load_view(path)
        self._complaint = ""

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        try:
            if digest_of(read_folder(Path(self._path).expanduser() if self._path else SHIPPED)) == self.view.digest:
                self._complaint = ""
                return
            view = load_view(self._path)
        except PolicyRefusedError as exc:
            if str(exc) != self._complaint:
                log.error("cases: the policy of before stays: %s", exc)  # noqa: TRY400
            self._complaint = str(exc)
            return
        self._complaint = ""
        log.info("cases: policy %s", view.digest[:12])
        self.view = view


def webhooks_for(
    routes: Sequence[AlertRoute], outcome: Outcome, rule_hits: list[str], list_hits: list[str], amount_minor: int
) -> dict[str, list[str]]:
    """By webhook, the names of the routes that lead a decision there."""
    found: dict[str, list[str]] = {}
    for route in routes:
        if route.webhooks and route.takes(outcome, rule_hits, list_hits, amount_minor):
            for name in route.webhooks:
                found.setdefault(name, []).append(route.name)
    return found
