"""`python -m deploy.bench.fill CARDS PAYMENTS MERCHANTS`: a month of payments of a population, restored into Redis as after a loss.

Writes the tables that the streams would have left and runs the rebuild on them, so that each card comes to the benchmark with tiles and
a head. A process of its own: Spark is gone when it ends. FRAUDGATE_ settings say where.
"""

from __future__ import annotations

import os
import sys
import time

from deploy.population import write
from deploy.toolchain import spark_env
from feature_jobs.rebuild import newest_batch, rebuild
from feature_jobs.restore import RestoreJob
from feature_jobs.session import build_session
from gateway.contracts.settings import Settings, load_settings

SEED = 5
EPOCH = 1


def fill(settings: Settings, cards: int, payments_mean: float, merchants: int) -> int:
    """Returns how many payments Redis' tiles and heads were made of."""
    now_ms = time.time_ns() // 1_000_000
    spark = build_session(settings)
    try:
        write(settings, cards, payments_mean, now_ms, SEED, merchants)
        job = RestoreJob(settings.redis, EPOCH, newest_batch(spark, settings), now_ms, 0, settings.redis_retry_s)
        return rebuild(spark, settings, job).transactions
    finally:
        spark.stop()


if __name__ == "__main__":
    found = load_settings()
    os.environ.update(spark_env(found.cache_path))
    print(fill(found, int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
