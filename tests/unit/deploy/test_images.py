"""The Dockerfiles: what they may not do, and what stands in each image when its build stage is run here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bootstrap import find_uv
from deploy.cli import GROUPS
from deploy.ports import free_ports
from deploy.services import http_ok
from gateway.supervisor import LEAVE_TIMEOUT_S
from tests.helpers import HOST, wait_until
from tests.s3 import s3_server
from tests.unit.deploy.dockerfiles import COMMANDS, Dockerfile, build, complaints, read_dockerfile, words

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "deploy/images"
NAMES = ("gateway", "jobs", "export")
BUCKET = "payments"
HEAVY = ("pyspark", "mlflow", "xgboost", "pandas", "pyarrow", "delta", "deltalake", "sklearn", "pytest", "mypy", "tqdm")
# What an image must not carry.
ABSENT = {
    "gateway": HEAVY,
    "jobs": ("mlflow", "xgboost", "sklearn", "onnxruntime", "fastapi", "matplotlib", "pytest", "mypy", "tqdm"),
    "export": ("pyspark", "delta", "pytest", "mypy", "locust"),
}


def image(name: str) -> Dockerfile:
    return read_dockerfile((IMAGES / f"{name}.Dockerfile").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_small_pinned_and_not_root(name: str) -> None:
    assert complaints(image(name)) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("USER 10001:10001", "USER fraudgate", "runs as root"),
        ("USER 10001:10001\n", "", "runs as root"),
        ("FROM ${PYTHON_IMAGE} AS build", "FROM python:3.11 AS build", "can't be pinned"),
        ("python:3.11-slim-bookworm", "python", "names no version"),
        ("--frozen --no-dev --no-editable", "--no-editable", "not what the lock file says"),
        ("WORKDIR /build\n", "WORKDIR /build\nRUN apt-get install -y curl\n", "that no lock file names"),
        ("ENV PATH=", "ENV REDIS_PASSWORD=x PATH=", "REDIS_PASSWORD"),
        ("COPY deploy ./deploy", "COPY . .", "brings everything"),
        ('ENTRYPOINT ["fraudgate"]', "ENTRYPOINT fraudgate", "starts a shell"),
        ("HEALTHCHECK --interval=10s", "LABEL x", "its health"),
        ("EXPOSE 18080", "COPY gateway /gateway", "didn't make"),
    ],
)
def test_each_complaint_can_be_made(before: str, after: str, said: str) -> None:
    text = (IMAGES / "gateway.Dockerfile").read_text()
    assert before in text
    assert any(said in complaint for complaint in complaints(read_dockerfile(text.replace(before, after))))


def test_the_context_holds_what_images_are_built_from_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for name in NAMES
        for stage in image(name).stages
        for rest in stage.all("COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []


def test_every_image_starts_a_command_that_there_is() -> None:
    known = {command.name for group in GROUPS.values() for command in group} | {"--help"}
    for name in NAMES:
        last = image(name).last
        assert words(last.all("ENTRYPOINT")[-1]) == ["fraudgate"]
        assert words(last.all("CMD")[-1])[0] in known


PROBE = """
import importlib, importlib.util, sys
from deploy.cli import GROUPS
absent, wanted = sys.argv[1].split(","), sys.argv[2].split(",")
print("carries", [name for name in absent if importlib.util.find_spec(name) is not None])
commands = {c.name: c for group in GROUPS.values() for c in group}
for name in wanted:
    module = importlib.import_module(commands[name].module)
    assert callable(getattr(module, commands[name].function))
