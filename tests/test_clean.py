"""The cleaner: secrets are redacted, plain data is not, and any value at all becomes something that can be written."""

from __future__ import annotations

import collections
import datetime
import decimal
import json
import math
import uuid
from unittest import mock

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import Hostile, Layer, Unreadable, keys, ring, values
from secret_samples import PLAIN, SECRETS, leaked

from otel_odibi.clean import (
    DEFAULT,
    MAX_ITEMS,
    MAX_NAME,
    MAX_TEXT,
    REDACTED,
    Cleaner,
    clean_name,
    cut,
    error_type,
    kind_name,
    message_of,
    plain_text,
    to_json,
)

WRAPPINGS = {
    "plain": str,
    "in a sentence": lambda text: f"job 7 failed, see below\n  {text}\nend",
    "in a long text": lambda text: f"{'word ' * 100}{text}{' word' * 100}",
    "in JSON": lambda text: json.dumps({"message": text, "n": 1}),
    "in JSON in JSON": lambda text: json.dumps(json.dumps({"message": text})),
    "in Python's repr": lambda text: repr({"a": [text, 1]}),
    "in the repr of bytes": lambda text: repr(text.encode()),
}


# --- secrets by pattern ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_secrets_of_every_shape_are_redacted_wherever_they_stand(wrapping):
    """No piece of a secret is left, whatever text it is embedded in, and the mark tells that there was one."""
    for shape, (text, secrets) in SECRETS.items():
        cleaned = DEFAULT.text(WRAPPINGS[wrapping](text))
        assert not leaked(secrets, cleaned), shape
        assert REDACTED in cleaned, shape


@pytest.mark.parametrize("text", PLAIN)
def test_plain_data_is_left_alone(text):
    """Words, numbers, hashes, paths and addresses stay as they are, though some look like secrets from afar."""
    assert DEFAULT.text(text) == text
    assert DEFAULT.text(f"{text}\n{'word ' * 100}") == f"{text}\n{'word ' * 100}"


@pytest.mark.parametrize("shape", SECRETS)
def test_cleaning_twice_changes_nothing_more(shape):
    """Values are cleaned where they enter and again where they leave; marks stay as they are."""
    once = DEFAULT.text(SECRETS[shape][0])
    assert DEFAULT.text(once) == once


def test_what_surrounds_a_secret_stays():
    """The reader still sees which connection or key was meant."""
    url, _ = SECRETS["url"]
    assert DEFAULT.text(url) == "cannot connect to postgresql://etl:[redacted]@db.example.com:5432/warehouse"
    odbc, _ = SECRETS["odbc"]
    assert DEFAULT.text(odbc) == "Driver={ODBC Driver 18};Server=db;Uid=sa;Pwd=[redacted];Encrypt=yes"
    yaml, _ = SECRETS["yaml"]
    assert DEFAULT.text(yaml) == "db:\n  user: etl\n  password: [redacted]\n  port: 5432"


def test_own_patterns_and_keys_are_redacted_too():
    """Patterns are taken as they are; keys without regard to case, and only whole."""
    cleaner = Cleaner(keys=("Customer",), patterns=(r"\bC-\d{4}\b",))
    assert cleaner.text("order of C-1234") == f"order of {REDACTED}"
    assert cleaner.value("Ann", "CUSTOMER") == REDACTED
    assert cleaner.value("Ann", "customer_name") == "Ann"


