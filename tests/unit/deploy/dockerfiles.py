"""Dockerfiles as this project writes them: read into stages, judged, and their build stages run on this machine without an engine.

What runs is what a RUN line says, in its order, with the stage's variables; the image's folders are folders under the test's root.
Only COPY from the context, WORKDIR, ENV, ARG and RUN are known: an image that needs more needs a real engine to be tested.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

# Folders of the image that a build stage writes to.
MOVED = ("/opt/fraudgate", "/build")
RUN_TIMEOUT_S = 1200
SECRET_WORD = re.compile(r"password|secret|token|api_?key|credential", re.IGNORECASE)

# Commands that each image must be able to run.
COMMANDS = {
    "gateway": ("serve", "reload", "score", "cases", "keys", "policy", "route", "topics"),
    "jobs": ("jobs", "rebuild", "parity", "training-set", "backfill", "maintain", "topics"),
    "export": (
        *("pull", "publish", "models", "promote", "rollback", "demote", "compare", "drift", "train", "retrain", "maintain"),
        *(
            "training-set",
            "backfill",
            "why",
            "replay-decision",
            "audit",
            "erase",
            "backtest",
            "explain",
            "keys",
            "policy",
            "route",
            "topics",
        ),
    ),
}


@dataclass
class Stage:
    """`steps` are (instruction, rest of the line), in their order."""

    image: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]


@dataclass
class Dockerfile:
    arguments: dict[str, str]
    stages: list[Stage]

    @property
    def last(self) -> Stage:
        return self.stages[-1]


def read_dockerfile(text: str) -> Dockerfile:
    found = Dockerfile({}, [])
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        instruction, rest = line.split(" ", 1)
        if instruction == "FROM":
            image, _, name = rest.partition(" AS ")
            found.stages.append(Stage(image, name))
        elif not found.stages:
            assert instruction == "ARG", f"{instruction} before the first FROM"
            name, _, value = rest.partition("=")
            found.arguments[name] = value
        else:
            found.stages[-1].steps.append((instruction, rest))
    return found


def complaints(dockerfile: Dockerfile) -> list[str]:
    """What is wrong with an image that ought to be small, the same tomorrow, and unable to do harm."""
    found = []
    for stage in dockerfile.stages:
        named = re.fullmatch(r"\$\{(\w+)\}", stage.image)
        if named is None or named[1] not in dockerfile.arguments:
            found.append(f"{stage.image} can't be pinned to a digest by an argument")
        elif not re.search(r":[\w.-]+$", dockerfile.arguments[named[1]]) or dockerfile.arguments[named[1]].endswith(":latest"):
            found.append(f"{named[1]} names no version")
        for run in stage.all("RUN"):
            if re.search(r"\bapt(-get)?\b|\bpip3? install\b|\bcurl\b|\bwget\b", run):
                found.append(f"a package that no lock file names: {run}")
            if re.search(r"\buv sync\b", run) and not {"--frozen", "--no-dev"} <= set(run.split()):
                found.append(f"not what the lock file says: {run}")
        found += [f"{name} {rest}" for name, rest in stage.steps if name in ("ARG", "ENV") and SECRET_WORD.search(rest)]
        found += [f"ADD {rest}" for rest in stage.all("ADD")]
        found += [f"COPY {rest} brings everything" for rest in stage.all("COPY") if rest.split()[0] == "."]
    last = dockerfile.last
    users = last.all("USER")
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("runs as root, or as a name that a runtime can't tell from root")
    if not last.all("HEALTHCHECK"):
        found.append("doesn't say whether it can be asked for its health")
    entry = last.all("ENTRYPOINT")
    if not entry or not entry[-1].startswith("["):
        found.append("its process isn't told to end: ENTRYPOINT starts a shell")
    if any(name == "COPY" and not rest.startswith("--from=") for name, rest in last.steps):
        found.append("the last stage has files that the build stage didn't make")
    return found


def build(dockerfile: Dockerfile, context: Path, ignored: list[str], root: Path, tools: Path) -> dict[str, str]:
    """Run the stage `build` under `root`, with the programs in `tools` before all others. Returns the last stage's variables.

    Raises AssertionError with what a step that failed has said.
    """
    [stage] = [s for s in dockerfile.stages if s.name == "build"]
    # What uv has downloaded before is checked against the lock file's hashes all the same.
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(root / "home"), "UV_CACHE_DIR": str(Path.home() / ".cache/uv")}
    env |= {name: value for name, value in os.environ.items() if name in ("SSL_CERT_FILE", "UV_CACHE_DIR", "UV_INDEX_URL")}
    cwd = root
    for instruction, rest in stage.steps:
        if instruction == "WORKDIR":
            cwd = Path(moved(rest, root))
            cwd.mkdir(parents=True, exist_ok=True)
        elif instruction in ("ENV", "ARG"):
            env |= variables(rest, env, root)
        elif instruction == "COPY" and not rest.startswith("--from="):
            _copy(rest, context, cwd, ignored)
        elif instruction == "RUN":
            done = subprocess.run(
                ["sh", "-c", moved(rest, root)], cwd=cwd, env=env, capture_output=True, timeout=RUN_TIMEOUT_S, check=False
            )
            assert done.returncode == 0, f"RUN {rest}\n{(done.stdout + done.stderr).decode(errors='replace')[-4000:]}"
    final: dict[str, str] = {"PATH": os.environ["PATH"]}
    for instruction, rest in dockerfile.last.steps:
        if instruction in ("ENV", "ARG"):
            final |= variables(rest, final, root)
    return final


def variables(rest: str, env: dict[str, str], root: Path) -> dict[str, str]:
    """The variables of an ENV or ARG line."""
    found: dict[str, str] = {}
    for name, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', rest):
        value = moved(quoted or plain, root)
        found[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: (env | found).get(match[1], ""), value)
    return found


def moved(text: str, root: Path) -> str:
    for folder in MOVED:
        text = re.sub(rf"(?<![\w./]){folder}(?![\w-])", f"{root}{folder}", text)
    return text


def _copy(rest: str, context: Path, cwd: Path, ignored: list[str]) -> None:
    *sources, target = rest.split()
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for source in sources:
        path = context / source
        if path.is_dir():
            shutil.copytree(path, cwd / target, ignore=skip, dirs_exist_ok=True)
            for name in ignored:
                if name.startswith(f"{source}/"):
                    shutil.rmtree(cwd / name, ignore_errors=True)
        else:
            shutil.copy2(path, cwd / target)


def words(line: str) -> list[str]:
    """The words of an ENTRYPOINT or CMD."""
    found: list[str] = json.loads(line)
    return found
