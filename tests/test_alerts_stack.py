"""Alerts from real processes to real ones on loopback: an endpoint as Slack has it, a mail server with STARTTLS."""

from __future__ import annotations

import email.policy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.stack

SECRET_PATH = "/services/T0000/B0000/XyzXyzXyz"

ENDPOINT = """if True:
    import http.server, json, sys, threading
    answers = json.loads(sys.argv[1])
    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers.pop(0) if answers else 200
            print(json.dumps({"path": self.path, "body": body, "answer": answer}), flush=True)
            if answer == "hang":
                threading.Event().wait()
            self.send_response(answer)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""

MAIL_SERVER = """if True:
    import asyncio, json, ssl, sys
    from aiosmtpd.smtp import SMTP, AuthResult
    class Mailbox:
        async def handle_DATA(self, server, session, envelope):
            message = {"to": envelope.rcpt_tos, "tls": session.ssl is not None, "text": envelope.content.decode()}
            print(json.dumps(message), flush=True)
            return "250 OK"
    def login(server, session, envelope, mechanism, auth):
        return AuthResult(success=auth.password == b"correct horse", handled=False)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(sys.argv[1], sys.argv[2])
    def session():
        return SMTP(Mailbox(), tls_context=tls, require_starttls=True, authenticator=login, auth_required=True)
    async def main():
        server = await asyncio.get_running_loop().create_server(session, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()
    asyncio.run(main())
"""

PIPELINE = """if True:
    import sys
    import otel_odibi as oo
    directory, fails = sys.argv[1], sys.argv[2] == "fails"
    telemetry = oo.configure(service_name="flights", directory=directory)
    try:
        with oo.pipeline("flights") as run, oo.node("join"):
            if fails:
                raise ValueError("no planes <none>, password=hunter2hunter2")
    except ValueError:
        pass
    print("pipeline done", run.trace_id, flush=True)
    telemetry.shutdown(timeout=float(sys.argv[3]))
    print("abandoned", telemetry.events.abandoned, flush=True)
"""


class Server:
    """A server process that prints its port, then one JSON line for each thing it receives."""

    def __init__(self, program: str, *arguments: str) -> None:
        command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def receive(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def stop(self) -> list[dict]:
        """End it; return what was received and not read."""
        self.process.kill()
        return [json.loads(line) for line in self.process.communicate()[0].splitlines()]


@pytest.fixture
def serve():
    """Start servers; they are stopped at the end."""
    servers = []

    def start(program, *arguments):
        servers.append(Server(program, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


@pytest.fixture
def certificate(tmp_path):
    """A certificate for localhost that only those trust who are told to."""
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run(command, check=True, capture_output=True)
    return paths


def run(directory: Path, alert: dict, *, fails: bool, wait: float = 30, **environ: str) -> tuple[str, str]:
    """Run the pipeline in a process of its own; return its trace id and all that it printed and logged."""
    (directory / "pyproject.toml").write_text(
        "".join(
            f"[tool.otel-odibi.alerts.nightly{part}]\n"
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items() if key != "email")
            for part, table in (("", alert), (".email", alert.get("email", {})))
            if table
        )
    )
    command = [sys.executable, "-c", PIPELINE, str(directory), "fails" if fails else "works", str(wait)]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=120, env={**os.environ, **environ}, check=True
    )
    logs = "".join(path.read_text() for path in directory.glob("logs/*.jsonl"))
    line = next(line for line in done.stdout.splitlines() if line.startswith("pipeline done"))
    return line.split()[-1], done.stdout + done.stderr + logs


def test_a_slack_endpoint_gets_the_alert_once_and_then_the_recovery(serve, tmp_path):
    """With the run's trace id; nothing when the failure repeats in a new process within the quiet period."""
    endpoint = serve(ENDPOINT, "[503]")
    url = f"http://127.0.0.1:{endpoint.port}{SECRET_PATH}"
    alert = {"webhook_env": "SLACK_URL"}
    trace_id, printed = run(tmp_path, alert, fails=True, SLACK_URL=url)
    first, second = endpoint.receive(), endpoint.receive()
    assert (first["answer"], second["answer"]) == (503, 200)
    assert first["body"] == second["body"]
    assert second["path"] == SECRET_PATH
    assert list(second["body"]) == ["text"]
    text = second["body"]["text"]
    assert text.startswith("ALERT flights: 1 node failed\nfailed: join\nValueError: no planes &lt;none&gt;")
    assert f"trace {trace_id}" in text
    assert f'"trace_id":"{trace_id}"' in printed
    assert "hunter2" not in text
    assert "XyzXyzXyz" not in printed
    run(tmp_path, alert, fails=True, SLACK_URL=url)
    recovered, _ = run(tmp_path, alert, fails=False, SLACK_URL=url)
    text = endpoint.receive()["body"]["text"]
    assert text.startswith("RECOVERED flights")
    assert f"trace {recovered}" in text
    run(tmp_path, alert, fails=False, SLACK_URL=url)
    assert endpoint.stop() == []


def test_a_generic_endpoint_gets_json(serve, tmp_path):
    """One object with all fields."""
    endpoint = serve(ENDPOINT, "[]")
    url = f"http://127.0.0.1:{endpoint.port}/in"
    trace_id, _ = run(tmp_path, {"webhook": url, "webhook_format": "json"}, fails=True)
    body = endpoint.receive()["body"]
    assert {key: body[key] for key in ("alert", "status", "condition", "pipeline", "trace_id", "failed_nodes")} == {
        "alert": "nightly",
        "status": "firing",
        "condition": "failed_nodes",
        "pipeline": "flights",
        "trace_id": trace_id,
        "failed_nodes": ["join"],
    }


@pytest.mark.parametrize("answer", [302, 404])
def test_an_endpoint_that_does_not_want_it_is_asked_once(serve, tmp_path, answer):
    """The reason is logged, the URL is not; redirects are not followed."""
    endpoint = serve(ENDPOINT, f"[{answer}]")
    url = f"http://127.0.0.1:{endpoint.port}{SECRET_PATH}"
    _, printed = run(tmp_path, {"webhook": url}, fails=True)
    assert f"webhook http://127.0.0.1: HTTP {answer}" in printed
    assert "XyzXyzXyz" not in printed
    assert [each["answer"] for each in [endpoint.receive(), *endpoint.stop()]] == [answer]


def test_a_mail_server_gets_the_alert_once_and_then_the_recovery(serve, certificate, tmp_path):
    """Over STARTTLS, after a login, with the run's trace id."""
    server = serve(MAIL_SERVER, *map(str, certificate))
    mail = {"host": "localhost", "port": server.port, "sender": "etl@example.com", "recipients": ["ops@example.com"]}
    alert = {"email": {**mail, "username": "etl", "password_env": "SMTP_PASSWORD"}}
    trusting = {"SMTP_PASSWORD": "correct horse", "SSL_CERT_FILE": str(certificate[0])}
    trace_id, _ = run(tmp_path, alert, fails=True, **trusting)
    run(tmp_path, alert, fails=True, **trusting)
    run(tmp_path, alert, fails=False, **trusting)
    first, second = server.receive(), server.receive()
    assert server.stop() == []
    assert (first["to"], first["tls"]) == (["ops@example.com"], True)
    message, recovery = (
        email.message_from_string(each["text"], policy=email.policy.default) for each in (first, second)
    )
    assert message["Subject"] == "ALERT flights: 1 node failed"
    assert f"trace {trace_id}" in message.get_content()
    assert "hunter2" not in message.get_content()
    assert recovery["Subject"].strip().startswith("RECOVERED flights")


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"SMTP_PASSWORD": "correct horse"}, "SSLCertVerificationError"),
        ({"SMTP_PASSWORD": "wrong donkey", "trusts": "yes"}, "SMTPAuthenticationError 535"),
    ],
)
def test_a_mail_server_that_cannot_be_trusted_or_refuses_gets_nothing(serve, certificate, tmp_path, environ, reason):
    """Certificates are verified; errors do not show the password."""
    server = serve(MAIL_SERVER, *map(str, certificate))
    mail = {"host": "localhost", "port": server.port, "sender": "etl@example.com", "recipients": ["ops@example.com"]}
    alert = {"email": {**mail, "username": "etl", "password_env": "SMTP_PASSWORD"}}
    if environ.pop("trusts", None):
        environ["SSL_CERT_FILE"] = str(certificate[0])
    _, printed = run(tmp_path, alert, fails=True, **environ)
    assert f"mail server localhost: {reason}" in printed
    assert environ["SMTP_PASSWORD"] not in printed
    assert server.stop() == []


def test_a_pipeline_is_done_while_the_endpoint_hangs(serve, tmp_path):
    """It prints so before the endpoint has answered, which it never does; the process ends as told."""
    endpoint = serve(ENDPOINT, '["hang"]')
    _, printed = run(tmp_path, {"webhook": f"http://127.0.0.1:{endpoint.port}/in"}, fails=True, wait=1)
    assert "pipeline done" in printed
    assert "abandoned 1" in printed
    assert endpoint.receive()["answer"] == "hang"
