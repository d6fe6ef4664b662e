"""`import otel_odibi` is light, complete and typed."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib import resources

import pytest

import otel_odibi

HEAVY = (
    "opentelemetry.sdk", "opentelemetry.exporter", "structlog", "rich", "pyarrow", "pandas", "polars", "numpy",
    "duckdb", "prometheus_client", "psutil", "grpc", "google.protobuf", "requests", "click", "asyncio", "pytest",
)  # fmt: skip


def loaded_by(program):
    """Run a program in a fresh interpreter and return the names of the modules it has loaded."""
    report = f"{program}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "program",
    [
        "import otel_odibi",
        "import otel_odibi as oo\n@oo.node\ndef f(): return 1\nwith oo.pipeline('p'):\n    f()\n    oo.current_node()",
        "import otel_odibi.pytest_plugin",
    ],
    ids=["import", "use without configure", "pytest plugin"],
)
def test_importing_loads_nothing_heavy(program):
    """The SDK, structlog and pyarrow come with `configure()`; an undecorated program pays for none of them."""
    plugin = "pytest_plugin" in program
    loaded = loaded_by(program)
    unwanted = [name for name in HEAVY if name in loaded and not (plugin and name in ("pytest", "asyncio", "rich"))]
    assert unwanted == []


def test_configure_loads_only_what_the_settings_ask_for():
    """No pyarrow, no HTTP server and no gRPC where nothing is written in those formats."""
    settings = "span_formats='none', metric_formats='none', set_global=False"
    loaded = loaded_by(f"import otel_odibi as oo; oo.configure({settings}).shutdown()")
    assert "opentelemetry.sdk.trace" in loaded
    for name in ("pyarrow", "prometheus_client", "grpc", "requests", "pandas", "structlog"):
        assert name not in loaded, name


@pytest.mark.parametrize("name", otel_odibi.__all__)
def test_every_public_name_is_there(name):
    """Those that are loaded on first use too; each has a docstring."""
    value = getattr(otel_odibi, name)
    assert name in dir(otel_odibi)
    assert name == "__version__" or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        otel_odibi.nonsense  # noqa: B018


def test_lazy_names_are_imported_for_type_checkers_and_nothing_else():
    """What a type checker sees is what there is."""
    tree = ast.parse(resources.files(otel_odibi).joinpath("__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert {name: module.rpartition(".")[2] for name, module in seen.items()} == otel_odibi._LAZY
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(otel_odibi, name)


def test_the_package_is_typed():
    """PEP 561."""
    assert resources.files(otel_odibi).joinpath("py.typed").is_file()
