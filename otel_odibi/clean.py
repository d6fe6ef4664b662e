"""Makes any value safe to write: secrets redacted, long texts cut with a mark, odd types turned into plain ones.

Everything that leaves the process passes through a `Cleaner` first: log fields, span attributes, error texts.
Nothing here raises, whatever the value; all of it is pure and safe from any thread.
"""

from __future__ import annotations

import datetime
import enum
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from otel_odibi.facts import Failure

MAX_TEXT: Final = 65_536
"""Longest text kept, in characters; what is longer is cut and says so."""
MAX_NAME: Final = 1_024
"""Longest name (pipeline, node, layer, engine, key) kept, in characters."""
MAX_ITEMS: Final = 1_000
MAX_DEPTH: Final = 8
REDACTED: Final = "[redacted]"

_KEY_WORDS: Final = (
    r"passw(?:or)?d|passwd|passphrase|pwd|secret|token|api[_.-]?key|access[_.-]?key|account[_.-]?key|private[_.-]?key"
    r"|shared[_.-]?access[_.-]?(?:key|signature)|encryption[_.-]?key|client[_.-]?secret|auth[_.-]?key|authorization"
    r"|credential|connection[_.-]?string|conn[_.-]?str|cookie|session[_.-]?(?:id|key)|signing[_.-]?key"
)
# `dsn` and `sas` are secrets only as whole words: "dsn" is in "adsnap", "sas" in "disaster".
_SECRET_KEY: Final = re.compile(rf"(?:{_KEY_WORDS}|(?:^|[_.\-])(?:dsn|sas|pat|auth|otp|pin|jwt)(?:$|[_.\-]))", re.IGNORECASE)

_VALUE: Final = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s;,&"'\\)\]}]+)"""

