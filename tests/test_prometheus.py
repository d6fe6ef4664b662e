"""What the Prometheus endpoint serves: names, labels, exemplars, histograms; and what it does when things go wrong."""

from __future__ import annotations

import gzip
import math
import random
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import Exemplar, MeterProvider
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader, MetricsData
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from otel_odibi import names
from otel_odibi.clean import plain_text
from otel_odibi.errors import SettingError
from otel_odibi.exporters.prometheus import PrometheusReader, expose, families

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
NASTY = [
    '"',
    "\\",
    "\n",
    "\r",
    "\x00",
    "\x85",
    "\u2028",
    "\ud800",
    "\udfff",
    "{",
    "}",
    ",",
    "=",
    "#",
    " ",
    "é",
    "名",
    "🛫",
    "\\n",
]


def number(value, attributes=None, start=1, exemplars=()):
    return sdk.NumberDataPoint(attributes or {}, start, 2, value, list(exemplars))


def counter(name, *points, unit="", text="", temporality=AggregationTemporality.CUMULATIVE):
    return sdk.Metric(name, text, unit, sdk.Sum(list(points), temporality, True))


def updown(name, *points, unit="", text=""):
    return sdk.Metric(name, text, unit, sdk.Sum(list(points), AggregationTemporality.CUMULATIVE, False))


def gauge(name, *points, unit="", text=""):
    return sdk.Metric(name, text, unit, sdk.Gauge(list(points)))


def distribution(counts, bounds, total, attributes=None, start=1, exemplars=()):
    return sdk.HistogramDataPoint(attributes or {}, start, 2, sum(counts), total, counts, bounds, 0, 0, list(exemplars))


def histogram(name, *points, unit="", text=""):
    return sdk.Metric(name, text, unit, sdk.Histogram(list(points), AggregationTemporality.CUMULATIVE))


def exponential(name, scale, positive, negative=(), zeros=0, offset=0, total=0.0):
    count = sum(positive) + sum(negative) + zeros
    buckets = sdk.Buckets(offset, list(positive)), sdk.Buckets(offset, list(negative))
    point = sdk.ExponentialHistogramDataPoint({}, 1, 2, count, total, scale, zeros, *buckets, 0, 0, 0)
    return sdk.Metric(name, "", "", sdk.ExponentialHistogram([point], AggregationTemporality.CUMULATIVE))


def data(*metrics, scope="", version=None, resource=None):
    found = sdk.ScopeMetrics(InstrumentationScope(scope, version), list(metrics), "")
    return MetricsData([sdk.ResourceMetrics(Resource(resource or {}), [found], "")])


def lines(*metrics, openmetrics=False, **about):
    """The lines of the exposition, comments left out; both parsers have accepted it."""
    found = families(data(*metrics, **about))
    list(parse_text(expose(found).decode()))
    list(parse_openmetrics(expose(found, openmetrics=True).decode()))
    return [line for line in expose(found, openmetrics=openmetrics).decode().split("\n") if line and line[0] != "#"]


# --- names and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instrument", names.INSTRUMENTS, ids=lambda instrument: instrument.name)
def test_own_instruments_have_the_names_of_the_registry(instrument):
    """What `names.py` promises is what Prometheus sees, and it is fit for both formats."""
    make = MAKERS[instrument.kind]
    point = distribution([1, 1], [1.0], 3.0) if instrument.kind == "histogram" else number(1)
    found = lines(make(instrument.name, point, unit=instrument.unit), scope=names.SCOPE, version="1")
    wanted = instrument.prometheus + ("_bucket" if instrument.kind == "histogram" else "")
    assert found[0].partition("{")[0].partition(" ")[0] == wanted
    assert "otel_scope" not in "".join(found)


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        (counter("http.requests", number(1), unit="{request}"), "http_requests_total"),
        (counter("io.total", number(1), unit="By"), "io_bytes_total"),
        (counter("bytes_total", number(1), unit="By"), "bytes_total"),
        (gauge("speed", number(1), unit="m/s"), "speed_meters_per_second"),
        (gauge("memory.bytes", number(1), unit="By"), "memory_bytes"),
        (gauge("a--b..c", number(1)), "a_b_c"),
        (gauge("", number(1)), "_"),
        (updown("queue.length", number(1), unit="{item}"), "queue_length"),
    ],
)
def test_foreign_names_follow_the_compatibility_specification(metric, wanted):
    """Units become suffixes, counters end in _total, what Prometheus does not take becomes one underscore."""
    assert lines(metric)[0].split(" ")[0] == wanted


