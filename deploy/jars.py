"""The second half of `make setup`, in the project's own Python: finds Java and Redis, and fetches the JVM programs.

Kafka, the schema registry and Spark's connectors come from Maven Central through the Ivy that pyspark carries (300 MB). What is to
be had stands in deploy/ivy.xml, what that came to in deploy/jars.lock: path, size and SHA-256 of each file. Files are checked and
then moved to their place as a whole, so an interrupted download leaves nothing half done, and the next one goes on from there.

    python -m deploy.jars          fetch what is missing
    python -m deploy.jars spark spark-s3a    only these, for an image; spark-s3a is for tables on S3, and fetched only when asked for
    python -m deploy.jars lock     resolve deploy/ivy.xml anew and write deploy/jars.lock
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

import tqdm

from deploy.toolchain import ToolMissingError, find_redis, java_home, java_major, redis_version, system_java_home, wheel_folder
from deploy.truststore import java_options
from gateway.contracts.settings import SettingError, Settings, load_settings

HERE = Path(__file__).parent
LOCK_PATH = HERE / "jars.lock"
FETCH_TIMEOUT_S = 1800
POLL_S = 0.2
TELL_EVERY_S = 10.0
# Ivy's word for every configuration.
ALL = "*"
CONFIGURATIONS = ("kafka", "registry", "spark", "spark-s3a")
# What the local stack runs on.
USUAL = ("kafka", "registry", "spark")


class JarsError(RuntimeError):
    """The JVM programs can't be had. The message says why and what to do."""


@dataclass(frozen=True)
class LockedFile:
    """One line of the lock. `path` is relative to the folder of jars: CONFIGURATION/FILE."""

    path: str
    size_bytes: int
    sha256: str

    @property
    def configuration(self) -> str:
        return self.path.split("/")[0]


def read_lock(path: Path = LOCK_PATH) -> list[LockedFile]:
    files = []
    for line in path.read_text().splitlines():
        sha256, size, name = line.split()
        files.append(LockedFile(name, int(size), sha256))
    return files


def missing(jars: Path, locked: list[LockedFile]) -> list[LockedFile]:
    """Those files of the lock that aren't there in their full size. Hashes were checked before the files came to their place."""
    found = []
    for file in locked:
        path = jars / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            found.append(file)
    return found


def differing(jars: Path, locked: list[LockedFile]) -> list[LockedFile]:
    """Those files of the lock that aren't there with their very content."""
    absent = missing(jars, locked)
    return absent + [f for f in locked if f not in absent and _sha256(jars / f.path) != f.sha256]


def of(configurations: Iterable[str]) -> list[LockedFile]:
    """The lock's files of these configurations."""
    wanted = set(configurations)
    return [file for file in read_lock() if file.configuration in wanted]


def fetch(settings: Settings, configurations: Iterable[str] = USUAL) -> float:
    """Make `settings.jars_path` hold what the lock names of `configurations`. Returns the seconds it took. Raises `JarsError`.

    A configuration of which something is missing is fetched as a whole; the others stay untouched, for programs may run from them.
    """
    begin = time.monotonic()
    jars = settings.jars_path
    wanted = of(configurations)
    if not missing(jars, wanted):
        return 0.0
    with _locked(settings):
        # Another set-up may have fetched them while this one waited.
        absent = sorted({file.configuration for file in missing(jars, wanted)})
        if not absent:
            return time.monotonic() - begin
        locked = of(absent)
        fresh = settings.cache_path / "jars.partial"
        _retrieve(settings, fresh, sum(f.size_bytes for f in locked), absent)
        wrong = differing(fresh, locked)
        if wrong:
            names = ", ".join(f.path for f in wrong[:5])
            raise JarsError(
                f"{len(wrong)} of {len(locked)} files are not what deploy/jars.lock says ({names}); nothing was installed"
            )
        for name in absent:
            _replace(jars / name, fresh / name)
        shutil.rmtree(fresh)
        shutil.rmtree(settings.cache_path / "ivy")
    return time.monotonic() - begin


def lock(settings: Settings) -> list[LockedFile]:
    """Resolve deploy/ivy.xml and return what it comes to, leaving the installed files alone."""
    with _locked(settings):
        fresh = settings.cache_path / "jars.partial"
        _retrieve(settings, fresh, 0)
        paths = sorted((path for path in fresh.rglob("*") if path.is_file()), key=str)
        files = [LockedFile(str(p.relative_to(fresh)), p.stat().st_size, _sha256(p)) for p in paths]
        shutil.rmtree(fresh)
    return files


