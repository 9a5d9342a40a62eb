"""The policy that benchmarks decide by: the one that ships with the gateway, for cards that pay a hundred times as often as people do.

A benchmark's hundred thousand cards make thousands of payments a second, so that the rules about velocity would decline nearly all of
them: each answer would carry reasons and each payment raise an alert, as hardly one does in use. Their limits are raised as much; the
rules, their number and all else stay.
"""

from __future__ import annotations

import re
from pathlib import Path

from gateway.policy.folder import SHIPPED, read_folder

RAISED = 100
VELOCITY = re.compile(r"(\w+_(?:count|distinct)_\w+ >=? )([0-9]+)")


def write_policy(folder: Path) -> None:
    for name, data in read_folder(SHIPPED).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(VELOCITY.sub(lambda limit: f"{limit[1]}{int(limit[2]) * RAISED}", data.decode()))
