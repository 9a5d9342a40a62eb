"""Trains, checks, exports, registers and fetches models.

MLflow decides while it is imported whether to report its use to its makers. Nothing leaves this machine unasked, so that is settled
here, before any module of the package can import it.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
