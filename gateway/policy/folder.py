"""A policy's folder: policy.yaml and rules/*.yaml, as bytes. Read by whoever loads a policy, and by `fraudgate policy`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gateway.errors import PolicyRefusedError
from gateway.policy.document import FILES_MAX, POLICY_BYTES_MAX, POLICY_FILE, RULES_FOLDER

SHIPPED = Path(__file__).resolve().parent.parent / "default_policy"
HOW_TO_WRITE = (
    "a policy is a folder now: policy.yaml has `version: 2`, a name, the bands, lists and alerts; each rule stands in a file under rules/,"
    " with an id, a state (live, shadow or off), an owner, a text (once its description), an outcome, a reason and an expression in the"
    ' place of its conditions: `when: card_count_5m >= 10 and channel in ["ecom", "moto"]`. docs/policy.md shows one whole'
)


def read_folder(path: Path) -> dict[str, bytes]:
    """The files of the policy in `path` by their names within it, with forward slashes. Raises `PolicyRefusedError`."""
    found: dict[str, bytes] = {}
    total = 0
    try:
        if path.is_file():
            raise PolicyRefusedError(f"{path}: {HOW_TO_WRITE}")
        rules = path / RULES_FOLDER
        held = [entry for entry in rules.iterdir() if not entry.name.startswith(".")] if rules.is_dir() else []
        for entry in sorted([path / POLICY_FILE, *held]):
            name = entry.relative_to(path).as_posix()
            if entry.suffix != ".yaml":
                if entry.suffix in (".yml", ".json"):
                    raise PolicyRefusedError(f"{path}/{name}: rules are read from files that end in .yaml")
                continue
            if len(found) >= FILES_MAX:
                raise PolicyRefusedError(f"{path}: more than {FILES_MAX} files")
            with entry.open("rb") as file:
                found[name] = file.read(POLICY_BYTES_MAX - total + 1)
            total += len(found[name])
            if total > POLICY_BYTES_MAX:
                raise PolicyRefusedError(f"{path}: more than {POLICY_BYTES_MAX} bytes")
    except OSError as exc:
        raise PolicyRefusedError(f"{exc.filename or path}: {exc.strerror}") from exc
    return found


def digest_of(files: Mapping[str, bytes]) -> str:
    """sha256 over the files in the order of their names: each name's and each content's length (8 bytes, big-endian) and bytes."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        for part in (name.encode(), data):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
