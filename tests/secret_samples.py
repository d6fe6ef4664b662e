"""Texts with secrets in them, in the shapes that pipelines meet, and texts without any that must stay as they are.

In a sample the secret stands between ⟦ and ⟧. The secrets are made up here, so that no scanner of repositories takes
them for real ones.
"""

from __future__ import annotations

import base64
import random
import re
import string

_ALNUM = string.ascii_letters + string.digits
_HEX = "0123456789abcdef"


def made_up(length: int, alphabet: str = _ALNUM) -> str:
    """Return `length` characters that look random and are always the same; digits, small and capital letters first."""
    start = "7kQ" if alphabet == _ALNUM else ""
    return (start + "".join(random.Random(f"{length}{alphabet}").choices(alphabet, k=length)))[:length]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


_PEM_BODY = "\n".join(made_up(64) for _ in range(3))
_JWT = f"eyJ{made_up(33)}.eyJ{made_up(60)}.{made_up(43)}"
_PASSWORD = made_up(12)

MARKED = {
    "url": f"cannot connect to postgresql://etl:⟦{_PASSWORD}⟧@db.example.com:5432/warehouse",
    "url, password with @": f"postgresql://etl:⟦{_PASSWORD}@{_PASSWORD}⟧@db/warehouse",
    "url, password with /": f"GET https://etl:⟦{_PASSWORD}/{_PASSWORD}⟧@example.com/data failed",
    "url, user with @": f"https://etl@example.com:⟦{_PASSWORD}⟧@files.example.com/a.csv",
    "url without user": f"redis://:⟦{_PASSWORD}⟧@cache:6379/0",
    "url of git with token": f"git+https://⟦{made_up(40)}⟧@github.com/acme/dags.git",
    "amqp": f"amqp://guest:⟦{_PASSWORD}⟧@rabbit:5672/%2f",
    "mongo with hosts": f"mongodb+srv://etl:⟦{_PASSWORD}⟧@a.example.com:27017,b.example.com:27017/db?w=1",
    "dsn without scheme": f"root:⟦{_PASSWORD}⟧@tcp(127.0.0.1:3306)/sales",
    "sentry": f"https://⟦{made_up(32, _HEX)}⟧@o12.ingest.example.com/42",
    "jdbc, query": f"jdbc:postgresql://db:5432/dw?user=etl&password=⟦{_PASSWORD}⟧&ssl=true",
    "jdbc, semicolons": f"jdbc:sqlserver://db:1433;databaseName=dw;user=sa;password=⟦{_PASSWORD}⟧;encrypt=true",
    "jdbc, oracle": f"jdbc:oracle:thin:scott/⟦{_PASSWORD}⟧@//db:1521/orcl",
    "odbc": f"Driver={{ODBC Driver 18}};Server=db;Uid=sa;Pwd=⟦{_PASSWORD}⟧;Encrypt=yes",
    "odbc, braces": f"Driver={{ODBC Driver 18}};Uid=sa;PWD={{⟦{_PASSWORD};{_PASSWORD}⟧}};Encrypt=yes",
    "libpq": f"host=db user=etl password=⟦{_PASSWORD},{_PASSWORD}⟧ dbname=dw",
    "libpq, quoted": f"host=db password='⟦{_PASSWORD} {_PASSWORD}⟧' dbname=dw",
    "azure storage": f"DefaultEndpointsProtocol=https;AccountName=lake;AccountKey=⟦{made_up(86)}==⟧;EndpointSuffix=x",
    "azure service bus": f"Endpoint=sb://x.example.net/;SharedAccessKeyName=Root;SharedAccessKey=⟦{made_up(43)}=⟧",
    "azure sas": f"https://lake.example.net/raw/a.csv?sv=2024-11-04&sr=b&sig=⟦{made_up(43)}%3D⟧&se=2026-01-01",
    "azure client secret": f"login failed for ⟦7kQ8Q~{made_up(34)}⟧",
    "aws presigned": f"https://b.s3.example.com/k?X-Amz-Expires=60&X-Amz-Signature=⟦{made_up(64, _HEX)}⟧",
    "aws key id": f"user ⟦AKIA{made_up(16, string.ascii_uppercase + '234567')}⟧ is not authorized",
    "aws secret": f"AWS_SECRET_ACCESS_KEY=⟦{made_up(20)}/{made_up(19)}⟧",
    "aws signature": f"Authorization: AWS4-HMAC-SHA256 Credential=x/20260101/s3, Signature=⟦{made_up(64, _HEX)}⟧",
    "gcp api key": f"https://maps.example.com/api?key=⟦AIza{made_up(35)}⟧",
    "gcp oauth": f"refreshed ⟦ya29.{made_up(60)}⟧",
    "gcp service account": f'{{"key": "-----BEGIN PRIVATE KEY-----\\n⟦{_PEM_BODY}⟧\\n-----END PRIVATE KEY-----"}}',
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\n⟦{_PEM_BODY}⟧\n-----END RSA PRIVATE KEY-----",
    "pem, cut off": f"-----BEGIN OPENSSH PRIVATE KEY-----\n⟦{_PEM_BODY}⟧",
    "jwt": f"claims of ⟦{_JWT}⟧ have expired",
    "bearer": f"Authorization: Bearer ⟦{made_up(32)}⟧",
    "bearer alone": f"sent bearer ⟦{made_up(24)}⟧ to the api",
    "basic": f"Authorization: Basic ⟦{_base64('etl:hunter2-' + _PASSWORD)}⟧",
    "basic alone": f"used Basic ⟦{_base64('etl:hunter2-' + _PASSWORD)}⟧",
    "authorization, own scheme": f"authorization: ApiKey ⟦{made_up(18)}⟧",
    "proxy": f"Proxy-Authorization: Basic ⟦{_base64('proxy:' + _PASSWORD)}⟧",
    "headers, dict": f"{{'X-Api-Key': '⟦{made_up(24)}⟧', 'Accept': '*/*'}}",
    "headers, pairs": f"[('Accept', '*/*'), ('X-Api-Key', '⟦{made_up(24)}⟧')]",
    "headers, bytes": f"[(b'x-auth-token', b'⟦{made_up(24)}⟧')]",
    "cookie": f"Cookie: session=⟦{made_up(20)}⟧; csrftoken=⟦{made_up(22)}⟧; theme=⟦{made_up(8)}⟧",
    "set-cookie": f"set-cookie: id=⟦{made_up(20)}⟧; Path=/; HttpOnly",
    "github": f"remote: ⟦ghp_{made_up(36)}⟧ denied",
    "github, fine-grained": f"github_pat_⟦{made_up(22)}_{made_up(59)}⟧",
    "gitlab": f"clone with ⟦glpat-{made_up(20)}⟧",
    "slack": f"⟦xoxb-{made_up(12, string.digits)}-{made_up(12, string.digits)}-{made_up(24)}⟧",
    "slack webhook": f"https://hooks.slack.com/services/⟦T{made_up(9)}/B{made_up(9)}/{made_up(24)}⟧",
    "stripe": f"charged by ⟦sk_{'live'}_{made_up(24)}⟧",
    "npm": f"//registry.npmjs.org/:_authToken=⟦npm_{made_up(36)}⟧",
    "npm alone": f"published with ⟦npm_{made_up(36)}⟧",
    "pypi": f"twine: ⟦pypi-AgEIcHlwaS5vcmc{made_up(70)}⟧",
    "hugging face": f"pulled with ⟦hf_{made_up(34)}⟧",
    "databricks": f"⟦dapi{made_up(32, _HEX)}⟧-2 has expired",
    "openai": f"Incorrect API key provided: ⟦sk-proj-{made_up(48)}⟧.",
    "sendgrid": f"mail by ⟦SG.{made_up(22)}.{made_up(43)}⟧",
    "telegram": f"https://api.example.org/bot⟦{made_up(9, string.digits)}:AA{made_up(33)}⟧/send",
    "vault": f"unwrapped ⟦hvs.{made_up(90)}⟧",
    "cli flag": f"spark-submit --password ⟦{_PASSWORD}⟧ job.py",
    "cli flag with =": f"sqoop import --db-password=⟦{_PASSWORD}⟧ --table flights",
    "cli flag, other name": f"az login --client-secret ⟦{made_up(30)}⟧ --tenant x",
    "cli flag in a list": f"['dbt', '--password', '⟦{_PASSWORD}⟧', 'run']",
    "curl": f"curl -s -u etl:⟦{_PASSWORD}⟧ https://example.com",
    "mysql": f"mysql -h db -u root -p⟦{_PASSWORD}⟧ sales",
    "sshpass": f"sshpass -p ⟦{_PASSWORD}⟧ ssh host",
    "environment": f"export PGPASSWORD='⟦{_PASSWORD}⟧'",
    "environment, python": f"os.environ['DB_PASSWORD'] = '⟦{_PASSWORD}⟧'",
    "environment, short name": f"DB_PASS=⟦{_PASSWORD}⟧ SMTP_PASS=⟦{made_up(9)}⟧",
    "json": f'{{"user": "etl", "password": "⟦{_PASSWORD}⟧"}}',
    "json, quote inside": f'{{"password": "⟦{_PASSWORD}\\"{_PASSWORD}⟧"}}',
    "json in json": f'{{"body": "{{\\"client_secret\\": \\"⟦{_PASSWORD}⟧\\", \\"id\\": 1}}"}}',
    "json, list": f'{{"tokens": ["⟦{made_up(10)}⟧", "⟦{made_up(11)}⟧"]}}',
    "json, torn": f'{{"password": "⟦{_PASSWORD} {_PASSWORD}⟧',
    "yaml": f"db:\n  user: etl\n  password: ⟦{_PASSWORD}⟧\n  port: 5432",
    "yaml, block": f"private_key: |\n  ⟦{made_up(40)}⟧\n  ⟦{made_up(41)}⟧\nport: 1",
    "toml": f'api_key = """⟦{made_up(30)}⟧"""',
    "python repr": f"Connection(host='db', password='⟦{_PASSWORD}⟧', port=5432)",
    "python repr, bytes": f"{{'password': b'⟦{_PASSWORD}⟧'}}",
    "python repr, wrapped": f"Config(token=Secret('⟦{made_up(20)}⟧'), retries=3)",
    "ruby": f':password => "⟦{_PASSWORD}⟧"',
    "xml": f"<user>etl</user><dbPassword>⟦{_PASSWORD}⟧</dbPassword>",
    "sql": f"CREATE USER etl IDENTIFIED BY '⟦{_PASSWORD}⟧'",
    "sql, postgres": f"ALTER ROLE etl WITH PASSWORD '⟦{_PASSWORD}⟧'",
    "netrc": f"machine db.example.com login etl password ⟦{_PASSWORD}⟧",
    "query string": f"/callback?code=1&access_token=⟦{made_up(30)}⟧&state=2",
    "form": f"grant_type=password&username=etl&password=⟦{_PASSWORD}⟧",
    "url-encoded": f"redirect=%2Flogin%3Fpassword%3D⟦{_PASSWORD}⟧",
    "sentence": f"the password is ⟦{_PASSWORD}⟧",
}  # fmt: skip

