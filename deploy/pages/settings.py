"""Writes docs/settings.md and the ranges in the chart's schema from the settings themselves: python -m deploy.pages.settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from deploy.pages import chart_schema
from gateway.contracts.settings import ENV_PREFIX, Settings

PAGE_PATH = Path(__file__).resolve().parents[2] / "docs/settings.md"
HEADER = """\
# Settings

Every setting is an environment variable, read once when a command starts. A variable that names no setting, or a value outside its
range, is refused with exit status 2. An empty default is derived, as its description says.

This page is generated (`make docs`) from `gateway/contracts/settings.py`.

| variable | default | range | what it is |
| --- | --- | --- | --- |
"""


def page() -> str:
    rows = []
    for f in fields(Settings):
        allowed = f"{f.metadata['least']:,} to {f.metadata['most']:,}" if isinstance(f.default, int) else f.metadata["kind"].words
        default = f"`{f.default}`" if f.default != "" else "empty"
        rows.append(f"| `{ENV_PREFIX}{f.name.upper()}` | {default} | {allowed} | {f.metadata['doc'].replace('|', '/')} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    PAGE_PATH.write_text(page())
    print(f"{PAGE_PATH} written")
    chart_schema.write()
