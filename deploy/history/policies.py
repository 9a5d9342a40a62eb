"""The policy and the lists of a receipt: by the digest and the version that it carries.

A policy is the folder of today if that has the digest, or else what a gateway told the table `audit` when it took it into use. Lists are
made again of their changes, all of which are in the table `list_changes`.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow.dataset as ds

from deploy.history.lake import NoTableError, open_table, rows_of
from deploy.history.list_books import ListBooks
from gateway.contracts import tables
from gateway.contracts.audit import POLICY_LOADED
from gateway.contracts.lists import ListBook, ListChange, ListChangeError, change_of_fields
from gateway.contracts.settings import Settings
from gateway.errors import PolicyRefusedError
from gateway.policy import NO_LISTS, Policy, load_policy

_CHANGE_FIELDS = list(ListChange.__struct_fields__)


class NoPolicyError(RuntimeError):
    """A policy or a version of the lists can't be had. The message says what is missing."""


class Policies:
    """By digest, each looked up once. `path` is the policy folder that is in use now."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[str, Policy | NoPolicyError] = {}
        self._now: Policy | None = None

    def by_digest(self, digest: str) -> Policy:
        """Raises `NoPolicyError`."""
        found = self._known.get(digest)
        if found is None:
            try:
                found = self._find(digest)
            except NoPolicyError as exc:
                found = exc
            self._known[digest] = found
        if isinstance(found, NoPolicyError):
            raise found
        return found

    def _find(self, digest: str) -> Policy:
        try:
            if self._now is None:
                self._now = load_policy(self._settings.policy_path)
            if self._now.digest == digest:
                return self._now
        except PolicyRefusedError:
            # Whatever is wrong with today's folder, the decision's policy may be known.
            pass
        files = self._told(digest)
        if files is None:
            raise NoPolicyError(
                f"the policy {digest[:12]}... is neither the one in use nor in the table {tables.AUDIT}, where gateways say what they use"
            )
        try:
            policy = Policy(files, f"the table {tables.AUDIT}")
        except PolicyRefusedError as exc:
            raise NoPolicyError(f"the policy {digest[:12]}... can't be read by this code: {exc}") from exc
        if policy.digest != digest:
            raise NoPolicyError(f"what the table {tables.AUDIT} has under {digest[:12]}... is another policy")
        return policy

    def _told(self, digest: str) -> dict[str, bytes] | None:
        try:
            table = open_table(self._settings, tables.AUDIT)
        except NoTableError:
            return None
        chosen = (ds.field("action") == POLICY_LOADED) & (ds.field("subject") == digest)
        for entry in rows_of(table, ["detail"], chosen):
            files = _files_of(entry["detail"])
            if files is not None:
                return files
        return None


def _change(row: dict[str, Any]) -> tuple[int, ListChange] | None:
    """None for a change that the gateways refused too."""
    try:
        return row.pop("offset"), change_of_fields(row)
    except ListChangeError:
        return None


def _files_of(detail: str) -> dict[str, bytes] | None:
    """The files of a policy as `policy_loaded` tells them: name to text."""
    try:
        told: Any = json.loads(detail)
    except ValueError:
        return None
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        return None
    return {name: text.encode() for name, text in told.items()}


class Books:
    """The lists by version, of all changes that the feature jobs have written."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._newest = 0
        self._books: ListBooks | None = None

    def as_of(self, version: int) -> ListBook:
        """The book that a receipt with that `lists_version` was decided by. Raises `NoPolicyError` where changes are missing."""
        if version <= 0:
            return NO_LISTS
        if self._books is None:
            self._books = self._read(version)
        if self._newest < version:
            raise NoPolicyError(
                f"the table {tables.LIST_CHANGES} has the lists up to version {self._newest}, the receipt is of {version}"
            )
        return self._books.at(version)

    def _read(self, version: int) -> ListBooks:
        try:
            table = open_table(self._settings, tables.LIST_CHANGES)
        except NoTableError as exc:
            raise NoPolicyError(f"the lists of version {version} can't be made again: {exc}") from exc
        rows = sorted(rows_of(table, [*_CHANGE_FIELDS, "offset"]), key=lambda row: row["offset"])
        self._newest = rows[-1]["offset"] + 1 if rows else 0
        return ListBooks([found for row in rows if (found := _change(row)) is not None])
