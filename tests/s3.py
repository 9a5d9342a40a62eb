"""A server that speaks S3, in one process, on a free port of 127.0.0.1: moto's."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3

from deploy.ports import free_ports
from deploy.services import http_ok
from tests.helpers import HOST, wait_until

START_TIMEOUT_S = 60
REGION = "us-east-1"
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something", "AWS_REGION": REGION}


@contextlib.contextmanager
def s3_server(log_path: Path, bucket: str) -> Iterator[dict[str, str]]:
    """With an empty bucket. What its clients need in their environment."""
    port = free_ports(1)[0]
    endpoint = f"http://{HOST}:{port}"
    argv = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    with log_path.open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as server:
        try:
            wait_until(
                lambda: server.poll() is not None or http_ok(f"{endpoint}/moto-api/data.json"), START_TIMEOUT_S, "S3 answers"
            )
            client = boto3.client(
                "s3",
                region_name=REGION,
                endpoint_url=endpoint,
                aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            )
            client.create_bucket(Bucket=bucket)
            yield KEYS | {"AWS_ENDPOINT_URL": endpoint}
        finally:
            server.terminate()