def test_foreign_series_carry_their_scope():
    """The same name in two libraries gives two series, not one that is the sum of both."""
    found = lines(counter("c", number(1)), scope="lib", version="2.0")
    assert found == ['c_total{otel_scope_name="lib",otel_scope_version="2.0"} 1.0']


def test_keys_that_become_one_label_are_joined():
    """Values are joined with a semicolon, in the order of the original keys."""
    assert lines(gauge("g", number(1, {"a_b": "second", "a.b": "first"}))) == ['g{a_b="first;second"} 1.0']


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (7, "7"), (0.5, "0.5"), (("a", "b"), '[\\"a\\", \\"b\\"]'), ("\ud800", "\ufffd"), ("é\n", "é\\n")],
)
def test_label_values_of_any_type_become_text(value, text):
    """Other than text, values are shown as JSON; lone surrogates, which UTF-8 cannot hold, are replaced."""
    assert lines(gauge("g", number(1, {"k": value}))) == [f'g{{k="{text}"}} 1.0']


def test_odd_keys_become_valid_labels():
    """Also a key that is empty, begins with a digit, or is what a histogram needs itself."""
    assert lines(gauge("g", number(1, {"": "a", "1x": "b", "__name__": "c"}))) == ['g{_="a",_name_="c",_x="b"} 1.0']
    assert 'h_bucket{exported_le="x",le="1.0"} 1.0' in lines(
        histogram("h", distribution([1, 0], [1.0], 1.0, {"le": "x"}))
    )


def test_series_that_become_one_are_written_once():
    """Counters and histograms add up, of gauges the last one counts; an empty label is the same as none."""
    twice = [{"k": ""}, {}]
    assert lines(counter("c", *(number(2, a) for a in twice))) == ["c_total 4.0"]
    assert lines(gauge("g", *(number(v, a) for v, a in zip((5, 3), twice, strict=True)))) == ["g 3.0"]
    found = lines(histogram("h", *(distribution([1, 1], [1.0], 2.5, a) for a in twice)))
    assert found == ['h_bucket{le="1.0"} 2.0', 'h_bucket{le="+Inf"} 4.0', "h_count 4.0", "h_sum 5.0"]


def test_metrics_that_become_one_family_are_merged():
    """`a.b` and `a-b` of one type are one family; the first gives the help."""
    both = data(
        counter("a.b", number(1, {"x": "1"}), text="First."), counter("a-b", number(2, {"x": "2"}), text="Second.")
    )
    text = expose(families(both)).decode()
    assert text.count("# HELP") == 1
    assert "First." in text
    assert 'a_b_total{x="1"} 1.0' in text
    assert 'a_b_total{x="2"} 2.0' in text


@pytest.mark.parametrize(
    "second",
    [gauge("x", number(1)), gauge("x_count", number(1)), gauge("x.bucket", number(1)), counter("x", number(1))],
    ids=["type", "count", "bucket", "counter"],
)
def test_a_family_that_would_make_the_exposition_invalid_is_left_out(second, caplog):
    """The first one stays, the other is counted and warned about once, however often it is scraped."""
    first = histogram("x", distribution([1, 0], [1.0], 1.0))
    lost = []
    both = data(first, second)
    from otel_odibi.exporters.families import Losses

    losses = Losses(lambda reason, count: lost.append((reason, count)))
    for _ in range(3):
        text = expose(families(both, lose=losses), openmetrics=True).decode()
        assert [family.name for family in parse_openmetrics(text)] == ["x"]
    assert lost == [("name_conflict", 1)]
    assert len(caplog.records) == 1