@pytest.mark.parametrize(
    "hostile",
    [
        "a", "token", "token='", 'token=\\"', "token={", "://", "a://a:", "a:b@", "--token ", "eyJ-", "curl -u ",
        "<token", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "sk-", "password: |\n ", "cookie:",
        "authorization: ",
    ],
)  # fmt: skip
def test_a_text_made_to_be_slow_is_cleaned_in_a_moment(hostile):
    """Patterns that backtrack would take hours for these."""
    assert DEFAULT.text(hostile * (40_000 // len(hostile)))


def test_a_secret_on_the_cut_does_not_leak_its_first_half():
    """Neither where a long text is cut, nor where a very long one is cut before it is looked at."""
    token = f"ghp_{'a1B2' * 9}"
    for length in range(MAX_TEXT - 50, MAX_TEXT, 7):
        assert "ghp_" not in DEFAULT.text(" " * length + token)
    shrinking = "token=" + "x" * (4 * MAX_TEXT - 50) + f" {token}" + "x" * 100
    assert "ghp_" not in DEFAULT.text(shrinking)


# --- secrets by key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "password", "PASSWORD", "db_password", "passwd", "pwd", "passphrase", "smtp_pass", "secret", "clientSecret",
        "client_secret", "token", "authToken", "access_token", "apiKey", "api-key", "x-api-key", "API_KEY",
        "account_key", "AccountKey", "private_key", "ssh_key", "SharedAccessKey", "shared_access_signature",
        "authorization", "Proxy-Authorization", "credentials", "gcp_credential", "connection_string", "conn_str",
        "cookie", "Set-Cookie", "session_id", "dsn", "sentry_dsn", "sas", "blob.sas", "auth", "otp", "pin", "jwt",
        "pat",
    ],
)  # fmt: skip
def test_values_under_a_secret_name_are_redacted_whole(key):
    """Whatever the value is: text, bytes, a number, a list, an object."""
    for value in ("abc", b"abc", 1234, ["a"], {"a": "b"}, Hostile(), decimal.Decimal(1)):
        assert DEFAULT.value(value, key) == REDACTED
        assert DEFAULT.value({"a": [{key: value}]}) == {"a": [{key: REDACTED}]}
    assert DEFAULT.value(None, key) is None
    assert DEFAULT.value(True, key) is True


@pytest.mark.parametrize(
    "key",
    [
        "rows", "key", "cache_key", "primary_key", "partition_key", "monkey", "path", "author", "authored", "compass",
        "passes", "passenger", "tokenizer", "tokenized_rows", "secretary", "disaster", "adsnap", "spinning", "patient",
        "keyboard", "sessions", "basic", "opinion", "desaster", "assassin",
    ],
)  # fmt: skip
def test_values_under_other_names_are_kept(key):
    """A name that merely contains a short word of the list is no secret."""
    assert DEFAULT.value("abc", key) == "abc"


@pytest.mark.parametrize("key", ["tokens", "token_count", "max_tokens", "password_length", "token_ttl_seconds"])
def test_a_number_that_counts_secrets_is_no_secret(key):
    """A language model's token counts are plain data."""
    assert DEFAULT.value(1204, key) == 1204
    assert DEFAULT.value("1204", key) == REDACTED


