"""Two runs side by side, node by node."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from otel_odibi.names import CANCELLED, FAILURE, LOST, SKIPPED, SUCCESS
from otel_odibi.store import NodeView, RunView


def diff(a: RunView, b: RunView) -> list[dict[str, Any]]:
    """Return a row a node, in the order of `b`, then what is gone: what `a` and what `b` did with it, None if nothing.

    All executions in a run are taken together: the worst outcome, seconds, rows, and hits a lookup in the cache.
    """
    old, new = _sides(a), _sides(b)
    return [{"node": node, "a": old.get(node), "b": new.get(node)} for node in new | old]


def _sides(view: RunView) -> dict[str, dict[str, Any]]:
    executions = defaultdict[str, list[NodeView]](list)
    for each in view.nodes:
        if not each.run_id:  # else it is a run inside this one
            executions[each.name].append(each)
    return {node: _side(found) for node, found in executions.items()}


def _side(found: list[NodeView]) -> dict[str, Any]:
    outcomes = [each.outcome for each in found]
    outcome = next((known for known in (FAILURE, LOST, CANCELLED, SUCCESS) if known in outcomes), outcomes[0])
    timed = [each.duration_ns / 1e9 for each in found if each.outcome not in (SKIPPED, LOST)]
    rows = [each.rows_out for each in found if each.rows_out is not None]
    hits = [each.cache_hit for each in found if each.cache_hit is not None]
    seconds, total, ratio = sum(timed) if timed else None, sum(rows) if rows else None, sum(hits) / len(hits or "?")
    numbers = {"duration": seconds, "rows": total, "cache hits": ratio if hits else None, "executions": len(found)}
    return {"outcome": outcome, **numbers}
