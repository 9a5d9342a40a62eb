"""`python -m loadtest.peers.mlflow_serve PORT MODEL.onnx DIRECTORY`: the same model behind MLflow's own scoring server.

Saves the model as a pyfunc in DIRECTORY and becomes `mlflow models serve` of it: one worker, this Python environment, one row of
features a request on /invocations (`loadtest.peers.requests.mlflow_body`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlflow.onnx
import numpy as np
import onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.model_meta import INPUT_NAME

WIDTH = len(FEATURE_NAMES)


def save(model_path: Path, directory: Path) -> None:
    # One thread for one row, as everywhere here.
    options = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    signature = ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, WIDTH), INPUT_NAME)]))
    mlflow.onnx.save_model(onnx.load(model_path), directory, signature=signature, onnx_session_options=options, pip_requirements=[])


def command(port: int, directory: Path) -> list[str]:
    mlflow_cli = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(directory), "--env-manager", "local"]
    return [*mlflow_cli, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


if __name__ == "__main__":
    place = Path(sys.argv[3])
    save(Path(sys.argv[2]), place)
    argv = command(int(sys.argv[1]), place)
    # MLflow starts uvicorn by name, which an activated environment has on its PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.execv(argv[0], argv)  # noqa: S606
