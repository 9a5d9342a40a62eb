"""What the documents point to is there: pages, headings, and the commands that somebody will type at night."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import cli
from deploy.pages.settings import page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\bfraudgate ([a-z][a-z-]*)((?: +(?:--?[a-z][a-z-]*))*)")
VARIABLE = re.compile(r"\bFRAUDGATE_[A-Z0-9_]+\b")
# Pages whose commands are tried, option by option.
PAGES_OF_COMMANDS = ("docs/operations.md",)
# Words that follow the program's name in sentences about it.
PROSE = frozenset({"help", "itself", "command"})


def documents() -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, no punctuation, spaces to dashes."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {anchor(heading) for heading in HEADING.findall(FENCE.sub("", text))}


def link_complaints(text: str, at: Path) -> list[str]:
    """Links inside the project that lead nowhere."""
    complaints = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (at.parent / name).resolve() if name else at
        if not path.exists():
            complaints.append(f"{target}: no such file")
        elif heading and path.suffix == ".md" and heading not in anchors(text if path == at else path.read_text()):
            complaints.append(f"{target}: no such heading")
    return complaints


def commands(text: str) -> set[tuple[str, str]]:
    """(command, option) of each mention, and (command, "") of the command itself. `up gateway` is `up`."""
    found = set()
    for line in text.splitlines():
        for name, _ in COMMAND.findall(line):
            if name not in PROSE:
                found.add((name, ""))
        for call in re.findall(r"fraudgate ([a-z][a-z-]*)([^`|#\n]*)", line):
            found |= {(call[0], option) for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", call[1]) if call[0] not in PROSE}
    return found


@pytest.mark.parametrize("path", list(documents()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    assert link_complaints(path.read_text(), path) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# It's *here*, twice\n```\n# not here\n```\n")
    here = tmp_path / "page.md"
    here.touch()
    text = "# A page\n[a](other.md#its-here-twice) [b](#a-page) [c](https://example.org/x#y)\n"
    assert link_complaints(text, here) == []
    bad = "# A page\n[a](none.md) [b](other.md#not-here) [c](#none)\n"
    assert link_complaints(bad, here) == [
        "none.md: no such file",
        "other.md#not-here: no such heading",
        "#none: no such heading",
    ]


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `fraudgate NAME --help` prints; of a command with subcommands theirs too isn't."""
    command = next(c for group in cli.GROUPS.values() for c in group if c.name == name)
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(command.module), command.function)(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("page_path", PAGES_OF_COMMANDS)
def test_every_command_and_option_that_operations_names_is_there(page_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {c.name for group in cli.GROUPS.values() for c in group}
    mentioned = commands((ROOT / page_path).read_text())
    assert len(mentioned) > 30
    assert {name for name, _ in mentioned} - known == set()
    missing = []
    for name in sorted({name for name, option in mentioned if option}):
        text = help_of(name, capsys)
        missing += [f"{name} {option}" for other, option in sorted(mentioned) if other == name and option and option not in text]
    # `keys create` and its like have options of their own, which --help of the command doesn't show.
    assert [m for m in missing if not m.startswith("keys ")] == []


def test_a_command_and_its_options_are_found_in_a_line() -> None:
    assert commands("`fraudgate up --all` and fraudgate keys create X --scope score # --not-this") == {
        ("up", ""),
        ("up", "--all"),
        ("keys", ""),
        ("keys", "--scope"),
    }


@pytest.mark.parametrize("path", list(documents()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_a_document_names_is_one(path: Path) -> None:
    known = set(VARIABLE.findall(page()))
    assert {name for name in VARIABLE.findall(path.read_text()) if name not in known and not name.endswith("_")} == set()