PLAIN = (
    "token count 12",
    "tokens: 1204, max_tokens=4096, token_count=12",
    "the tokenizer: bert-base-uncased",
    "invalid token in line 3",
    "token bucket_limiter refilled",
    "token validation failed",
    "basic authentication is required",
    "bearer authentication is required",
    "basic PostgreSQL example",
    "digest computation took 3 s",
    "passing rate=0.3",
    "first pass: 12 rows",
    "compass=north",
    "https://example.com/a?b=c",
    "http://localhost:4318/v1/traces",
    "https://example.com:443/@scope/package",
    "mail bob@example.com, see http://example.com:80",
    "abfss://curated-customer-data@account.dfs.core.windows.net/2026",
    "s3://bucket/a-long-prefix/date=2026-01-01/part-0000.parquet",
    "git@github.com:acme/dags.git",
    "image nginx:1.25@sha256:1f0c3b0f4d8d2c7a6c4f",
    "key: value",
    "monkey=1",
    "hockey=2",
    "cache_key=3fa9",
    "primary_key=id, partition_key: date",
    "the secretary: Ann",
    "password_length=12",
    "password: None",
    'token=""',
    "has_token=False",
    "password is required",
    "KeyError: 'token'",
    'columns ["password", "email", "name"]',
    "columns ('id', 'token', 'name')",
    "run 3f2504e04f8911d39a0c0305e82c3301 took 3 s",
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "/srv/data/raw/2026-01-01/flights.csv",
    "C:\\data\\flights.csv",
    "aGVsbG8gd29ybGQ=",
    "hf_dataset_download_of_all_things",
    "npm_package_config_registry_url",
    "sk-learn-pipeline-with-transformers",
    "pypi-mirror-of-the-whole-company",
    "risk-assessment-of-the-portfolio",
    "sig=0.05",
    "author: Bob, authored 3 files",
    "wrote 336,776 rows in 1.25 s (269,420 rows/s)",
    "2026-01-01T00:00:00.000000Z",
    "date -u +%H:%M",
    "x = y == z; a => b; c != d",
    "50% of 12 [ok] {done} <tag> 'q' \"q\" `b`",
    "Müller Straße 東京 🚀",
    "node join_planes failed: ValueError: could not convert string to float: 'N/A'",
)


def _parse(marked: str) -> tuple[str, tuple[str, ...]]:
    return re.sub("[⟦⟧]", "", marked), tuple(re.findall("⟦(.*?)⟧", marked, re.DOTALL))


SECRETS = {name: _parse(marked) for name, marked in MARKED.items()}
"""Name of the shape: the text, and the secrets in it."""


def leaked(secrets: tuple[str, ...], output: str) -> list[str]:
    """Return which pieces of the secrets, ten characters long, are to be found in `output`."""
    starts = (
        (secret, start) for secret in secrets for start in {*range(0, len(secret) - 9, 5), max(0, len(secret) - 10)}
    )
    return [piece for secret, start in starts if (piece := secret[start : start + 10]) in output]