def test_a_raising_on_drop_does_no_harm():
    """Somebody's callback does not get into the scrape."""
    from otel_odibi.exporters.families import Losses

    Losses(lambda reason, count: 1 / 0)("reason", "thing", 1)


def test_delta_metrics_are_left_out():
    """A difference is no count; the specification has it dropped."""
    assert lines(counter("c", number(1), temporality=AggregationTemporality.DELTA), gauge("g", number(1))) == ["g 1.0"]


def test_one_broken_metric_does_not_fail_the_others():
    """Metrics made by hand may hold anything."""
    broken = histogram("h", sdk.HistogramDataPoint({}, 1, 2, None, 0, None, None, 0, 0))
    assert lines(broken, sdk.Metric("m", "", "", None), gauge("g", number("no number")), gauge("ok", number(1))) == [
        "ok 1.0"
    ]


def test_the_resource_is_the_target_info():
    """Once, and not where a metric has that name."""
    assert lines(gauge("g", number(1)), resource={"service.name": "s"}) == [
        'target_info{service_name="s"} 1.0',
        'g{service="s"} 1.0',
    ]
    assert lines(gauge("target", number(1)), resource={"service.name": "s"}) == ['target{service="s"} 1.0']


def test_every_series_tells_its_service_and_environment():
    """Buckets, too, and the exemplars stay; one of several resources tells of its own series alone."""
    about = {"service.name": "s", "deployment.environment.name": "night é", "host.name": "h"}
    points = [distribution([1, 0], [1.0], 1.0, exemplars=[exemplar(0.5)])], [number(3, {"node": "a"})]
    _, *found = lines(histogram("h", *points[0]), counter("c", *points[1]), resource=about, openmetrics=True)
    assert len(found) == 5
    assert all('environment="night é"' in line and 'service="s"' in line for line in found)
    assert found[0].startswith('h_bucket{environment="night é",le="1.0",service="s"} 1.0 # {')
    assert found[-1] == 'c_total{environment="night é",node="a",service="s"} 3.0'
    both = [data(gauge("g", number(i)), resource={"service.name": f"s{i}"}).resource_metrics[0] for i in (1, 2)]
    text = expose(families(MetricsData(both))).decode()
    assert 'g{service="s1"} 1.0\ng{service="s2"} 2.0\n' in text


def test_an_attribute_of_that_name_wins():
    """It was set for this metric; an empty one is none, and a second that becomes the same label is joined as ever."""
    attributes = {"service": "own", "environment": ""}
    about = {"service.name": "s", "deployment.environment.name": "prod"}
    assert lines(gauge("g", number(1, attributes)), resource=about)[1:] == ['g{environment="prod",service="own"} 1.0']
    assert lines(gauge("g", number(1)), resource={"service.name": ""})[1:] == ["g 1.0"]


# --- values ----------------------------------------------------------------------------------------------------------


def test_gauges_take_any_number():
    """NaN and infinities are values to Prometheus; an integer too great for a float is infinite."""
    points = [number(v, {"k": str(i)}) for i, v in enumerate([math.nan, math.inf, -math.inf, 10**400])]
    assert [line.split(" ")[1] for line in lines(gauge("g", *points))] == ["NaN", "+Inf", "-Inf", "+Inf"]


def test_a_counter_takes_no_nan_and_no_negative_number():
    """No format has them; the other series stay."""
    points = [number(math.nan, {"k": "1"}), number(-1, {"k": "2"}), number(0, {"k": "3"})]
    assert lines(counter("c", *points)) == ['c_total{k="3"} 0.0']


@pytest.mark.parametrize("total", [math.nan, -1.0, None])
def test_a_histogram_without_a_usable_sum_stays_valid(total):
    """Its buckets are there; OpenMetrics wants count and sum together or not at all."""
    assert lines(histogram("h", distribution([1, 2], [1.0], total))) == [
        'h_bucket{le="1.0"} 1.0',
        'h_bucket{le="+Inf"} 3.0',
    ]


