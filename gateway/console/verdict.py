"""The console's one sentence: is it well, and if not, what is wrong and since when. Pure but for remembering when a trouble began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """WELL: nothing to say. WATCH: decisions are made as they should be, something beside them isn't as promised. DEGRADED: decisions are
    made with less than they should, or late. DOWN: no decisions.
    """

    WELL = 0
    WATCH = 1
    DEGRADED = 2
    DOWN = 3


@dataclass(frozen=True)
class Trouble:
    """`code` tells it from others, `text` is half a sentence, `part` the node of the picture that it is at."""

    level: Level
    code: str
    part: str
    text: str


def seconds(s: float) -> str:
    """12 s, 4 min, 3 h, 2 d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if s >= 2 * size:
            return f"{int(s // size)} {unit}"
    return f"{int(s)} s"


def number(n: float) -> str:
    return f"{n:,.0f}" if n >= 10 else f"{n:.1f}".removesuffix(".0")


class Verdicts:
    """Remembers since when each trouble has been there."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def told(self, troubles: Sequence[Trouble], now_s: float, well: str) -> dict[str, object]:
        """`level`, `text` (the sentence), and `troubles`: each with part, level, text and its age, the gravest first.

        `well` is what is said when there are none.
        """
        self._since_s = {t.code: self._since_s.get(t.code, now_s) for t in troubles}
        gravest = sorted(troubles, key=lambda t: (-t.level, self._since_s[t.code]))
        shown = [
            {
                "part": t.part,
                "code": t.code,
                "level": t.level.name.lower(),
                "text": t.text,
                "for_s": round(now_s - self._since_s[t.code], 1),
            }
            for t in gravest
        ]
        if not gravest:
            return {"level": Level.WELL.name.lower(), "text": f"Well: {well}", "troubles": []}
        first = gravest[0]
        age_s = now_s - self._since_s[first.code]
        since = f" for {seconds(age_s)}" if age_s >= 2 else ""
        more = len(gravest) - 1
        also = f"; {more} more below" if more else ""
        return {
            "level": first.level.name.lower(),
            "text": f"{first.level.name.capitalize()}: {first.text}{since}{also}",
            "troubles": shown,
        }
