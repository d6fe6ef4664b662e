"""Makes any value safe to write: secrets redacted, long texts cut with a mark, odd types turned into plain ones.

Everything that leaves the process passes through a `Cleaner` first: log fields, span attributes, error texts, names.
Nothing here raises, whatever the value; all of it is pure and safe from any thread.
"""

from __future__ import annotations

import base64
import datetime
import enum
import functools
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
"""Most items kept of one list or map."""
MAX_TOTAL: Final = 10_000
"""Most items kept of one value with all that is nested in it: a list that holds itself twice would have no end."""
MAX_DEPTH: Final = 8
REDACTED: Final = "[redacted]"
_CUT_CHARACTERS: Final = " characters]"

# --- what secrets look like ------------------------------------------------------------------------------------------
# Every repetition is bounded, or ends at what it excludes: no text takes more time than its length warrants.

_WORDS: Final = (
    r"passw(?:or)?d|passphrase|pwd|secret(?!ar)|token(?!i[sz])|credential|cookie|authorization|connection[_.-]?string"
    r"|(?:api|access|account|private|encryption|auth|signing|master|storage|subscription|consumer|ssh|hmac)[_. -]?key"
    r"|shared[_.-]?access[_.-]?(?:key|signature)|conn[_.-]?str|session[_.-]?(?:id|key)"
    r"|(?:db|pg|sql|user|root|admin|login|mail|smtp|ftp|http|proxy|ldap|auth)[_.-]?pass(?![\w-])"
)
# `dsn` and `sas` are secrets only as whole words: "dsn" is in "adsnap", "sas" in "disaster".
_SECRET_KEY: Final = re.compile(
    rf"{_WORDS}|(?:^|[_.-])(?:dsn|sas|pat|auth|otp|pin|jwt|creds)(?:$|[_.-])", re.IGNORECASE
)
_COUNT_KEY: Final = re.compile(
    r"(?:token|cookie|secret|password|key)s$|(?<!ac)count$|length$"
    r"|[_.-](?:size|len|max|min|ttl|expires|age|seconds|limit|time|rate|version|index|budget|days|attempts)(?:$|[_.-])",
    re.IGNORECASE,
)
"""Names under which a number is just that, though they speak of secrets: max_tokens, password_length."""

_QUOTED: Final = (
    r"""[bBrRuUfF]{0,2}(?:"{3}[^"]{1,4096}(?:"{3}|\Z)|'{3}[^']{1,4096}(?:'{3}|\Z)"""
    # A closing quote with a letter right behind it is inside, of a text whose backslashes were doubled.
    r"""|"[^"\\]*(?:\\[\s\S][^"\\]*)*(?:"(?=\w)[^"]{0,4096})?(?:"|\Z)"""
    r"""|'[^'\\]*(?:\\[\s\S][^'\\]*)*(?:'(?=\w)[^']{0,4096})?(?:'|\Z))"""
)
_ESCAPED: Final = (  # JSON within JSON
    r"""(?P<quote>(?:\\{1,20}["']){3}|\\{1,20}["'])[\s\S]{0,4096}?(?<!\\)(?P=quote)|\\{1,20}["'][^"'\\]{1,4096}"""
)
_BARE: Final = r"""[^\s"'\\,;&)\]}]+"""
_VALUE: Final = (
    rf"{_QUOTED}|{_ESCAPED}"
    r"|[\w.]{0,60}\([^()]{0,1024}\)|\{[^{}]{0,1024}\}|\[[^\[\]]{0,1024}\]"  # Secret('x'), {x}, ['x']
    r"|[|>][+\-]?[ \t]{0,8}(?:\n|\\{1,20}n)(?:[ \t]{1,40}[^\n:\\]{1,4096}(?:\n|\\{1,20}n|\Z)){1,99}"  # a block of YAML
    # A comma, bracket or quote belongs to a bare value where neither white space nor a new pair follows it.
    rf"""|{_BARE}(?:(?:;(?![\w. -]{{0,40}}=)|[,&](?![\w.-]{{0,40}}["']?[=:])"""
    rf"""|[)\]}}"'](?=\w)|\\(?!["'nrt\\])){_BARE})*"""
)
_PAIR_KEY: Final = (
    rf"""(?:{_WORDS})[\w.-]{{0,64}}[\\"'\])]{{0,24}}[ \t]{{0,8}}(?:=>|:=|={{1,2}}|:|%3[ad])[ \t]{{0,8}}"""
)
_PAIR_THERE: Final = re.compile(_PAIR_KEY)  # for lower-cased text: three times as fast as without case
_HARMLESS: Final = re.compile(
    r"""[bBrRuUfF]?\\*["']?(?:\[redacted\]|none|null|nan|true|false|\*+|)\\*["']?""", re.IGNORECASE
)
_STATES: Final = r"(?!(?:required|invalid|incorrect|wrong|empty|missing|expired|too|not|set|unset|weak|correct)\b)"
_LINE: Final = r"[^\n]{0,256}?\s"


