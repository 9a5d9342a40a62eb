"""The policy and the lists that decide: exchanged between two batches, together read once a batch.

`PolicySlot.watch` looks at the policy's files, loads a changed policy beside the one that serves, off the event loop, and refuses what
can't be used: the old one stays. Files that are still being written are left until they have come to rest. The lists come from
gateway/policy/lists.py, by `use_lists`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.lists import ListBook
from gateway.errors import PolicyRefusedError
from gateway.metrics import Metrics
from gateway.policy import Policy, load_policy
from gateway.policy.document import RuleState
from gateway.policy.lists import UNKNOWN

log = logging.getLogger(__name__)

POLL_S = 0.5
# Files that are looked at; a policy of more is refused when it is loaded.
FILES_MAX = 10_000

# (name, change time, inode, size) of each file, and where the folder really lies: it may be a link that is exchanged.
Signature = tuple[str, tuple[tuple[str, int, int, int], ...]]


@dataclass(frozen=True, slots=True)
class Steering:
    """What people steer decisions by: what one batch sees of it."""

    policy: Policy
    lists: ListBook


def expect_counts(policy: Policy, metrics: Metrics) -> None:
    """Counters of the policy's rules and lists begin at 0, so that the first hit and the first error is seen as an increase."""
    for rule in policy.rules:
        if rule.state is not RuleState.OFF:
            metrics.rule_errors.labels(rule.id)
            (metrics.shadow_hits if rule.state is RuleState.SHADOW else metrics.rule_hits).labels(rule.id)
    for declared in policy.lists:
        metrics.list_hits.labels(declared.id)


class PolicySlot:
    """`live` is read by the scorers, once a batch. Everything here is called on the event loop. `path` is the setting, empty: nothing to
    watch. `on_change` is called with a policy that has come into use and the one before, `on_refused` with why one couldn't.
    """

    def __init__(
        self,
        policy: Policy,
        path: str = "",
        *,
        lists: ListBook = UNKNOWN,
        seen: Signature | None = None,
        load: Callable[[str], Policy] = load_policy,
        on_change: Callable[[Policy, Policy], None] = lambda *_: None,
        on_refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`seen` is the signature that the files had before `policy` was loaded from them."""
        self.live = Steering(policy, lists)
        self._path = path
        self._load = load
        self._on_change = on_change
        self._on_refused = on_refused
        # Of what was last loaded or refused, and of what was there at the last look.
        self._settled = self._before = seen
        # Why the files as they are now don't serve; None: they do.
        self.refused: str | None = None

    @property
    def policy(self) -> Policy:
        return self.live.policy

    def use_lists(self, book: ListBook) -> None:
        """From the next batch on."""
        self.live = Steering(self.live.policy, book)

    async def refresh(self) -> None:
        """Take a policy into use whose files have changed and then stayed as they are since the last call."""
        if not self._path:
            return
        found = await asyncio.to_thread(signature, self._path)
        at_rest, self._before = found == self._before, found
        if found == self._settled or not at_rest:
            return
        try:
            policy = await asyncio.to_thread(self._load, self._path)
        except PolicyRefusedError as exc:
            policy, refused = None, str(exc)
        if await asyncio.to_thread(signature, self._path) != found:
            # It may be part of one and part of another.
            return
        self._settled = found
        if policy is None:
            self.refused = refused
            log.error("policy: refused, %s stays: %s", self.policy.digest[:12], refused)
            self._on_refused(refused)
            return
        self.refused = None
        if policy.digest == self.policy.digest:
            return
        before = self.policy
        self.live = Steering(policy, self.live.lists)
        log.info("policy: %s (sha256 %s) decides", policy.name, policy.digest)
        self._on_change(policy, before)

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Refreshes until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            await self.refresh()


def open_policy(path: str, *, on_change: Callable[[Policy, Policy], None], on_refused: Callable[[str], None]) -> PolicySlot:
    """A slot with the policy at `path`, the one that ships when it is empty. Raises `PolicyRefusedError`."""
    # Before it is read: what is written meanwhile is read again.
    seen = signature(path) if path else None
    return PolicySlot(load_policy(path), path, seen=seen, on_change=on_change, on_refused=on_refused)


def signature(path: str) -> Signature:
    """Differs when any file of the policy does. Of a folder, its files and those in its folders; nothing where there is nothing."""
    root = Path(path).expanduser()
    files: list[tuple[str, int, int, int]] = []
    try:
        if not root.is_dir():
            return str(root.resolve()), (_of(root, ""),)
        for entry in os.scandir(root):
            if entry.is_dir():
                files += [
                    _of(Path(inner.path), f"{entry.name}/{inner.name}") for inner in os.scandir(entry.path) if inner.is_file()
                ]
            else:
                files.append(_of(Path(entry.path), entry.name))
            if len(files) > FILES_MAX:
                break
    except OSError as exc:
        # A file that went away meanwhile, or a folder that can't be read: loading will say it.
        files.append((f"{exc}", 0, 0, 0))
    return str(root.resolve()), tuple(sorted(files))


def _of(path: Path, name: str) -> tuple[str, int, int, int]:
    stat = path.stat()
    return name, stat.st_mtime_ns, stat.st_ino, stat.st_size