print("runs", len(wanted))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_an_image_runs_its_commands_with_what_its_build_installs(name: str, tmp_path: Path) -> None:
    """The build stage of the Dockerfile, run here; then its environment alone, from another folder, as the image has it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    uv = find_uv()
    assert uv is not None, "make setup puts it there"
    (tools / "uv").symlink_to(uv)
    # The image's Python is that of its base; here it is the one that runs the tests.
    (tools / "python3.11").symlink_to(os.path.realpath(sys.executable))
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("deploy/")]
    env = build(image(name), ROOT, ignored, tmp_path, tools) | {
        "HOME": str(tmp_path / "home"),
        "FRAUDGATE_HOME": str(tmp_path / "state"),
    }
    (tmp_path / "home").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "build")
    python = tmp_path / "opt/fraudgate/venv/bin/python"
    argv = [str(python), "-P", "-c", PROBE, ",".join(ABSENT[name]), ",".join(COMMANDS[name])]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.splitlines() == ["carries []", f"runs {len(COMMANDS[name])}"], done.stderr[-4000:]
    entry = subprocess.run(
        [str(python.with_name("fraudgate")), "--help"], env=env, cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    assert entry.returncode == 0, entry.stderr
    if name == "gateway":
        starts_without_compiling(tmp_path, python, env)
        serves_alone_and_leaves(tmp_path, python.with_name("fraudgate"), env, "serve", "GATEWAY_PORT")
        keys = {"FRAUDGATE_API_KEYS_PATH": str(tmp_path / "keys.json")}
        run_checked([str(python.with_name("fraudgate")), "keys", "create", "shop", "--scope", "review"], tmp_path, env | keys)
        serves_alone_and_leaves(tmp_path, python.with_name("fraudgate"), env | keys, "cases", "CASES_PORT")
    if name == "jobs":
        starts_spark(tmp_path, python, env)


def run_checked(argv: list[str], cwd: Path, env: dict[str, str]) -> None:
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def serves_alone_and_leaves(tmp_path: Path, program: Path, env: dict[str, str], command: str, port_setting: str) -> None:
    """On every address, as in a pod, while nothing that it needs is there: ready all the same, and gone in time when it is told."""
    port, nobody = free_ports(2)
    away = {
        "KAFKA_BOOTSTRAP": f"{HOST}:{nobody}",
        "REDIS_URL": f"redis://{HOST}:{nobody}/0",
        "REGISTRY_URL": f"http://{HOST}:{nobody}",
    }
    settings = {f"FRAUDGATE_{name}": value for name, value in away.items()} | {f"FRAUDGATE_{port_setting}": str(port)}
    log_path = tmp_path / f"{command}.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen([str(program), command], env=env | settings, cwd=tmp_path, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until(
                lambda: process.poll() is not None or http_ok(f"http://{HOST}:{port}/readyz"), 240, f"fraudgate {command} is ready"
            )
            assert process.poll() is None, log_path.read_text()[-4000:]
            assert http_ok(f"http://{HOST}:{port}/healthz")
            process.terminate()
            assert process.wait(LEAVE_TIMEOUT_S) == 0, log_path.read_text()[-4000:]
        finally:
            process.kill()


def starts_without_compiling(tmp_path: Path, python: Path, env: dict[str, str]) -> None:
    """Machine code that the build made is used by whoever has a copy of it, as the chart's init container makes one."""
    made = tmp_path / "opt/fraudgate/kernels"
    copy = tmp_path / "kernels"
    shutil.copytree(made, copy)
    before = sorted(copy.rglob("*"))
    assert any(path.suffix == ".nbc" for path in before)
    argv = [str(python), "-P", "-m", "gateway.warm"]
    done = subprocess.run(
        argv, env=env | {"NUMBA_CACHE_DIR": str(copy)}, cwd=tmp_path, capture_output=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(copy.rglob("*")) == before


SPARK = """
import sys
from deltalake import DeltaTable
from feature_jobs.session import build_session
from gateway.contracts.settings import load_settings
settings = load_settings()
spark = build_session(settings)
one, two = settings.tables + "/one", settings.tables + "/two"
spark.range(3).write.format("delta").save(one)
stream = spark.readStream.format("delta").load(one).writeStream.format("delta")
stream.option("checkpointLocation", settings.checkpoints + "/two").trigger(availableNow=True).start(two).awaitTermination()
spark.stop()
held = DeltaTable(two.replace("s3a://", "s3://"), storage_options={"AWS_ALLOW_HTTP": "true"}).to_pyarrow_table()
print("rows", sorted(held["id"].to_pylist()))
"""


def starts_spark(tmp_path: Path, python: Path, env: dict[str, str]) -> None:
    """Java from the wheel, the connectors from the lock: a Delta table is written, streamed to another, and read by delta-rs.

    First on a directory, then on a server that speaks S3, with the checkpoint there too.
    """
    small = env | {"FRAUDGATE_SPARK_MEMORY_MB": "512", "FRAUDGATE_SPARK_CORES": "1"}
    argv = [str(python), "-P", "-c", SPARK]
    done = subprocess.run(argv, env=small, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.splitlines()[-1:] == ["rows [0, 1, 2]"], done.stderr[-4000:]
    with s3_server(tmp_path / "s3.log", BUCKET) as variables:
        places = {"FRAUDGATE_TABLES_URI": f"s3a://{BUCKET}/tables", "FRAUDGATE_CHECKPOINTS_URI": f"s3a://{BUCKET}/checkpoints"}
        done = subprocess.run(
            argv, env=small | variables | places, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
        )
    assert done.stdout.splitlines()[-1:] == ["rows [0, 1, 2]"], done.stderr[-4000:]