def _hide_pair(match: re.Match[str]) -> str:
    """Redact the value of a pair, unless it tells nothing or counts something."""
    key, value = match["key"], match["value"]
    is_count = value.replace(".", "").isdigit() and _COUNT_KEY.search(key.rstrip("\\\"'])=:> \t"))
    return match[0] if is_count or _HARMLESS.fullmatch(value) else key + REDACTED


def _hide_basic(match: re.Match[str]) -> str:
    """Redact what follows the word "basic" if it is `user:password` in Base64."""
    try:
        text = base64.b64decode(match[2] + "==").decode()
    except ValueError:
        return match[0]
    return match[1] + REDACTED if ":" in text and text.isprintable() else match[0]


def _rule(needles: str, pattern: str, replacement: Any = REDACTED) -> tuple[tuple[str, ...], re.Pattern[str], Any]:
    """Make a rule: what must be in the lower-cased text for it to be worth trying, the pattern, what takes its place.

    Substring search is a hundred times faster than the patterns, and nearly every text holds none of the needles.
    """
    return tuple(needles.split("|")), re.compile(pattern), replacement


_AFTER: Final = rf"\1{REDACTED}"
_AT: Final = rf"\1{REDACTED}@"
_RULES: Final = (
    _rule(
        "private key",
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[\s\S]*?-----END [A-Z ]{1,60}-----|[\s\S]*)",
    ),
    # headers
    _rule("cookie", r"""(?i)(\b(?:set-)?cookie[ \t]{0,8}[:=][ \t]{0,8})[^"'\r\n]+""", _AFTER),
    _rule(
        "authorization",
        r"""(?i)(authorization[\\"']{0,4}\s{0,8}[:=,]\s{0,8}[\\"']{0,4})"""
        r"""(?:(?:aws4|digest|oauth|hmac|signature|hawk)[^\r\n]+|[\w-]{1,40}[ ]{1,8}[^\s"'\\,;)\]}]+)""",
        _AFTER,
    ),
    _rule("bearer", r"(?i)(\bbearer\s{1,8})(?=\S{0,200}[\d=]|\S{24})[\w.~+/=-]{8,}", _AFTER),
    _rule("basic", r"(?i)(\bbasic\s{1,8})([\w+/]{8,})={0,2}", _hide_basic),
    _rule(
        "token",
        r"(?i)(\btoken\s{1,8})(?=\S{0,200}\d)(?![\d:.TZ-]{1,200}(?:[\s,;]|\Z))[\w.~+/=-]{16,}",
        _AFTER,
    ),
    # URLs and connection strings
    _rule("://", r"""(://[^\s:/?#\[\]"'<>]{0,256}:)(?:[^\s/"<>]{1,512}|(?!\d{1,5}[/?#])[^\s"<>]{1,512}?)@""", _AT),
    _rule("://", r"""((?<!abfs)(?<!abfss)(?<!wasb)(?<!wasbs)://)[^\s:/@?#"'<>]{16,256}@""", _AT),
    _rule("jdbc:oracle", r"(?i)(jdbc:oracle:\w{1,10}:[^\s/@]{1,128}/)[^\s@]{1,256}@", _AT),
    _rule(
        "@",
        r"""(?<![\w.%+/-])([\w.%+-]{1,64}:)[^\s:/@"']{1,128}@(?!sha\d)(?=(?:tcp|unix)\(|[\w.-]{1,253}(?::\d{1,5}\b|/))""",
        _AT,
    ),
    _rule("sig=|signature=", r"(?i)(\b(?:sig|signature)=)[\w%+/=-]{20,}", _AFTER),
    # pairs of name and value
    _rule(
        "passw|passphrase|pwd|pass|secret|token|key|credential|authorization|cookie|connection|conn|sharedaccess|session",
        rf"(?i)(?P<key>{_PAIR_KEY})(?P<value>{_VALUE})",
        _hide_pair,
    ),
    _rule(
        "',|\",",
        rf"""(?i)(\([bu]?(?P<q>["'])[\w. -]{{0,60}}?(?:{_WORDS})[\w. -]{{0,60}}(?P=q),\s{{0,4}})"""
        rf"""{_QUOTED}(?=\s{{0,4}}\))""",
        _AFTER,
    ),
    _rule(
        "</",
        rf"(?i)(<[\w:.-]{{0,40}}?(?:{_WORDS})[\w:.-]{{0,40}}(?:\s[^<>]{{0,256}})?>)(?:<!\[CDATA\[)?[^<]{{1,4096}}(?=</)",
        _AFTER,
    ),
    # command lines, SQL, sentences
    _rule(
        "--",
        rf"""(?i)((?<![\w-])--[\w-]{{0,40}}?(?:{_WORDS})[\w-]{{0,40}}["']?,?\s{{1,8}})(?!-|\[redacted)(?:{_QUOTED}|[^\s"',\]]+)""",
        _AFTER,
    ),
    _rule("curl", rf"""(?i)(\bcurl\s{_LINE}?(?:-u|--user)\s{{0,4}}["']?[^\s:"']{{1,128}}:)[^\s"']+""", _AFTER),
    _rule("mysql", rf"(?i)(\bmysql\w{{0,10}}{_LINE}-p)\S+", _AFTER),
    _rule("sshpass", r"(?i)(\bsshpass\s{1,4}-p\s{0,4})\S+", _AFTER),
    _rule("identified by", r"(?i)(\bidentified by\s{1,8})\S+", _AFTER),
    _rule("login", r"(?i)(\blogin\s{1,8}\S{1,128}\s{1,8}password\s{1,8})\S+", _AFTER),
    _rule("passw|pwd|secret", rf"(?i)(\b(?:password|passwd|pwd|secret)\s{{1,8}})(?=[\"']){_QUOTED}", _AFTER),
    _rule("password is", rf"(?i)(\bpassword is\s{{1,8}}){_STATES}\S+", _AFTER),
    # tokens that show their maker
    _rule("eyj", r"(?<![\w-])eyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*){0,3}"),
    _rule("akia|asia|abia|acca", r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b"),
    _rule("gh|github_pat_", r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,})"),
    _rule("glpat-|gldt-|glrt-", r"\bgl(?:pat|dt|rt)-[\w-]{15,}"),
    _rule("xox|xapp-", r"\b(?:xox[a-z]|xapp)-[\w-]{10,}"),
    _rule(
        "hooks.slack|webhook.office|discord",
        r"(?i)(\b(?:hooks\.slack\.com/(?:services|workflows)|webhook\.office\.com/webhookb2|discord(?:app)?\.com/api/webhooks)/)"
        r"[^\s\"']+",
        _AFTER,
    ),
    _rule("sk-", r"\bsk-(?:[a-z]{2,8}\d{0,2}-){0,2}(?=[A-Za-z_-]{0,60}\d)[\w-]{20,}"),
    _rule("_live_|_test_|whsec_", r"\b(?:[srp]k_(?:live|test)|whsec)_\w{10,}"),
    _rule("aiza|ya29.|gocspx", r"\b(?:AIza[\w-]{30,}|ya29\.[\w.-]{20,}|GOCSPX-[\w-]{20,})"),
    _rule("dapi|dkea|dose", r"\b(?:dapi|dkea|dose)[0-9a-f]{32}(?:-\d)?\b"),
    _rule(
        "npm_|hf_|dckr_pat_|glsa_",
        r"\b(?:npm_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,}|dckr_pat_[\w-]{20,}|glsa_[A-Za-z0-9]{32}\w*)",
    ),
    _rule(
        "pypi-ag|hvs.|atatt|sg.",
        r"\b(?:pypi-Ag[\w-]{20,}|hvs\.[\w-]{20,}|ATATT[\w=-]{20,}|SG\.[\w-]{16,64}\.[\w-]{16,})",
    ),
    _rule("do|shp", r"\b(?:do[opr]_v1_[0-9a-f]{32,}|shp(?:at|ss|ca|pa)_[0-9a-f]{20,})"),
    _rule("8q~|7q~", r"(?<![\w.~-])[\w.~-]{3}[78]Q~[\w.~-]{31,34}"),
    _rule(":aa", r"(?<!\d)\d{8,10}:AA[\w-]{30,}"),
)
_NEEDLES: Final = tuple((needle, number) for number, rule in enumerate(_RULES) for needle in rule[0])
# No rule can match a short text without one of these; most short texts are spared all the rest by this one search.
_SUSPICIOUS: Final = re.compile(
    r"""[=:@]|\S{16}|--|['"],|</|bearer|basic|token|passw|pwd|secret|identified|curl|mysql|sshpass""", re.IGNORECASE
)


