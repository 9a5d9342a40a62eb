"""The one place that builds the Spark session of the feature jobs. Start-up costs about 10 seconds and 600 MB.

docs/pipeline.md repeats why each value below is what it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from gateway.contracts.settings import Settings

APP_NAME = "fraudgate-jobs"
# What Spark 4.1.1 doesn't carry itself, by the start of the file name. The jars folder holds more (Hadoop, Jackson, Scala ...), which
# Spark has already, in its own versions: two of them on one class path break it.
JAR_PREFIXES = (
    "delta-spark_4.1_2.13-",
    "delta-storage-",
    "delta-kernel-api-",
    "delta-kernel-defaults-",
    "delta-kernel-unitycatalog-",
    "unitycatalog-client-",
    "unitycatalog-hadoop-",
    "spark-avro_2.13-",
    "spark-sql-kafka-0-10_2.13-",
    "spark-token-provider-kafka-0-10_2.13-",
    "kafka-clients-",
    "commons-pool2-",
)
# Hadoop's client of S3 and what it needs: fetched only when asked for (python -m deploy.jars spark-s3a).
S3A_FOLDER = "spark-s3a"


class MissingJarError(RuntimeError):
    """A jar that the jobs need is not in the jars folder. `make setup` fetches them."""


def jars(jars_path: Path, *, s3a: bool = False) -> list[Path]:
    """The jars to give Spark, with those for tables on S3 if wanted. Raises `MissingJarError`."""
    folder = jars_path / "spark"
    found = []
    for prefix in JAR_PREFIXES:
        hits = sorted(folder.glob(f"{prefix}[0-9]*.jar"))
        if not hits:
            raise MissingJarError(f"no {prefix}*.jar in {folder}; run make setup")
        found.append(hits[-1])
    if not s3a:
        return found
    more = sorted((jars_path / S3A_FOLDER).glob("*.jar"))
    if not more:
        raise MissingJarError(f"no jars for S3 in {jars_path / S3A_FOLDER}; fetch them by: python -m deploy.jars {S3A_FOLDER}")
    return found + more


def options(settings: Settings) -> dict[str, str]:
    """Every Spark option that differs from Spark's own default, and why."""
    heap_mb = settings.spark_memory_mb
    s3a = any(uri.startswith("s3a://") for uri in (settings.tables, settings.checkpoints))
    chosen = {
        "spark.master": f"local[{settings.spark_cores}]",
        "spark.app.name": APP_NAME,
        "spark.driver.memory": f"{heap_mb}m",
        "spark.driver.extraJavaOptions": (
            # One simple collector for a small heap: G1's concurrent threads compete with the streams on two cores.
            "-XX:+UseSerialGC"
            # The default cache of 48 MB is too small for Spark: the JVM then throws code away and interprets what it had compiled.
            f" {compiler_options(settings.spark_optimise_calls)} -XX:ReservedCodeCacheSize=256m"
            # Hadoop starts a `chmod` for each local file it creates: vfork instead of a helper program that starts it.
            " -Djdk.lang.Process.launchMechanism=VFORK -Djava.net.preferIPv4Stack=true"
            f" -Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}"
            f" {settings.spark_java_options}"
        ),
        "spark.jars": ",".join(str(jar) for jar in jars(settings.jars_path, s3a=s3a)),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        # Checkpoint files without .crc companions: half as many files to create.
        "spark.hadoop.fs.AbstractFileSystem.file.impl": "org.apache.hadoop.fs.local.RawLocalFs",
        # Loopback only: a driver that binds every address offers its block manager to the network.
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        # A micro-batch is a few thousand rows: more tasks than cores only add scheduling.
        "spark.sql.shuffle.partitions": str(settings.spark_cores),
        "spark.default.parallelism": str(settings.spark_cores),
        # Re-planning between stages pays for large joins; here it costs a tenth of a second a batch.
        "spark.sql.adaptive.enabled": "false",
        # The JVM never compiles a method of more than 8,000 bytes: the parser's generated code, run interpreted, took 68 us a row, not 49.
        "spark.sql.codegen.hugeMethodLimit": "8000",
        # The three streams share the cores by turns, so that a long merge of gold doesn't hold back bronze.
        "spark.scheduler.mode": "FAIR",
        # Delta's default of 50 made each snapshot a stage of 50 tasks.
        "spark.databricks.delta.snapshotPartitions": "1",
        # Logs are read by this driver only: their in-memory state needs no freshness check against other writers.
        "spark.databricks.delta.stalenessLimit": "0",
        "spark.databricks.delta.checkpoint.partSize": "100000",
        "spark.databricks.delta.merge.repartitionBeforeWrite.enabled": "true",
        # Keys of the last ten minutes: millions. The default store copies its whole map each batch; RocksDB writes what changed.
        "spark.sql.streaming.stateStore.providerClass": (
            "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
        ),
        "spark.sql.streaming.stateStore.rocksdb.changelogCheckpointing.enabled": "true",
        # An empty batch only to evict state costs as much as a full one.
        "spark.sql.streaming.noDataMicroBatches.enabled": "false",
        "spark.sql.streaming.minBatchesToRetain": "20",
        "spark.sql.streaming.stopTimeout": "30s",
        # A polling sources' wait between two looks: less makes no batch fresher than its trigger.
        "spark.sql.streaming.pollingDelay": "50ms",
        "spark.sql.streaming.metricsEnabled": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "50000",
        "spark.python.worker.reuse": "true",
        "spark.cleaner.periodicGC.interval": "10min",
    }
    if s3a:
        chosen |= {
            "spark.hadoop.fs.s3a.path.style.access": "true",
            # Uploads of small files from memory, not by way of a local disk.
            "spark.hadoop.fs.s3a.fast.upload.buffer": "bytebuffer",
            "spark.hadoop.fs.s3a.directory.marker.retention": "keep",
        }
    return chosen


def compiler_options(optimise_calls: int) -> str:
    """The quick compiler only, or the optimising one too for what is called that often; 0: never.

    Each batch plans anew and runs for a second: with the JVM's own thresholds (5,000 calls) compiling took a third of all CPU. Higher
    ones, in the JVM's own proportions, leave it to what runs for every row.
    """
    if not optimise_calls:
        return "-XX:TieredStopAtLevel=1"
    return (
        f"-XX:Tier4InvocationThreshold={optimise_calls} -XX:Tier4MinInvocationThreshold={optimise_calls // 8}"
        f" -XX:Tier4CompileThreshold={3 * optimise_calls} -XX:Tier4BackEdgeThreshold={8 * optimise_calls}"
    )


def build_session(settings: Settings) -> SparkSession:
    """A Spark session for the feature jobs, the process' only one."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    builder = SparkSession.builder
    for name, value in options(settings).items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    context = spark.sparkContext
    context.setLogLevel("ERROR")
    # The tables' files on a local directory likewise: Parquet and Delta have checksums of their own.
    assert context._jvm is not None
    context._jvm.org.apache.hadoop.fs.FileSystem.getLocal(context._jsc.hadoopConfiguration()).setWriteChecksum(False)
    return spark
