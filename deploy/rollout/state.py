"""Which version of the gateway runs in which of the two places behind the local proxy: <home>/rollout/state.json.

Read by `deploy.services` for what to start in a place, written by `fraudgate deploy` alone. A version is a checkout, a Python and settings
that differ from the others': nothing is copied, so a version that one may want to go back to needs a directory of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from gateway.contracts.settings import ENV_PREFIX, Settings, settings_env

BLUE, GREEN = "blue", "green"
SLOTS = (BLUE, GREEN)
# What a place runs as among the services of the stack.
SERVICE_OF = {BLUE: "gateway", GREEN: "gateway-green"}
ROOT = Path(__file__).resolve().parent.parent.parent
STATE_FILE = "rollout/state.json"
# These belong to the machine and not to a version: both versions share them, or each place has its own.
FIXED_SETTINGS = frozenset(
    ENV_PREFIX + name
    for name in (
        "HOME",
        "HOST",
        "GATEWAY_PORT",
        "GATEWAY_GREEN_PORT",
        "PROXY_PORT",
        "GATEWAY_URL",
        "INSTANCE_ID",
        "CONSUMER_GROUP",
        "SPOOL_DIR",
    )
)
GIT_TIMEOUT_S = 10.0


class RolloutError(RuntimeError):
    """A deploy can't begin, or didn't come to its end. The message says why, and what serves now."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """`directory` is a checkout, `python` what runs it, `settings` its FRAUDGATE_* variables beside those of the machine, of which `given`
    names those that this version was given by whoever deployed it.

    `commit` is the checkout's when the version was deployed, with + behind it where files had been changed, empty where git doesn't know.
    """

    directory: str
    python: str
    settings: dict[str, str] = {}
    given: tuple[str, ...] = ()
    commit: str = ""

    def told(self) -> str:
        """For people and the audit file. A URL may hold a password and is not shown."""
        shown = [f"{name}={'...' if name.endswith('_URL') else self.settings[name]}" for name in sorted(self.given)]
        return " ".join([self.commit or "unknown commit", self.directory, *shown])


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`active` is the place that has the traffic; `versions` are what runs there and what ran in the other place before.

    `trial` is what a deploy is bringing to the other place: None when none is under way, nor broke off.
    """

    active: str
    versions: dict[str, Version]
    trial: Version | None = None

    @property
    def other(self) -> str:
        return GREEN if self.active == BLUE else BLUE

    def version_of(self, slot: str) -> Version | None:
        return self.trial if self.trial is not None and slot == self.other else self.versions.get(slot)


def port_of(settings: Settings, slot: str) -> int:
    return settings.gateway_port if slot == BLUE else settings.gateway_green_port


def read_state(home: Path) -> State | None:
    """None where `fraudgate deploy` was never used. Raises `RolloutError` for a file that can't be read."""
    path = home / STATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as exc:
        raise RolloutError(f"{path} can't be read: {exc}") from exc


def write_state(home: Path, state: State) -> None:
    """Replaced as a whole; readable by its owner alone, for what settings hold."""
    path = home / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=2))
    partial.replace(path)


def own_version(settings: Settings) -> Version:
    """This checkout with these settings: what `fraudgate up` runs."""
    return Version(directory=str(ROOT), python=sys.executable, commit=commit_of(ROOT), settings=changed_settings(settings))


def changed_settings(settings: Settings) -> dict[str, str]:
    """The variables that differ from the defaults: what another version is told, which may not know all of ours."""
    usual = settings_env(Settings())
    return {
        name: value for name, value in settings_env(settings).items() if value != usual[name] and name != ENV_PREFIX + "GATEWAY_URL"
    }


def slot_command(settings: Settings, slot: str, state: State | None) -> tuple[list[str], dict[str, str]]:
    """What runs in `slot`: arguments and FRAUDGATE_* variables. Only the place that has the traffic consumes from its start."""
    version = None if state is None else state.version_of(slot)
    standby = [] if state is None or state.active == slot else ["--standby"]
    if version is None:
        return [sys.executable, "-m", "deploy.cli", "serve", *standby], settings_env(settings)
    env = version.settings | {
        ENV_PREFIX + "HOME": str(settings.home_path),
        ENV_PREFIX + "HOST": settings.host,
        ENV_PREFIX + "GATEWAY_PORT": str(port_of(settings, slot)),
        ENV_PREFIX + "INSTANCE_ID": settings.instance_id,
        ENV_PREFIX + "CONSUMER_GROUP": settings.consumer_group,
        # The checkout's own packages before what is installed.
        "PYTHONPATH": version.directory,
    }
    # -P: what lies where the caller stands is not this version.
    return [version.python, "-P", "-m", "deploy.cli", "serve", *standby], env


def commit_of(directory: Path) -> str:
    """The checkout's commit, shortened, with + behind it for changed files; empty where git can't tell."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
