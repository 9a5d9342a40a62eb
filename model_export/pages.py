"""Reports as one HTML file: tables and inline SVG, nothing that a browser would have to fetch. Used by `fraudgate compare` and `drift`."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } .alarm { color: #a40000; font-weight: 600 } figure { margin: 1rem 0 }
figcaption { color: #555 } svg { max-width: 100%; height: auto }
"""


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element with `label` for those who can't see it. The same figure gives the same text."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "fraudgate", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # Descriptions of the drawing program, which name addresses.
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)


def figure(drawing: Figure, caption: str) -> str:
    return f"<figure>{svg(drawing, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], alarmed: Sequence[bool] = ()) -> str:
    """`alarmed` marks rows that are to stand out."""
    marks = [' class="alarm"' if i < len(alarmed) and alarmed[i] else "" for i in range(len(rows))]
    heads = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
    body = "".join(
        f"<tr{m}>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row, m in zip(rows, marks, strict=True)
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def write(path: Path, text: str) -> None:
    """Replaced by one rename. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