def redact(text: str) -> str:
    """Return `text` with secrets replaced by `[redacted]`, as far as they can be told by their shape."""
    if len(text) < 256 and not _SUSPICIOUS.search(text):
        return text
    lowered = text.lower()
    wanted = {number for needle, number in _NEEDLES if needle in lowered}
    if _PAIRS in wanted and not _PAIR_THERE.search(lowered):
        wanted.discard(_PAIRS)
    for number in sorted(wanted):
        _, pattern, replacement = _RULES[number]
        text = pattern.sub(replacement, text)
    return text


_PAIRS: Final = next(number for number, rule in enumerate(_RULES) if rule[2] is _hide_pair)


def plain_text(text: str) -> str:
    """Return `text` without lone surrogates, which no UTF-8 file can hold; pairs are joined, the rest become U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str, limit: int = MAX_TEXT, length: int = 0) -> str:
    """Return `text`, at most `limit` characters of it; a cut text ends with a mark that says how much is gone.

    `length` is the length of the whole where `text` is but its beginning. A text that was cut before stays as it is.
    """
    length = length or len(text)
    if length <= limit or (length <= limit + 40 and text.endswith(_CUT_CHARACTERS)):
        return text
    kept = text[:limit]
    return f"{kept}…[cut {length - len(kept)}{_CUT_CHARACTERS}"


def clean_name(name: object) -> str:
    """Return `name` as a name that every format can hold: text without secrets, at most 1,024 characters of it."""
    text = name if type(name) is str else describe(name)
    return _short_name(text) if len(text) < 256 else DEFAULT.text(text, MAX_NAME)


@functools.lru_cache(maxsize=4_096)
def _short_name(text: str) -> str:
    return DEFAULT.text(text, MAX_NAME)


def error_type(exc: BaseException | type[BaseException]) -> str:
    """Return the value of `error.type`: the class's qualified name, without `builtins.`.

    Source: OpenTelemetry semantic conventions, Recording errors.
    """
    cls = exc if isinstance(exc, type) else type(exc)
    return clean_name(cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}")


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

    def text(self, text: str, limit: int = MAX_TEXT, length: int = 0) -> str:
        """Return `text` with secrets redacted, lone surrogates replaced and at most `limit` characters kept.

        Four times the limit is looked at, so that a secret on the cut is found, and 10 MB cost no more than 256 kB.
        `length` is the length of the whole where `text` is but its beginning.
        """
        length = length or len(text)
        whole = length <= 4 * limit
        text = redact(plain_text(text if whole else text[: 4 * limit]))
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        if whole:
            return cut(text, limit)
        return cut(text[: max(0, len(text) - 512)], limit, length)  # its very end may be the first half of a secret

    def value(self, value: Any, key: str = "", depth: int = 0, left: list[int] | None = None) -> Any:
        """Return `value` as something JSON can hold, cleaned all through. Tables and arrays become their shape.

        Inside another value it is `depth` levels down, and `left[0]` items may still be kept.
        """
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if key and self.is_secret_key(key) and not (kind is int and _COUNT_KEY.search(key)):
            return REDACTED
        if kind is str:
            return self.text(value)
        if kind is int and -(2**63) <= value < 2**63:
            return value
        try:
            return self._other(value, depth, [MAX_TOTAL] if left is None else left)
        except Exception as exc:  # noqa: BLE001 - a value's own methods may raise anything
            return f"<{kind.__name__}: {type(exc).__name__} while reading>"

    def _other(self, value: Any, depth: int, left: list[int]) -> Any:
        kind = type(value)
        if kind is int:
            return _huge(value)
        if depth >= MAX_DEPTH:
            return f"<{kind_name(value)}: too deep or circular>"
        if isinstance(value, enum.Enum):
            return self.value(value.value, "", depth + 1, left)
        for base in (str, int, float):
            if isinstance(value, base):
                return self.value(base(value), "", depth + 1, left)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._bytes(bytes(value[: 4 * MAX_TEXT]), len(value))
        if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
            return value.isoformat()
        if isinstance(value, BaseException):
            return self.text(f"{error_type(value)}: {message_of(value)}")
        if hasattr(kind, "__array__") or hasattr(kind, "__arrow_c_stream__") or hasattr(kind, "__arrow_c_array__"):
            return self._table(value, depth, left)
        if isinstance(value, Mapping):
            return self._mapping(value, depth, left)
        if isinstance(value, (Sequence, set, frozenset)):
            return self._items(value, depth, left)
        return self.text(describe(value))

    def _table(self, value: Any, depth: int, left: list[int]) -> Any:
        """Describe a table or an array by its shape, never its cells. NumPy's scalars are arrays of shape ()."""
        # A query that has not run (duckdb) would run to tell its shape; such things are no arrays.
        shape = getattr(value, "shape", None) if hasattr(type(value), "__array__") else None
        if not isinstance(shape, tuple):
            return f"<{kind_name(value)}>"
        if shape:
            return f"<{kind_name(value)} shape={shape}>"
        item = value.item()
        is_time = kind_name(value) in ("numpy.datetime64", "numpy.timedelta64")  # whose item() may be a bare integer
        return self.text(str(value)) if is_time else self.value(item, "", depth + 1, left)

    def _mapping(self, value: Mapping[Any, Any], depth: int, left: list[int]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        taken = _take(left, len(value))
        for _, (key, item) in zip(range(taken), value.items(), strict=False):
            name = clean_name(key)
            out[name] = self.value(item, name, depth + 1, left)
        if len(value) > taken:
            out["…"] = f"[cut {len(value) - taken} items]"
        return out

    def _items(self, value: Sequence[Any] | set[Any] | frozenset[Any], depth: int, left: list[int]) -> list[Any]:
        taken = _take(left, len(value))
        items = [self.value(item, "", depth + 1, left) for _, item in zip(range(taken), value, strict=False)]
        return items if len(value) <= taken else [*items, f"…[cut {len(value) - taken} items]"]

    def _bytes(self, value: bytes, length: int) -> str:
        try:
            return self.text(value.decode(), length=length)
        except UnicodeDecodeError:
            return f"<{length} bytes>"

    def attribute(self, key: str, value: Any) -> str | bool | int | float | list[Any]:
        """Return `value` as an OpenTelemetry attribute value: a scalar or a list of scalars of one type.

        What OpenTelemetry cannot hold portably (None, maps, mixed lists) becomes JSON text.
        Source: OpenTelemetry specification, Attribute.
        """
        cleaned = self.value(value, key)
        if isinstance(cleaned, (str, bool, int, float)):
            return cleaned
        kinds = {type(item) for item in cleaned} if isinstance(cleaned, list) else {dict}
        if len(kinds) <= 1 and kinds <= {str, bool, int, float}:
            return cleaned  # type: ignore[no-any-return]  # a list
        return cut(to_json(cleaned).decode())

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
    return describe(exc)


def kind_name(value: object) -> str:
    """Return the type's name with its top package: `pandas.DataFrame`, `MyClass` for builtins and `__main__`."""
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    return cls.__qualname__ if package in ("builtins", "__main__") else f"{package}.{cls.__qualname__}"


def to_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8. For values a `Cleaner` returned; anything it missed becomes text, NaN null."""
    try:
        return orjson.dumps(value, default=describe)
    except (TypeError, ValueError, RecursionError):
        return orjson.dumps(DEFAULT.value(value))


def describe(value: object) -> str:
    try:
        text = str(value)
    except Exception as exc:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"<{type(value).__name__}: {type(exc).__name__} while reading>"
    return text if type(text) is str else f"<{type(value).__name__}>"


def _huge(number: int) -> str:
    """Write an integer beyond 64 bits: in digits where Python does that in reasonable time."""
    return str(number) if number.bit_length() <= 4_096 else f"<int of {number.bit_length()} bits>"


def _take(left: list[int], wanted: int) -> int:
    """Return how many of `wanted` items to keep, and count them: if not all, one fewer, for the mark that says so."""
    room = min(MAX_ITEMS, left[0])
    taken = wanted if wanted <= room else max(0, room - 1)
    left[0] -= taken
    return taken
