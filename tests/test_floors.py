"""What import-linter cannot see: which rooms may know the OpenTelemetry SDK."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "otel_odibi"
MAY_KNOW_THE_SDK = {"telemetry", "process", "recovery", "delivery", "spans", "testing", "exporters"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found |= {item.module, *(f"{item.module}.{alias.name}" for alias in item.names)}
    return found


def test_only_the_assembling_rooms_import_the_sdk() -> None:
    """Scopes, facts, logs and metrics speak the OpenTelemetry API alone."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in MAY_KNOW_THE_SDK:
            assert not {name for name in imports_of(path) if name.startswith("opentelemetry.sdk")}, path


def test_heavy_packages_are_not_imported_at_the_top() -> None:
    """pyarrow, pandas, duckdb and the like load where they are first used."""
    heavy = {"pyarrow", "pandas", "polars", "duckdb", "numpy", "structlog", "grpc"}
    loaded_late = {PACKAGE / name for name in ("demo.py", "exporters/tables.py", "exporters/columns.py")}
    loaded_late |= set((PACKAGE / "store").glob("*.py"))
    for path in set(PACKAGE.rglob("*.py")) - loaded_late:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in tree.body:
            if isinstance(item, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in item.names] if isinstance(item, ast.Import) else [item.module or ""]
                assert not heavy & {name.partition(".")[0] for name in names}, path
