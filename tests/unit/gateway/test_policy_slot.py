"""Which policy decides while its files change: the last good one, whole, exchanged between two batches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.contracts.lists import ListBook
from gateway.errors import PolicyRefusedError
from gateway.lists import UNKNOWN
from gateway.policy import Policy
from gateway.policy_slot import PolicySlot, open_policy, signature
from tests.unit.gateway.policy_files import change_policy, write_policy

pytestmark = pytest.mark.anyio


class Watched:
    """A slot on a policy of its own, and what it told."""

    def __init__(self, folder: Path) -> None:
        self.path = write_policy(folder)
        self.changes: list[tuple[str, str]] = []
        self.refusals: list[str] = []
        self.slot = open_policy(
            str(self.path),
            on_change=lambda policy, before: self.changes.append((before.digest, policy.digest)),
            on_refused=self.refusals.append,
        )

    async def look(self) -> None:
        """As often as a change needs to be found, and to be seen to be at rest."""
        for _ in range(2):
            await self.slot.refresh()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


async def test_a_changed_policy_decides_from_the_next_batch_on(watched: Watched) -> None:
    slot, first = watched.slot, watched.slot.live
    await watched.look()
    assert slot.live is first
    change_policy(watched.path, "two")
    await watched.look()
    assert slot.policy.name == "two"
    assert watched.changes == [(first.policy.digest, slot.policy.digest)]
    # What a batch has read stays what it was.
    assert first.policy.name != "two"


async def test_a_policy_that_can_not_be_used_is_refused_once_and_the_old_one_stays(watched: Watched) -> None:
    slot, first = watched.slot, watched.slot.live
    good = change_policy(watched.path, None)
    await watched.look()
    await watched.look()
    assert slot.live is first
    assert len(watched.refusals) == 1
    assert slot.refused == watched.refusals[0]
    assert str(watched.path) in slot.refused
    assert watched.changes == []
    # The same again is no news, and nothing is wrong any more.
    good()
    await watched.look()
    assert slot.refused is None
    assert slot.live is first


async def test_files_that_are_still_being_written_are_left_alone(watched: Watched) -> None:
    slot, first = watched.slot, watched.slot.live
    for text in ("a", "b", "c"):
        change_policy(watched.path, text)
        await slot.refresh()
        assert slot.live is first
    await slot.refresh()
    assert slot.policy.name == "c"


async def test_a_policy_whose_files_change_while_they_are_read_is_read_again(tmp_path: Path) -> None:
    path = write_policy(tmp_path)
    loads = 0

    def load(source: str) -> Policy:
        nonlocal loads
        loads += 1
        if loads == 1:
            change_policy(path, "three")
        return open_policy(source, on_change=lambda *_: None, on_refused=lambda _: None).policy

    slot = PolicySlot(load(""), str(path), seen=None, load=load)
    loads, first = 0, slot.live
    change_policy(path, "two")
    await slot.refresh()
    await slot.refresh()
    assert (loads, slot.live) == (1, first)
    await slot.refresh()
    await slot.refresh()
    assert slot.policy.name == "three"


async def test_the_lists_change_without_the_policy(watched: Watched) -> None:
    slot = watched.slot
    policy, book = slot.policy, ListBook()
    assert slot.live.lists is UNKNOWN
    slot.use_lists(book)
    assert (slot.live.policy, slot.live.lists) == (policy, book)
    change_policy(watched.path, "two")
    await watched.look()
    assert slot.live.lists is book


async def test_the_policy_that_ships_is_not_watched() -> None:
    slot = open_policy("", on_change=lambda *_: None, on_refused=lambda _: None)
    first = slot.live
    await slot.refresh()
    assert slot.live is first


def test_a_gateway_does_not_start_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusedError):
        open_policy(str(tmp_path / "none"), on_change=lambda *_: None, on_refused=lambda _: None)


def test_a_folder_differs_when_a_file_in_it_does_or_it_is_another(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "rules").mkdir(parents=True)
        (folder / "policy.yaml").write_text("a")
        (folder / "rules" / "r.yaml").write_text("b")
    link = tmp_path / "link"
    link.symlink_to(one)
    seen = [signature(str(link))]
    (one / "rules" / "r.yaml").write_text("bb")
    seen.append(signature(str(link)))
    (one / "rules" / "s.yaml").write_text("c")
    seen.append(signature(str(link)))
    os.replace(one / "rules" / "s.yaml", one / "policy.yaml")
    seen.append(signature(str(link)))
    link.unlink()
    link.symlink_to(two)
    seen.append(signature(str(link)))
    link.unlink()
    seen.append(signature(str(link)))
    assert len(set(seen)) == len(seen)
