"""`python -m deploy.monitoring.dashboards`: writes the dashboards' JSON and the tables of docs/dashboards.md, or checks them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from deploy.monitoring.dashboards import gateway, jobs, kafka, models, overview, policy, redis
from deploy.monitoring.dashboards.build import text_of
from deploy.monitoring.dashboards.checks import complaints_of
from deploy.monitoring.dashboards.spec import Board

BOARDS: tuple[Board, ...] = tuple(m.BOARD for m in (overview, gateway, kafka, redis, jobs, models, policy))
FOLDER = Path(__file__).parent / "json"
PAGE_PATH = Path(__file__).resolve().parents[3] / "docs" / "dashboards.md"
TABLE_BEGIN, TABLE_END = "<!-- written by python -m deploy.monitoring.dashboards -->", "<!-- to here -->"


def files() -> dict[Path, str]:
    """What is to be on the disk, by path."""
    return {FOLDER / f"{board.uid}.json": text_of(board) for board in BOARDS}


def page(text: str) -> str:
    """The page with its table as of now."""
    head, _, rest = text.partition(TABLE_BEGIN)
    _, _, tail = rest.partition(TABLE_END)
    lines = []
    for board in BOARDS:
        lines += [f"### {board.title.removeprefix('Fraudgate: ').capitalize()}", "", board.description, ""]
        lines += ["| panel | shows |", "| --- | --- |"]
        lines += [f"| {panel.title} | {panel.description.replace('|', '/')} |" for panel in board.panels]
        lines.append("")
    return f"{head}{TABLE_BEGIN}\n\n" + "\n".join(lines) + f"\n{TABLE_END}{tail}"


def stale() -> list[str]:
    """Files that aren't what the code makes now, or that no code makes."""
    wanted = files()
    found = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    found += [p for p in FOLDER.glob("*.json") if p not in wanted]
    text = PAGE_PATH.read_text()
    return [p.name for p in (*found, *([PAGE_PATH] if page(text) != text else []))]


def dashboards(argv: Sequence[str]) -> int:
    """Write, or check. The status of a check is 1 when something is stale or wrong."""
    parser = argparse.ArgumentParser(prog="python -m deploy.monitoring.dashboards", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the JSON and the table of docs/dashboards.md")
    what.add_argument("--check", action="store_true", help="say what is stale or wrong")
    args = parser.parse_args(argv)
    wanted = files()
    wrong = [f"{path.name}: {c}" for path, text in wanted.items() for c in complaints_of(json.loads(text))]
    if args.write:
        FOLDER.mkdir(exist_ok=True)
        for path in FOLDER.glob("*.json"):
            if path not in wanted:
                path.unlink()
        for path, text in wanted.items():
            path.write_text(text)
        PAGE_PATH.write_text(page(PAGE_PATH.read_text()))
        print(f"{len(wanted)} dashboards written to {FOLDER}")
    else:
        wrong += [f"{name} is not what the code makes: make docs" for name in stale()]
    for line in wrong:
        print(line)
    return 1 if wrong else 0
