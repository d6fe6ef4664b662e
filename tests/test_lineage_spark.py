"""Measuring and tracking Spark's tables starts no job: proved against a real Spark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from otel_odibi import lineage
from otel_odibi.facts import Edge
from otel_odibi.lineage import Size

pytestmark = pytest.mark.stack

READ = Edge("read", 1, 2)


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """Start Spark inside this process, with one worker thread."""
    from pyspark.sql import SparkSession

    builder: Any = SparkSession.builder
    session = builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture
def jobs(spark: Any) -> Callable[[], int]:
    """Count the jobs started since the test began, from whatever thread.

    The scheduler itself is asked: the status tracker and listeners hear of a job some time later.
    """
    scheduler = spark.sparkContext._jsc.sc().dagScheduler()
    before = scheduler.numTotalJobs()
    return lambda: scheduler.numTotalJobs() - before


def test_the_counter_sees_jobs(spark: Any, jobs: Callable[[], int]) -> None:
    """So that a count of none below means none."""
    assert jobs() == 0
    assert spark.range(10).count() == 10
    assert jobs() > 0


def test_a_frame_gives_columns_and_starts_no_job(spark: Any, jobs: Callable[[], int]) -> None:
    """Through joins, aggregations and failing expressions alike."""
    left = spark.range(1000).withColumnRenamed("id", "k")
    frame = left.join(spark.range(10).selectExpr("id as k", "assert_true(id < 0) as bad"), "k").groupBy("k").count()
    assert lineage.measure(frame) == Size(None, None, ("k", "count"))
    assert lineage.inputs((frame,), {})[0] is None
    assert lineage.inputs((frame, [frame, left]), {"more": {"left": left}}) == (None, ())
    assert lineage.measure([frame, left]) == Size(None, None, None)
    assert jobs() == 0


def test_a_frame_is_tracked_and_starts_no_job(spark: Any, jobs: Callable[[], int]) -> None:
    """Frames compare as columns do, so they must not be compared."""
    frame = spark.range(5)
    lineage.track((frame, "text"), READ)
    assert lineage.inputs((frame,), {}) == (None, (READ,))
    assert lineage.inputs((frame.filter("id > 2"),), {})[1] == ()
    assert jobs() == 0


def test_a_streaming_frame_gives_columns(spark: Any, jobs: Callable[[], int]) -> None:
    """An action on it would even be an error."""
    stream = spark.readStream.format("rate").load()
    assert lineage.measure(stream) == Size(None, None, ("timestamp", "value"))
    assert jobs() == 0


def test_many_columns_are_cut(spark: Any, jobs: Callable[[], int]) -> None:
    """As those of every library."""
    columns = lineage.measure(spark.range(1).selectExpr(*[f"id as c{i}" for i in range(300)])).columns
    assert columns == (*(f"c{i}" for i in range(256)), "…+44")
    assert jobs() == 0


def test_other_spark_objects_have_no_size(spark: Any, jobs: Callable[[], int]) -> None:
    """An RDD, a row, a column."""
    frame = spark.range(5)
    for value in (frame.rdd, frame["id"], frame.groupBy("id"), spark):
        assert lineage.measure(value) == lineage.NOTHING
    assert jobs() == 0