@given(
    bounds=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8),
    counts=st.lists(st.integers(0, 5), max_size=9),
    total=st.floats(),
)
def test_histograms_of_any_bounds_are_valid(bounds, counts, total):
    """Doubled, unsorted, missing or infinite bounds: the buckets are in order and end with +Inf."""
    lines(histogram("h", distribution(counts, bounds, total)))


# --- exponential histograms ------------------------------------------------------------------------------------------


def test_an_exponential_histogram_has_the_exact_bounds_of_its_buckets():
    """Those that hold something, lower and upper, so that a quantile is estimated between the right two."""
    found = lines(exponential("e", 0, [0, 3, 0, 0, 1], zeros=2, total=20.0))
    assert found == [
        'e_bucket{le="0.0"} 2.0',
        'e_bucket{le="2.0"} 2.0',
        'e_bucket{le="4.0"} 5.0',
        'e_bucket{le="16.0"} 5.0',
        'e_bucket{le="32.0"} 6.0',
        'e_bucket{le="+Inf"} 6.0',
        "e_count 6.0",
        "e_sum 20.0",
    ]


def test_an_exponential_histogram_with_negative_values_has_them_in_buckets():
    """Their bounds are negative; then there is no sum in OpenMetrics."""
    found = lines(exponential("e", 0, [1], [2], zeros=1))
    assert found == [
        'e_bucket{le="-2.0"} 0.0',
        'e_bucket{le="-1.0"} 2.0',
        'e_bucket{le="0.0"} 3.0',
        'e_bucket{le="1.0"} 3.0',
        'e_bucket{le="2.0"} 4.0',
        'e_bucket{le="+Inf"} 4.0',
    ]


def test_many_exponential_buckets_are_put_together():
    """A thousand of them become few enough, at a lower scale; nothing is lost."""
    found = lines(exponential("e", 8, [1] * 1000))
    assert len(found) < 200
    assert 'e_bucket{le="+Inf"} 1000.0' in found


@given(
    scale=st.integers(-10, 20),
    offset=st.integers(-(2**31), 2**31 - 1),
    positive=st.lists(st.integers(0, 3), max_size=20),
    negative=st.lists(st.integers(0, 3), max_size=20),
    zeros=st.integers(0, 3),
)
def test_exponential_histograms_of_any_scale_are_valid(scale, offset, positive, negative, zeros):
    """Also where a bound is too great for a float, or too small."""
    found = lines(exponential("e", scale, positive, negative, zeros, offset))
    assert f'e_bucket{{le="+Inf"}} {float(sum(positive) + sum(negative) + zeros)}' in found


def test_the_sdks_exponential_histogram_does_not_fail_the_scrape():
    """As it does with the official exporter."""
    reader = InMemoryMetricReader()
    view = View(instrument_name="e", aggregation=ExponentialBucketHistogramAggregation())
    provider = MeterProvider([reader], views=[view], shutdown_on_exit=False)
    instrument = provider.get_meter("m").create_histogram("e", "s")
    for value in (0, 0.001, 1, 1000):
        instrument.record(value)
    text = expose(families(reader.get_metrics_data()), openmetrics=True).decode()
    (found,) = (family for family in parse_openmetrics(text) if family.name == "e_seconds")
    assert next(sample.value for sample in found.samples if sample.name == "e_seconds_count") == 4
    provider.shutdown()


# --- exemplars -------------------------------------------------------------------------------------------------------


def exemplar(value, trace_id=1, span_id=2, time=1_700_000_000_500_000_000, **attributes):
    return Exemplar(attributes, value, time, span_id, trace_id)


def test_exemplars_are_in_openmetrics_and_not_in_text():
    """Each in its bucket, with the ids of its span and its time; of two in one bucket the greater."""
    point = distribution([2, 1], [1.0], 3.0, exemplars=[exemplar(0.7), exemplar(0.5), exemplar(2.0, span_id=3)])
    found = lines(histogram("h", point), openmetrics=True)
    ids = f'span_id="{2:016x}",trace_id="{1:032x}"'
    assert found[0] == f'h_bucket{{le="1.0"}} 2.0 # {{{ids}}} 0.7 1700000000.5'
    assert f'span_id="{3:016x}"' in found[1]
    assert not any("# {" in line for line in lines(histogram("h", point)))