# --- any value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        (2**63 - 1, 2**63 - 1),
        (2**63, str(2**63)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (10**5000, "<int of 16610 bits>"),
        (b"abc", "abc"),
        (b"\xff\xfe", "<2 bytes>"),
        (memoryview(bytearray(b"abc")), "abc"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc), "2026-01-02T03:04:05+00:00"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.timedelta(seconds=90), "0:01:30"),
        (decimal.Decimal("1.50"), "1.50"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (Layer.RAW, "raw"),
        (Layer.LOGIN, f"password={REDACTED}"),
        (ValueError("bad token=abcdef123"), f"ValueError: bad token={REDACTED}"),
        (Unreadable(), "odd_values.Unreadable: <Unreadable: RuntimeError while reading>"),
        ((1, "a", None), [1, "a", None]),
        ({1: {"b": (2,)}}, {"1": {"b": [2]}}),
        (collections.deque([1, 2]), [1, 2]),
        ("a\ud800b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ({"\ud800": 1}, {"\ufffd": 1}),
        (np.float64(1.5), 1.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.bytes_(b"a"), "a"),
        (np.datetime64("2026-01-02T03:04:05.123456789"), "2026-01-02T03:04:05.123456789"),
        (np.dtype("int64"), "int64"),
        (np.array(b"token=abcdef123"), f"token={REDACTED}"),
        (np.zeros((2, 3)), "<numpy.ndarray shape=(2, 3)>"),
        (pd.Timestamp("2026-01-02"), "2026-01-02T00:00:00"),
        (pd.NaT, "NaT"),
        (pd.NA, "<NA>"),
        (pd.DataFrame({"cell": ["private"]}), "<pandas.DataFrame shape=(1, 1)>"),
        (pd.Series(["private"]), "<pandas.Series shape=(1,)>"),
        (pl.DataFrame({"cell": ["private"]}), "<polars.DataFrame shape=(1, 1)>"),
        (pa.table({"cell": ["private"]}), "<pyarrow.Table shape=(1, 1)>"),
        (pa.array(["private"]), "<pyarrow.StringArray>"),
        (pa.chunked_array([["private"]]), "<pyarrow.ChunkedArray>"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_odd_values_become_plain_ones(value, cleaned):
    """Numbers stay numbers where JSON can hold them; tables tell their shape and never their cells."""
    assert DEFAULT.value(value) == cleaned
    assert DEFAULT.value({"nested": [value]}) == {"nested": [cleaned]}


def test_a_query_that_has_not_run_is_not_run():
    """A relation of duckdb would execute to tell its shape; whatever looks like one is named only."""

    class Relation:
        __arrow_c_stream__ = None
        shape = property(lambda self: pytest.fail("the query ran"))

        def __str__(self):
            return pytest.fail("the query ran")

    assert DEFAULT.value(Relation()).startswith("<")


def test_an_object_that_fails_in_every_way_is_named():
    """Its `str()`, attributes and comparisons may raise: the value says so, and nothing else suffers."""
    assert DEFAULT.value([1, Hostile()]) == [1, "<Hostile: RuntimeError while reading>"]
    assert clean_name(Hostile()) == "<Hostile: RuntimeError while reading>"
    assert DEFAULT.value(mock.MagicMock(name="thing"))


def test_values_that_hold_themselves_come_to_an_end():
    """Also those that hold themselves a thousand times, which would be 10^24 items at a depth of eight."""
    assert "too deep or circular" in json.dumps(DEFAULT.value(ring()))
    wide: list[object] = []
    wide.extend([wide] * 1_000)
    wheel: dict[str, object] = {}
    wheel.update({str(i): wheel for i in range(1_000)})
    for value in (wide, wheel):
        assert len(to_json(DEFAULT.value(value))) < 1_000_000


def test_values_as_long_as_allowed_are_whole_and_longer_ones_carry_a_mark():
    """64 kB of text, 1,024 characters of name and 1,000 items are kept; a mark says how much is gone."""
    assert DEFAULT.value("x" * MAX_TEXT) == "x" * MAX_TEXT
    assert clean_name("é" * MAX_NAME) == "é" * MAX_NAME
    assert DEFAULT.value(list(range(MAX_ITEMS))) == list(range(MAX_ITEMS))
    assert DEFAULT.value("x" * (MAX_TEXT + 1)) == "x" * MAX_TEXT + "…[cut 1 characters]"
    assert DEFAULT.value("x" * 10_000_000) == "x" * MAX_TEXT + "…[cut 9934464 characters]"
    assert DEFAULT.value(b"x" * 10_000_000) == "x" * MAX_TEXT + "…[cut 9934464 characters]"
    assert clean_name("x" * 2_000) == "x" * MAX_NAME + "…[cut 976 characters]"
    assert DEFAULT.value(list(range(1_010)))[998:] == [998, "…[cut 11 items]"]
    assert DEFAULT.value(range(10**12))[-1] == "…[cut 999999999001 items]"
    assert list(DEFAULT.value(dict.fromkeys(range(1_010))).items())[998:] == [("998", None), ("…", "[cut 11 items]")]


@pytest.mark.parametrize(
    "value", ["x" * 70_000, "x" * 10_000_000, ["x"] * 1_500, dict.fromkeys(map(str, range(1_500)), 1)]
)
def test_a_cut_value_is_not_cut_again(value):
    """The mark keeps telling the truth when a value is cleaned a second time on its way out."""
    once = DEFAULT.value(value)
    assert DEFAULT.value(once) == once


def test_bytes_are_not_made_longer_to_tell_their_length():
    """The memory that cleaning takes does not grow with the value."""
    assert DEFAULT.text("abc", length=10**15) == "…[cut 1000000000000000 characters]"
    assert cut("abc", 2, length=10**15) == "ab…[cut 999999999999998 characters]"


@settings(deadline=None)
@given(values)
def test_any_value_becomes_valid_json(value):
    """UTF-8 that every JSON parser reads; what is clean stays as it is when cleaned again."""
    cleaned = DEFAULT.value(value)
    parsed = json.loads(to_json(cleaned).decode("utf-8", "strict"), parse_constant=pytest.fail)
    assert DEFAULT.value(parsed) == parsed


@settings(deadline=None)
@given(keys, values)
def test_any_value_becomes_an_attribute(key, value):
    """A scalar or a list of scalars of one type: what OpenTelemetry can carry."""
    attribute = DEFAULT.attribute(clean_name(key), value)
    items = attribute if isinstance(attribute, list) else [attribute]
    assert {type(item) for item in items} <= {str, bool, int, float}
    assert len({type(item) for item in items}) <= 1
    assert all(-(2**63) <= item < 2**63 for item in items if type(item) is int)
    assert all(item == plain_text(item) for item in items if type(item) is str)


@settings(deadline=None)
@given(st.text() | st.text(st.characters(categories=("Cs", "Ll", "Nd"))))
def test_any_name_becomes_text_in_utf_8(name):
    """Names without secrets come out as they went in, save lone surrogates."""
    assert clean_name(name).encode() == name.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


@pytest.mark.parametrize(
    ("value", "attribute"),
    [
        ([1, 2], [1, 2]),
        ((), []),
        ({"a", }, ["a"]),
        ([1, "a"], '[1,"a"]'),
        ([True, 1], "[true,1]"),
        ([None], "[null]"),
        ({"a": {"b": 1}}, '{"a":{"b":1}}'),
        (None, "null"),
        (math.inf, math.inf),
    ],
)  # fmt: skip
def test_attributes_that_opentelemetry_cannot_hold_become_json(value, attribute):
    """Maps, mixed lists and None are carried as JSON text."""
    assert DEFAULT.attribute("k", value) == attribute


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_failure_tells_type_message_and_stack_but_no_variables():
    """Secrets in the message go, and the values of local variables never come in."""
    hidden_local = "topsecretlocal" + "value"
    try:
        raise ValueError(f"cannot open {SECRETS['url'][0]}, {len(hidden_local)}")
    except ValueError as exc:
        failure = DEFAULT.failure(exc)
    assert failure.type == "ValueError"
    assert failure.message.startswith("cannot open cannot connect to postgresql://etl:[redacted]@db")
    assert "test_a_failure_tells_type" in failure.stacktrace
    assert "topsecretlocalvalue" not in failure.stacktrace
    assert not leaked(SECRETS["url"][1], failure.stacktrace)


def test_an_exception_that_cannot_be_read_is_still_a_failure():
    """Its type tells what it was."""
    failure = DEFAULT.failure(Unreadable())
    assert failure.type == "odd_values.Unreadable"
    assert failure.message == message_of(Unreadable()) == "<Unreadable: RuntimeError while reading>"


def test_error_types_are_qualified_names_without_builtins():
    """As the semantic conventions have it; a class may carry any name at all."""
    assert error_type(KeyError("x")) == "KeyError"
    assert error_type(json.JSONDecodeError) == "json.decoder.JSONDecodeError"
    assert error_type(type("E" * 2_000, (Exception,), {"__module__": "builtins"})).endswith("…[cut 976 characters]")
    assert kind_name(pd.DataFrame()) == "pandas.DataFrame"
