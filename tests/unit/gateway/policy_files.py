"""A policy of a test's own in files, and what is done to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import yaml


def write_policy(folder: Path) -> Path:
    """The policy that ships, in a place where it can be changed: the value of the setting `policy_path`."""
    path = folder / "policy.yaml"
    path.write_bytes(files("gateway").joinpath("default_policy.yaml").read_bytes())
    return path


def change_policy(path: Path, name: str | None) -> Callable[[], None]:
    """Gives the policy another name; None: makes it one that can't be used. What is returned makes it what it was."""
    before = path.read_bytes()
    parsed = yaml.safe_load(before)
    _replace(path, yaml.safe_dump(parsed | {"name": name}) if name is not None else "bands: [\n")
    return lambda: _replace(path, before.decode())


def _replace(path: Path, text: str) -> None:
    """In one step, as an editor or a deployment does."""
    part = path.with_name(".part")
    part.write_text(text)
    os.replace(part, path)