def test_a_counter_shows_its_latest_exemplar():
    """It has room for one."""
    point = number(3, exemplars=[exemplar(2, time=9), exemplar(1, trace_id=5, time=10**9)])
    assert lines(counter("c", point), openmetrics=True)[0].endswith(f'trace_id="{5:032x}"}} 1.0 1.0')


def test_exemplars_keep_within_the_limit_of_openmetrics():
    """Attributes that the metric does not carry are shown where they fit into 128 characters with the ids."""
    short = distribution([1, 0], [1.0], 1.0, exemplars=[exemplar(0.5, user="me")])
    long = distribution([1, 0], [1.0], 1.0, exemplars=[exemplar(0.5, user="x" * 80)])
    assert 'user="me"' in lines(histogram("h", short), openmetrics=True)[0]
    found = lines(histogram("h", long), openmetrics=True)[0]
    assert "user" not in found
    assert "trace_id" in found


@pytest.mark.parametrize("empty", [exemplar(0.5, None, None), exemplar(math.nan)])
def test_an_exemplar_that_tells_nothing_is_left_out(empty):
    """One without ids and attributes, or without a number."""
    assert "# {" not in lines(histogram("h", distribution([1, 0], [1.0], 1.0, exemplars=[empty])), openmetrics=True)[0]


# --- anything at all -------------------------------------------------------------------------------------------------

TENFOLD = settings(max_examples=10, deadline=None, phases=(Phase.generate,))  # a seed cannot be made simpler
MAKERS = {"counter": counter, "gauge": gauge, "updowncounter": updown, "histogram": histogram}


def random_text(rng):
    """A random text of all planes of Unicode, lone surrogates and characters with a meaning in the formats included."""
    length = rng.choice((0, 1, 2, 5, 20, 60))
    planes = (0x7F, 0xFF, 0xFFFF, 0x10FFFF)
    return "".join(
        rng.choice(NASTY) if rng.random() < 0.3 else chr(rng.randint(0, rng.choice(planes))) for _ in range(length)
    )


def random_batch(seed, size=1_000, odd_keys=False):
    """Return random node names, one a series of an own counter, and metrics: these, and other kinds of every tenth."""
    rng = random.Random(seed)
    points = {i.kind: [] for i in names.INSTRUMENTS}
    nodes = [f"{index}{random_text(rng)}" for index in range(size)]
    for index, node in enumerate(nodes):
        labels = {"pipeline": random_text(rng), "node": node, "layer": random_text(rng), "engine": random_text(rng)}
        if odd_keys:
            labels[random_text(rng)] = random_text(rng)
        value = rng.choice((0, 1, 2**60, 1e-9, 1e300, rng.random()))
        points["counter"].append(number(value, labels))
        if index % 10 == 0:
            points["gauge"].append(number(rng.choice((value, -value, math.nan, math.inf)), labels))
            points["updowncounter"].append(number(-value, labels))
            counts = [rng.randint(0, 3) for _ in range(24)]
            points["histogram"].append(distribution(counts, names.DURATION_BOUNDS, value, labels))
    chosen = (names.NODE_ROWS, names.NODE_THROUGHPUT, names.NODE_ACTIVE, names.NODE_DURATION)
    metrics = [MAKERS[i.kind](i.name, *points[i.kind], unit=i.unit, text=i.description) for i in chosen]
    return nodes, data(*metrics, scope=names.SCOPE)


@TENFOLD
@given(st.integers(0, 2**64))
def test_ten_thousand_random_names_are_accepted_by_both_parsers(seed):
    """A thousand a batch; and each comes out of the text as it went in, less what UTF-8 cannot hold."""
    nodes, batch = random_batch(seed, odd_keys=True)
    found = families(batch)
    parsed = {family.name: family for family in parse_text(expose(found).decode())}
    assert {sample.labels["node"] for sample in parsed["odibi_node_rows"].samples} == set(map(plain_text, nodes))
    assert len(list(parse_openmetrics(expose(found, openmetrics=True).decode()))) == 4


anything = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)