def _retrieve(settings: Settings, into: Path, expected_bytes: int, configurations: Iterable[str] = (ALL,)) -> None:
    """Run Ivy: download into its cache, copy to `into`/CONFIGURATION/FILE. Shows how much has come."""
    pyspark_jars = wheel_folder("pyspark", "jars")
    ivy = next(iter(sorted(pyspark_jars.glob("ivy-*.jar"))), None) if pyspark_jars is not None else None
    if ivy is None:
        raise JarsError("pyspark, which carries Ivy, is not installed: run make setup")
    shutil.rmtree(into, ignore_errors=True)
    cache, log_path = settings.cache_path / "ivy", settings.cache_path / "ivy.log"
    home = java_home(settings.cache_path)
    trust = [] if home == system_java_home() else java_options(settings.cache_path / "authorities.jks")
    argv = [str(home / "bin/java"), *trust, "-jar", str(ivy)]
    chosen = settings.cache_path / "ivysettings.xml"
    chosen.write_text(ivy_settings(settings.maven_url))
    argv += ["-settings", str(chosen), "-ivy", str(HERE / "ivy.xml"), "-cache", str(cache)]
    argv += ["-confs", *configurations, "-retrieve", f"{into}/[conf]/[artifact]-[revision](-[classifier]).[ext]"]
    with log_path.open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT) as ivy_run:
        try:
            _watch(ivy_run, cache, expected_bytes)
        finally:
            # Also on Ctrl-C; what has come is kept in Ivy's cache.
            ivy_run.kill()
    if ivy_run.returncode != 0:
        report = log_path.read_text(errors="replace").splitlines()
        # Of a module that can't be had, Ivy says "not found" whatever the cause.
        problems = [line.strip(" \t:") for line in report if ": not found" in line or "FAILED" in line or "ERROR" in line]
        raise JarsError(
            f"Ivy could not fetch the JVM programs from {_source(settings.maven_url)}\n  "
            + "\n  ".join(problems[:10] or report[-10:])
            + f"\nall of it: {log_path}"
        )


def ivy_settings(mirror_url: str) -> str:
    """One resolver: Ivy's own Maven Central, or a mirror of it. A developer's ~/.m2 and ~/.ivy2 may hold half of what is asked for,
    and Ivy would stop at it."""
    root = f" root={quoteattr(mirror_url.rstrip('/') + '/')}" if mirror_url else ""
    return (
        '<ivysettings><settings defaultResolver="central"/><resolvers>'
        f'<ibiblio name="central" m2compatible="true"{root}/></resolvers></ivysettings>\n'
    )


def _source(mirror_url: str) -> str:
    """Where the jars come from, for a message about their failing to."""
    if not mirror_url:
        return "Maven Central: check the network, or set FRAUDGATE_MAVEN_URL to a mirror"
    return f"{mirror_url}; {_reachable(mirror_url)}"


def _reachable(url: str) -> str:
    """What Python finds when it asks for `url`: tells a network that is down from a mirror that lacks something."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310
            return f"the address answers (status {reply.status})"
    except (OSError, ValueError) as exc:
        return f"it can't be reached ({exc}): check the network and FRAUDGATE_MAVEN_URL"


def _watch(ivy_run: subprocess.Popen[bytes], cache: Path, expected_bytes: int) -> None:
    """Show how far Ivy is until it ends: a bar on a terminal, else a line now and then. Ivy reads all descriptions first."""
    begin = told = time.monotonic()
    with tqdm.tqdm(total=expected_bytes or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        while ivy_run.poll() is None and time.monotonic() - begin < FETCH_TIMEOUT_S:
            done = _downloaded_bytes(cache)
            stage = "jars" if done else f"reading descriptions, {sum(1 for _ in cache.glob('*/*/ivy-*.xml'))} so far"
            bar.set_description(f"  {stage}", refresh=False)
            bar.update(min(done, bar.total or sys.maxsize) - bar.n)
            if bar.disable and time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                print(f"  {stage}: {done / 1e6:.0f} of {expected_bytes / 1e6:.0f} MB after {told - begin:.0f} s", flush=True)
            time.sleep(POLL_S)
        bar.update(max(0, expected_bytes - bar.n))


def _downloaded_bytes(cache: Path) -> int:
    """Size of the jars and archives in Ivy's cache so far. Files vanish while it looks, as Ivy renames them."""
    total = 0
    for kind in ("*/*/jars/*", "*/*/bundles/*", "*/*/tar.gzs/*"):
        for path in cache.glob(kind):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def _replace(jars: Path, fresh: Path) -> None:
    """Move `fresh` to `jars`. Stopped between the two renames, it leaves no jars, and the next set-up fetches them."""
    jars.parent.mkdir(parents=True, exist_ok=True)
    old = jars.with_name(f"{jars.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if jars.exists():
        jars.rename(old)
    fresh.rename(jars)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """One set-up at a time downloads into a cache that checkouts share; the others wait."""
    settings.cache_path.mkdir(parents=True, exist_ok=True)
    with (settings.cache_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _setup(settings: Settings) -> None:
    home = java_home(settings.cache_path)
    print(f"java        {java_major(home / 'bin/java')} at {home}")
    redis = find_redis()
    print(f"redis       {'.'.join(map(str, redis_version(redis)))} at {redis}")
    if missing(settings.jars_path, of(USUAL)):
        print(f"jars        Kafka, schema registry and Spark's connectors to {settings.jars_path}", flush=True)
    seconds = fetch(settings)
    print(f"jars        {f'fetched in {seconds:.0f} s' if seconds else 'all there'}, {settings.jars_path}")


def main() -> int:
    try:
        settings = load_settings()
        if sys.argv[1:] == ["lock"]:
            text = "".join(f"{f.sha256} {f.size_bytes} {f.path}\n" for f in lock(settings))
            LOCK_PATH.write_text(text)
            print(f"{LOCK_PATH} names {len(text.splitlines())} files")
        elif sys.argv[1:] and set(sys.argv[1:]) <= set(CONFIGURATIONS):
            seconds = fetch(settings, sys.argv[1:])
            print(f"jars        {f'fetched in {seconds:.0f} s' if seconds else 'all there'}, {settings.jars_path}")
        else:
            _setup(settings)
    except (JarsError, ToolMissingError, SettingError) as exc:
        print(f"setup: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: stopped; run it again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
