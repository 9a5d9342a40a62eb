"""What Spark is given, and what is missing said plainly."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_jobs.session import JAR_PREFIXES, MissingJarError, jars, options
from gateway.contracts.settings import Settings


def make_jars(cache: Path) -> Path:
    folder = cache / "jars" / "spark"
    folder.mkdir(parents=True)
    for prefix in JAR_PREFIXES:
        (folder / f"{prefix}1.0.jar").touch()
    (folder / "jackson-core-2.13.5.jar").touch()
    return cache / "jars"


def test_only_what_spark_does_not_carry_itself_is_on_its_class_path(tmp_path: Path) -> None:
    assert len(jars(make_jars(tmp_path))) == 12
    assert not [jar for jar in jars(tmp_path / "jars") if "jackson" in jar.name]


def test_a_missing_jar_is_named(tmp_path: Path) -> None:
    folder = make_jars(tmp_path)
    (folder / "spark" / "kafka-clients-1.0.jar").unlink()
    with pytest.raises(MissingJarError, match="kafka-clients"):
        jars(folder)


def test_the_driver_listens_on_loopback_only_and_shows_no_page(tmp_path: Path) -> None:
    make_jars(tmp_path)
    chosen = options(Settings(cache_dir=str(tmp_path)))
    assert chosen["spark.driver.host"] == chosen["spark.driver.bindAddress"] == "127.0.0.1"
    assert chosen["spark.ui.enabled"] == "false"


def test_s3a_settings_come_with_s3a_tables_only(tmp_path: Path) -> None:
    folder = make_jars(tmp_path) / "spark-s3a"
    s3_settings = Settings(cache_dir=str(tmp_path), tables_uri="s3a://bucket/tables")
    with pytest.raises(MissingJarError, match="python -m deploy.jars spark-s3a"):
        options(s3_settings)
    folder.mkdir()
    (folder / "hadoop-aws-1.0.jar").touch()
    local, s3 = (options(Settings(cache_dir=str(tmp_path), tables_uri=uri)) for uri in ("", "s3a://bucket/tables"))
    assert not [name for name in local if "s3a" in name]
    assert [name for name in s3 if "s3a" in name]
    assert "hadoop-aws" in s3["spark.jars"]
    assert "hadoop-aws" not in local["spark.jars"]