@given(
    st.lists(st.tuples(anything, anything, st.dictionaries(anything, anything, max_size=4), st.floats()), max_size=8)
)
def test_metrics_of_any_name_help_and_labels_are_accepted_by_both_parsers(found):
    """Names, descriptions, keys and values that no instrument could have, but an OTLP source might."""
    makers = (gauge, counter, updown)
    lines(
        *(makers[i % 3](name, number(value, labels), text=text) for i, (name, text, labels, value) in enumerate(found))
    )


# --- the endpoint ----------------------------------------------------------------------------------------------------


class Endpoint:
    """A reader on a free port, and the provider it reads."""

    def __init__(self, reader=None, **options):
        self.reader = reader or PrometheusReader(port=0, **options)
        self.provider = MeterProvider([self.reader], Resource({"service.name": "s"}), shutdown_on_exit=False)
        self.meter = self.provider.get_meter("m")

    def scrape(self, path="", **headers):
        request = urllib.request.Request(self.reader.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read(), response.headers["Content-Type"]


@pytest.fixture
def endpoint():
    found = Endpoint()
    yield found
    found.provider.shutdown()


def test_a_scrape_shows_the_metrics_of_now(endpoint):
    """Text 0.0.4 unless the client asks for more; nothing is kept from scrape to scrape."""
    instrument = endpoint.meter.create_counter("c")
    for total in (1, 2):
        instrument.add(1)
        body, kind = endpoint.scrape()
        assert f'c_total{{otel_scope_name="m",service="s"}} {total}.0' in body.decode()
        assert body.count(b"# TYPE c_total") == 1
    assert kind.startswith("text/plain; version=0.0.4")
    assert endpoint.reader.url.startswith("http://127.0.0.1:")


def test_a_client_that_asks_for_openmetrics_gets_exemplars(endpoint):
    """As Prometheus does; with the ids of the span that was current at the measurement."""
    with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("node") as span:
        endpoint.meter.create_histogram("h", "s").record(0.5)
        endpoint.meter.create_counter("c").add(1)
    body, kind = endpoint.scrape(Accept=OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    found = {
        family.name: [sample.exemplar for sample in family.samples if sample.exemplar]
        for family in parse_openmetrics(body.decode())
    }
    for name in ("h_seconds", "c"):
        (shown,) = found[name]
        assert int(shown.labels["trace_id"], 16) == span.get_span_context().trace_id
        assert int(shown.labels["span_id"], 16) == span.get_span_context().span_id
        assert shown.timestamp is not None


def test_compressed_and_filtered_scrapes_are_answered(endpoint):
    """gzip where the client takes it; a filter is ignored rather than failing."""
    endpoint.meter.create_counter("c").add(1)
    request = urllib.request.Request(f"{endpoint.reader.url}?name[]=other", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert b"c_total" in gzip.decompress(response.read())


def test_other_paths_are_not_found(endpoint):
    """With a word on where the metrics are."""
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        endpoint.scrape("/elsewhere")
    assert b"/metrics" in caught.value.read()


def test_a_scrape_without_metrics_is_empty(endpoint):
    """A provider without instruments has nothing to say."""
    assert endpoint.scrape()[0] == b""


def test_a_failing_callback_leaves_the_others(endpoint, caplog):
    """The SDK tells of it; the scrape goes on."""
    endpoint.meter.create_observable_gauge("bad", [lambda options: 1 / 0])
    endpoint.meter.create_counter("c").add(1)
    body, _ = endpoint.scrape()
    assert b"c_total" in body
    assert b"bad" not in body


def test_a_failing_collection_is_answered_with_503(capfd, caplog):
    """And warned about once; no traceback on the console, and the next scrape may succeed."""

    class Failing(PrometheusReader):
        broken = True

        def _receive_metrics(self, *args, **kwargs):
            if self.broken:
                raise RuntimeError("no such thing: \ud800")
            super()._receive_metrics(*args, **kwargs)

    lost = []
    endpoint = Endpoint(Failing(port=0, on_drop=lambda reason, count: lost.append(reason)))
    endpoint.meter.create_counter("c").add(1)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            endpoint.scrape()
        assert b"no such thing" in caught.value.read()
    endpoint.reader.broken = False
    assert b"c_total" in endpoint.scrape()[0]
    endpoint.provider.shutdown()
    assert lost == ["scrape_failed"]
    assert len(caplog.records) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_hanging_callback_does_not_hang_the_scrape():
    """It is answered with 503 after the timeout, and the next one too, without piling up threads; then all is well."""
    go_on, called = threading.Event(), []

    def slow(options):
        called.append(1)
        go_on.wait(60)
        return []

    endpoint = Endpoint(timeout=0.2)
    endpoint.meter.create_observable_gauge("slow", [slow])
    endpoint.meter.create_counter("c").add(1)
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            endpoint.scrape()
    assert called == [1]
    go_on.set()
    endpoint.reader._scrape.exception(60)  # over its time, the SDK lets that collection fail
    assert b"c_total" in endpoint.scrape()[0]
    endpoint.provider.shutdown()


def test_scrapes_at_the_same_time_are_all_answered(endpoint):
    """Prometheus may be doubled, and people look, too."""
    endpoint.meter.create_counter("c").add(1)
    bodies = []
    threads = [threading.Thread(target=lambda: bodies.append(endpoint.scrape()[0])) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies) == 16
    assert set(bodies) == {bodies[0]}


def test_a_client_that_breaks_off_leaves_no_trace(endpoint, capfd):
    """Neither a thread that waits nor a line on the console."""
    port = int(endpoint.reader.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
    assert endpoint.scrape()[0] == b""
    assert capfd.readouterr().err == ""


def test_shutdown_closes_the_port():
    """And ends the thread; a second call does nothing; then the port can be had again."""
    endpoint = Endpoint()
    port = endpoint.reader._server.server_port
    thread = endpoint.reader._thread
    endpoint.provider.shutdown()
    endpoint.reader.shutdown()
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    PrometheusReader(port=port).shutdown()


def test_a_port_in_use_is_told_with_a_remedy():
    """At construction, naming the setting and the port."""
    first = PrometheusReader(port=0)
    port = first._server.server_port
    with pytest.raises(SettingError, match=rf"prometheus_port={port}: .* in use; .*another port") as caught:
        PrometheusReader(port=port)
    assert caught.value.name == "prometheus_port"
    first.shutdown()


@pytest.mark.parametrize(
    ("host", "port", "name"),
    [
        (None, 70_000, "prometheus_port"),
        (None, "x", "prometheus_port"),
        ("192.0.2.1", 0, "prometheus_host"),
        ("no such host", 0, "prometheus_host"),
    ],
)
def test_an_address_that_cannot_work_is_told(host, port, name):
    """A wrong port, an address of another machine, a name that nobody knows."""
    with pytest.raises(SettingError) as caught:
        PrometheusReader(host, port)
    assert caught.value.name == name


def test_without_arguments_the_environment_says_where(monkeypatch):
    """The variables of the OpenTelemetry specification, so that OTEL_METRICS_EXPORTER=odibi_prometheus works."""
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "0.0.0.0")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", "0")
    reader = PrometheusReader()
    assert reader._server.server_address[0] == "0.0.0.0"
    assert reader.url.startswith("http://127.0.0.1:")
    reader.shutdown()
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", "many")
    with pytest.raises(SettingError, match="OTEL_EXPORTER_PROMETHEUS_PORT='many'"):
        PrometheusReader()


FORK = """
import os
from otel_odibi.exporters.prometheus import PrometheusReader
reader = PrometheusReader(port=0)
port = reader._server.server_port
to_child, from_child = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    os.read(to_child[0], 1)
    reader.shutdown()                       # does not wait for a thread that is not here
    os._exit(0)
reader.shutdown()
PrometheusReader(port=port).shutdown()      # the child has not kept it
os.write(to_child[1], b"x")
assert os.waitpid(pid, 0)[1] == 0
print("good")
"""


def test_a_forked_child_lets_go_of_the_port():
    """The parent serves on; when it stops, its port is free though the child lives."""
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert result.stdout == "good\n", result.stderr
