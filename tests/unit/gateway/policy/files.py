"""A policy of a test's own in files, and what is done to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from gateway.policy.folder import SHIPPED


def write_policy(folder: Path) -> Path:
    """The policy that ships, in a place where it can be changed: the value of the setting `policy_path`."""
    return Path(shutil.copytree(SHIPPED, folder / "policy"))


def change_policy(path: Path, name: str | None) -> Callable[[], None]:
    """Gives the policy another name; None: makes it one that can't be used. What is returned makes it what it was."""
    file = path / "policy.yaml"
    before = file.read_text()
    parsed = yaml.safe_load(before)
    replace_file(file, yaml.safe_dump(parsed | {"name": name}, sort_keys=False) if name is not None else "bands: [\n")
    return lambda: replace_file(file, before)


def replace_file(path: Path, text: str) -> None:
    """In one step, as an editor or a deployment does."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
