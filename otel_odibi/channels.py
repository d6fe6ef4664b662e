"""Where an alert goes: a webhook or a mailbox. Secrets are in no payload, error or `repr`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from otel_odibi.clean import to_json
from otel_odibi.errors import SettingError

Notice = Mapping[str, Any]


class Webhook:
    """A URL that takes notices by POST: as Slack's `{"text": ...}`, or as one JSON object of all fields.

    TLS certificates are verified (the variable SSL_CERT_FILE names other authorities); redirects are not followed.
    Raises `SettingError` for what is no such URL.
    """

    def __init__(self, url: str, format: str = "slack") -> None:  # noqa: A002
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and " " not in url
        except (ValueError, AttributeError, TypeError):
            usable = False
        if not usable:
            raise SettingError("webhook", "[hidden]", "not a http:// or https:// URL", "give the URL to post to")
        if format not in ("slack", "json"):
            raise SettingError("webhook_format", format, "unknown", "choose slack or json")
        self._url, self._format, self._host = url, format, f"{parts.scheme}://{parts.hostname}"
        self.secrets = [text for text in (url, parts.path, parts.query) if len(text) > 7]

    def __repr__(self) -> str:
        return f"webhook {self._host}"

    def send(self, notice: Notice, timeout: float) -> None:
        """Post a notice. Raises whatever goes wrong, in words that may hold secrets: see `problem_of`."""
        import urllib.request

        class Straight(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *args: Any) -> None:
                """Make the redirect an error: the URL's secret is meant for its own host."""

        slack = {"text": notice["text"].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
        body = to_json(slack if self._format == "slack" else notice)
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})  # noqa: S310
        urllib.request.build_opener(Straight).open(request, timeout=timeout).close()


@dataclass(frozen=True)
class Email:
    """A mail server and whom to write to.

    `starttls` verifies the server's certificate as well; port 465 means TLS from the start. Raises `SettingError` for
    what is missing or unsafe.
    """

    host: str
    sender: str
    recipients: Sequence[str]
    port: int = 587
    starttls: bool = True
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.recipients, str):
            object.__setattr__(self, "recipients", [self.recipients])
        for setting, value in (("host", [self.host]), ("sender", [self.sender]), ("recipients", self.recipients)):
            if not value or not all(isinstance(text, str) and text and text.isprintable() for text in value):
                raise SettingError(f"email.{setting}", value, "not a text", "give a host name, or addresses")
        if not isinstance(self.port, int) or not 0 < self.port < 65536:
            raise SettingError("email.port", self.port, "not a port", "give a number, such as 587")
        if self.password and not self.starttls and self.port != 465:
            raise SettingError("email.starttls", False, "the password would travel in the clear", "leave it on")

    @classmethod
    def of(cls, value: Email | Mapping[str, Any]) -> Email:
        """Return the settings as an `Email`. Raises `SettingError`."""
        if isinstance(value, cls):
            return value
        try:
            return cls(**value)  # type: ignore[arg-type]
        except TypeError:
            known = ", ".join(cls.__dataclass_fields__)
            raise SettingError("email", "[hidden]", "has unknown or missing keys", f"the keys are {known}") from None

    def __str__(self) -> str:
        return f"mail server {self.host}"

    @property
    def secrets(self) -> Sequence[str]:
        """Texts that must not be told to anybody."""
        return [self.password] if self.password else []

    def send(self, notice: Notice, timeout: float) -> None:
        """Send a notice. Raises whatever goes wrong: see `problem_of`."""
        import smtplib
        import ssl
        from email.message import EmailMessage
        from email.utils import formatdate

        message = EmailMessage()
        message["From"], message["To"] = self.sender, ", ".join(self.recipients)
        message["Subject"] = " ".join(notice["text"].partition("\n")[0].split())[:200]
        message["Date"], message["Message-ID"] = formatdate(), f"<{notice['id']}@otel-odibi>"
        message.set_content(notice["text"])
        tls = ssl.create_default_context()
        connect = partial(smtplib.SMTP_SSL, context=tls) if self.port == 465 else smtplib.SMTP
        with connect(self.host, self.port, timeout=timeout) as client:
            if self.starttls and self.port != 465:
                client.starttls(context=tls)
            if self.username:
                client.login(self.username, self.password or "")
            client.send_message(message)


def problem_of(exc: Exception) -> tuple[str, bool]:
    """Tell an error by its type and number alone, as its text may quote secrets; and whether it may pass by itself."""
    reason = getattr(exc, "reason", None)
    if isinstance(reason, Exception):  # what urllib has wrapped
        exc = reason
    http, smtp = getattr(exc, "code", None), getattr(exc, "smtp_code", None)
    if http:
        exc.close()  # type: ignore[attr-defined]
        return f"HTTP {http}", http >= 500 or http in (408, 425, 429)
    if smtp:
        return f"{type(exc).__name__} {smtp}", smtp < 500
    words = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else ""
    # A certificate that does not fit is an OSError and a ValueError, and will not fit the next time.
    return f"{type(exc).__name__} {words}".rstrip(), isinstance(exc, OSError) and not isinstance(exc, ValueError)
