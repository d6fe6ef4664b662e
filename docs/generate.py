"""Writes the documentation that is made from the code: `python docs/generate.py`. A test keeps it in step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from otel_odibi import names
from otel_odibi.settings import PREFIX, Settings

HERE = Path(__file__).parent

SETTINGS_HEAD = """# Settings

Each is an argument of `configure()`. One value is looked for in this order: the argument, `OTEL_ODIBI_<NAME>`, the
OpenTelemetry variable where there is one, `[tool.otel-odibi]` in the nearest `pyproject.toml`, the default.

```toml
[tool.otel-odibi]
service_name = "orders"
directory = "telemetry"
metric_formats = ["textfile"]
```

A wrong value raises `SettingError` in `configure()`, naming the setting, the value and the remedy. Lists are
comma-separated in variables; the word `none` is the empty list. `OTEL_SDK_DISABLED=true` turns everything off.
"""


def settings_page() -> str:
    lines = [SETTINGS_HEAD, "| setting | variable | default | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(Settings):
        scale = field.metadata["scale"]
        unit = " (ms)" if scale == 0.001 else ""
        variables = [f"`{PREFIX}{field.name.upper()}`", *(f"`{name}`{unit}" for name in field.metadata["otel"])]
        lines.append(
            f"| `{field.name}` | {', '.join(variables)} | {_default(field.default)} | {field.metadata['doc']} |"
        )
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{value}`".lower() if isinstance(value, bool) else f"`{value}`"


def metrics_table() -> str:
    lines = ["| metric | kind, unit | in Prometheus | attributes | meaning |", "|---|---|---|---|---|"]
    for i in names.INSTRUMENTS:
        kind = f"{i.kind.replace('updowncounter', 'up-down counter')}, `{i.unit}`"
        lines.append(f"| `{i.name}` | {kind} | `{i.prometheus}` | {', '.join(i.attributes)} | {i.description} |")
    return "\n".join(lines)


def in_exporters_page(text: str) -> str:
    begin, end = "<!-- metrics table -->", "<!-- end of metrics table -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{metrics_table()}\n{end}{rest.partition(end)[2]}"


def pages() -> dict[Path, str]:
    """Return each generated page's path and text."""
    exporters = HERE / "exporters.md"
    return {HERE / "settings.md": settings_page(), exporters: in_exporters_page(exporters.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
