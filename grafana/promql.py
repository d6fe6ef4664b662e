"""PromQL for batch work: selectors, totals, ratios and quantiles over the metrics of `otel_odibi.names`.

Runs are short and rare, so three things that are right for a web server are wrong here. `increase()` does not see the
first value of a series that is born in the window, which is all there is of a pipeline's first run: `grown()` adds
it. A window in which nothing failed or hit gives no series, not zero: `ratio()` says 0, as does `or vector(0)`.
And a process that has ended no longer reports: `last()` finds what it said within the window.
"""

from __future__ import annotations

from typing import Final

from otel_odibi.names import Instrument

RANGE: Final = "$__range"
RATE: Final = "$__rate_interval"
FILTERS: Final = ("environment", "service", "job", "instance")
"""Dashboard variables that every series can be filtered by; `pipeline` and `node` only where a metric has them."""

SPANS: Final = "traces_span_metrics_duration_seconds_bucket"
"""What the collector's span_metrics connector makes of spans."""


def select(instrument: Instrument, suffix: str = "", **equal: str) -> str:
    """Return the selector of a metric's series, filtered by the dashboard's variables and by `equal` labels."""
    variables = [*FILTERS, *(key for key in ("pipeline", "node") if key in instrument.attributes)]
    matchers = [f'{name}=~"${name}"' for name in variables] + [f'{key}="{value}"' for key, value in equal.items()]
    return f"{instrument.prometheus}{suffix}{{{', '.join(matchers)}}}"


def grown(series: str, window: str = RANGE) -> str:
    """Return by how much each counter has grown in the window, the first value of one that is born in it included."""
    return (
        f"(increase({series}[{window}])"
        f" + ((min_over_time({series}[{window}]) unless {series} offset {window}) or increase({series}[{window}]) * 0))"
    )


def with_spans(expression: str, instrument: Instrument) -> str:
    """Return the expression, with a selector added that gives nothing but exemplars.

    The collector keeps only the first exemplars of our histograms; fresh ones are with the durations that it makes of
    spans. Prometheus looks for exemplars at every selector of a query, and no count is below 0.
    """
    kind = "node" if "node" in instrument.attributes else "pipeline"
    labels = [f'{name}=~"${name}"' for name in FILTERS] + [f'span_name=~"{kind} .+"']
    labels += [f'odibi_{name}_name=~"${name}"' for name in ("pipeline", "node")[: 2 if kind == "node" else 1]]
    return f"{expression} or ({SPANS}{{{', '.join(labels)}}} < 0)"


def rate(series: str) -> str:
    """Return how fast each counter grows, a second."""
    return f"rate({series}[{RATE}])"


def last(series: str) -> str:
    """Return what each gauge said last within the range, also if its process has ended since."""
    return f"last_over_time({series}[{RANGE}])"


def added(expression: str, *by: str) -> str:
    """Return the sum, by these labels."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def greatest(expression: str, *by: str) -> str:
    """Return the maximum, by these labels."""
    return f"max by ({', '.join(by)}) ({expression})" if by else f"max({expression})"


def ratio(part: str, whole: str, *by: str) -> str:
    """Return the share of `part` in `whole`: 0 where there is a whole but no part, nothing where there is no whole."""
    total = added(whole, *by)
    return f"({added(part, *by)} or {total} * 0) / ({total} > 0)"


def mean(instrument: Instrument, *by: str) -> str:
    """Return the mean of what a histogram saw in the range, by these labels."""
    return f"{added(grown(select(instrument, '_sum')), *by)} / ({added(grown(select(instrument, '_count')), *by)} > 0)"


def quantile(q: float, buckets: str, *by: str) -> str:
    """Return a quantile of a histogram from an expression over its buckets, by these labels."""
    return f"histogram_quantile({q}, {added(buckets, 'le', *by)})"
