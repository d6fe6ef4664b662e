"""Measure the budgets and print them as tables: `make bench`, or `python -m benchmarks node memory ...`."""

from __future__ import annotations

import importlib
import sys

TABLES = ("node", "memory", "startup", "parquet", "manager", "events", "outage", "carry", "query", "report")

for name in sys.argv[1:] or TABLES:
    print(importlib.import_module(f"benchmarks.{name}").table(), flush=True)
    print()