# Each rule: what must be in the lower-cased text for the rule to be worth trying, the pattern, what takes its place.
# Substring search is a hundred times faster than the patterns, and nearly every text holds none of these.
_RULES: Final[tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...]] = (
    (("private key",), re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)", re.S), REDACTED),
    (("://",), re.compile(r"(\b[a-z][a-z0-9+.\-]*://[^\s:/@?#]*):[^\s/]+@", re.I), rf"\1:{REDACTED}@"),
    (("://",), re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^\s:/@?#]{16,}@", re.I), rf"\1{REDACTED}@"),
    (("bearer", "basic", "token", "digest"), re.compile(r"\b(bearer|basic|token|digest)\s+[\w.~+/=\-]{8,}", re.I), rf"\1 {REDACTED}"),
    (
        ("passw", "passphrase", "pwd", "secret", "token", "key", "sharedaccess", "shared_access", "authorization", "credential", "cookie", "session", "connection", "conn_str"),
        re.compile(rf"""((?:[\w.\-]*(?:{_KEY_WORDS})[\w.\-]*)["']?\s*(?:=>|[=:])\s*)(?!\[redacted\]){_VALUE}""", re.I),
        rf"\1{REDACTED}",
    ),
    (("password is", "password:", "--password", "--token", "--secret", "--api-key", "identified by"), re.compile(r"(--(?:password|token|secret|api-key)\s+|\bpassword is\s+|\bidentified by\s+)\S+", re.I), rf"\1{REDACTED}"),
    (("sig=", "signature="), re.compile(r"((?:^|[?&;\s])(?:sig|x-amz-signature|x-goog-signature|signature)=)[^&\s\"']+", re.I), rf"\1{REDACTED}"),
    (("eyj",), re.compile(r"\beyJ[\w\-]{5,}\.[\w\-]{5,}(?:\.[\w\-]*)*"), REDACTED),
    (("akia", "asia", "abia", "acca"), re.compile(r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b"), REDACTED),
    (("gh", "github_pat_"), re.compile(r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,})"), REDACTED),
    (("glpat-", "gldt-", "glrt-"), re.compile(r"\bgl(?:pat|dt|rt)-[\w\-]{15,}"), REDACTED),
    (("xox", "xapp-"), re.compile(r"\b(?:xox[a-z]|xapp)-[\w\-]{10,}"), REDACTED),
    (("hooks.slack", "webhook.office", "discord"), re.compile(r"(hooks\.slack\.com/(?:services|workflows)/|webhook\.office\.com/webhookb2/|discord(?:app)?\.com/api/webhooks/)[^\s\"']+", re.I), rf"\1{REDACTED}"),
    (("sk-", "sk_", "rk_", "pk_live", "whsec_"), re.compile(r"\b(?:sk-[\w\-]{16,}|[sr]k_(?:live|test)_\w{10,}|pk_live_\w{10,}|whsec_\w{10,})"), REDACTED),
    (("aiza", "ya29.", "gocspx"), re.compile(r"\b(?:AIza[\w\-]{30,}|ya29\.[\w\-]{20,}|GOCSPX-[\w\-]{20,})"), REDACTED),
    (("dapi", "dkea", "dose"), re.compile(r"\b(?:dapi|dkea|dose)[0-9a-f]{32}(?:-\d)?\b"), REDACTED),
    (("npm_", "pypi-", "hf_", "dop_v1_", "doo_v1_", "shpat_", "shpss_", "hvs.", "atatt", "lin_api_", "nrak-", "sntrys_", "glsa_", "glc_", "figd_", "pul-", "dckr_pat_", "rubygems_"),
     re.compile(r"\b(?:npm_\w{20,}|pypi-[\w\-]{20,}|hf_\w{20,}|do[op]_v1_\w{20,}|shp(?:at|ss)_\w{20,}|hvs\.[\w\-]{20,}|ATATT[\w\-=]{20,}|lin_api_\w{20,}"
                r"|NRAK-\w{20,}|sntrys_[\w=\-+/]{20,}|gl(?:sa|c)_\w{20,}|figd_[\w\-]{20,}|pul-\w{20,}|dckr_pat_[\w\-]{20,}|rubygems_\w{20,})"), REDACTED),
    (("sg.",), re.compile(r"\bSG\.[\w\-]{16,}\.[\w\-]{16,}"), REDACTED),
    (("8q~", "7q~"), re.compile(r"\b[\w.~\-]{3}[78]Q~[\w.~\-]{31,34}"), REDACTED),
    ((":aa",), re.compile(r"\b\d{8,10}:AA[\w\-]{30,}"), REDACTED),
)  # fmt: skip

# No rule can match a short text without one of these; most short texts are spared all the rest by this one search.
_SUSPICIOUS: Final = re.compile(r"[=:@]|\S{16}|--|bearer|basic|token|digest|password|identified", re.IGNORECASE)


def plain_text(text: str) -> str:
    """Return `text` without lone surrogates, which no UTF-8 file can hold; pairs are joined, the rest become U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """Return `text`, at most `limit` characters of it; a cut text ends with a mark that says how much is gone."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}…[cut {len(text) - limit} characters]"


def clean_name(name: object) -> str:
    """Return `name` as a name that every format can hold: text, no lone surrogates, at most 1,024 characters."""
    return cut(plain_text(name if type(name) is str else _describe(name)), MAX_NAME)


def error_type(exc: BaseException | type[BaseException]) -> str:
    """Return the value of `error.type`: the class's qualified name, without `builtins.`.

    Source: OpenTelemetry semantic conventions, Recording errors.
    """
    cls = exc if isinstance(exc, type) else type(exc)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


class Cleaner:
    """Redacts and bounds values. Immutable after construction; never raises; safe from any thread.

    `keys` are further names whose values are secret (compared without case); `patterns` are further regular
    expressions whose matches are.
    """

    __slots__ = ("_keys", "_patterns", "_secret_keys")

    def __init__(self, keys: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
        self._keys = frozenset(key.lower() for key in keys)
        self._patterns = tuple(re.compile(pattern) for pattern in patterns)
        self._secret_keys: dict[str, bool] = {}

    def is_secret_key(self, key: str) -> bool:
        """Tell whether a value under this key is a secret, by the key alone."""
        known = self._secret_keys.get(key)
        if known is None:
            known = key.lower() in self._keys or _SECRET_KEY.search(key) is not None
            if len(self._secret_keys) < 10_000:
                self._secret_keys[key] = known
        return known

    def text(self, text: str, limit: int = MAX_TEXT) -> str:
        """Return `text` with secrets redacted, lone surrogates replaced and at most `limit` characters kept.

        Four times the limit is looked at, so that a secret on the cut is found, and 10 MB cost no more than 256 kB.
        """
        length = len(text)
        if length > 4 * limit:
            text = text[: 4 * limit]
        text = plain_text(text)
        if length < 256 and not self._patterns and not _SUSPICIOUS.search(text):
            return text
        lowered = text.lower()
        for needles, pattern, replacement in _RULES:
            if any(needle in lowered for needle in needles):
                text = pattern.sub(replacement, text)
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        if length > 4 * limit:
            return f"{text[:limit]}…[cut {length - limit} characters]"
        return cut(text, limit)

    def value(self, value: Any, key: str = "", depth: int = 0) -> Any:
        """Return `value` as something JSON can hold, cleaned all through. Tables and arrays become their shape."""
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else str(value)
        if key and self.is_secret_key(key):
            return REDACTED
        if kind is str:
            return self.text(value)
        try:
            return self._other(value, depth)
        except Exception as exc:  # noqa: BLE001 - a value's own methods may raise anything
            return f"<{kind.__name__}: {type(exc).__name__} while reading>"

    def _other(self, value: Any, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            return self.value(value.value, depth=depth + 1)
        if isinstance(value, (str, int, float)):  # subclasses
            base = str if isinstance(value, str) else int if isinstance(value, int) else float
            return self.value(base(value))
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._bytes(bytes(value[: 4 * MAX_TEXT]), len(value))
        if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
            return value.isoformat()
        if isinstance(value, BaseException):
            return self.text(f"{error_type(value)}: {message_of(value)}")
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple):
            return value.item() if shape == () else f"<{kind_name(value)} shape={shape}>"
        if depth >= MAX_DEPTH:
            return f"<{kind_name(value)}: too deep or circular>"
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, (Sequence, set, frozenset)):
            items = [self.value(item, depth=depth + 1) for _, item in zip(range(MAX_ITEMS), value, strict=False)]
            return items if len(value) <= MAX_ITEMS else [*items, f"…[cut {len(value) - MAX_ITEMS} items]"]
        return self.text(_describe(value))

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for _, (key, item) in zip(range(MAX_ITEMS), value.items(), strict=False):
            name = clean_name(key)
            out[name] = self.value(item, name, depth + 1)
        if len(value) > MAX_ITEMS:
            out["…"] = f"[cut {len(value) - MAX_ITEMS} items]"
        return out

    def _bytes(self, value: bytes, length: int) -> str:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return f"<{length} bytes>"
        return self.text(text) if length <= len(value) else self.text(text + " " * (length - len(value)))

    def attribute(self, key: str, value: Any) -> str | bool | int | float | list[Any]:
        """Return `value` as an OpenTelemetry attribute value: a scalar or a list of scalars of one type.

        What OpenTelemetry cannot hold portably (None, maps, mixed lists) becomes JSON text.
        Source: OpenTelemetry specification, Attribute.
        """
        cleaned = self.value(value, key)
        if isinstance(cleaned, (str, bool, int, float)):
            return cleaned
        if isinstance(cleaned, list) and len({type(item) for item in cleaned}) <= 1:
            if all(isinstance(item, (str, bool, int, float)) for item in cleaned):
                return cleaned
        return to_json(cleaned).decode()

    def failure(self, exc: BaseException) -> Failure:
        """Return what may be written of `exc`: its type, message and stack trace (no local variables)."""
        try:
            stack = "".join(traceback.format_exception(type(exc), exc, exc.__traceback__))
        except Exception:  # noqa: BLE001 - an exception's own __str__ may raise
            stack = ""
        return Failure(error_type(exc), self.text(message_of(exc)), self.text(stack))


DEFAULT: Final = Cleaner()


def message_of(exc: BaseException) -> str:
    """Return `str(exc)`, or a placeholder where that raises or is no text."""
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 - an exception's own __str__ may raise
        return f"<{type(exc).__name__}: message could not be read>"


def kind_name(value: object) -> str:
    """Return the type's name with its top package: `pandas.DataFrame`, `MyClass` for builtins and `__main__`."""
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    return cls.__qualname__ if package in ("builtins", "__main__") else f"{package}.{cls.__qualname__}"


def to_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8. For values a `Cleaner` returned; anything it missed becomes text, NaN null."""
    try:
        return orjson.dumps(value, default=_describe)
    except (TypeError, ValueError, RecursionError):
        return orjson.dumps(Cleaner().value(value))


def _describe(value: object) -> str:
    try:
        text = str(value)
    except Exception as exc:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"<{type(value).__name__}: {type(exc).__name__} while reading>"
    return text if type(text) is str else f"<{type(value).__name__}>"
