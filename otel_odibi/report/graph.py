"""The graph of a run as it is drawn: executions of one node as one box, and the rows that went from box to box."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from otel_odibi.store import NodeView

MOST: Final = 250
"""Boxes that are laid out; and 3 times as many edges: more are neither quick to place nor to be told apart."""


def _numberless(node: NodeView) -> str:
    return ": ".join(filter(None, (node.layer, re.sub(r"\d+", "*", node.name))))


_WAYS: Final[tuple[tuple[str, Callable[[NodeView], str]], ...]] = (
    ("", lambda node: node.name),
    ("nodes whose names differ in numbers alone", _numberless),
    ("the nodes of a layer", lambda node: node.layer or "(no layer)"),
)


def graph(nodes: Sequence[NodeView], sources: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return `boxes`, each a name and the rows of its nodes, and `edges`: from box, to box, rows that went along.

    Where there are more names than `MOST`, `grouped` tells what became one box; `left_out` counts the boxes that are
    too many still. A pipeline inside the run whose nodes are known is no box of its own.
    """
    deeper = [after.depth > node.depth for node, after in itertools.pairwise(nodes)]
    drawn = [row for row, node in enumerate(nodes) if not (node.run_id and deeper[row : row + 1] == [True])]
    for grouped, name_of in _WAYS:  # noqa: B007 - the last one is told
        boxes: dict[str, list[int]] = {}
        for row in drawn:
            boxes.setdefault(name_of(nodes[row]), []).append(row)
        kept = list(boxes.items())[:MOST]
        box_of = {row: box for box, (_, rows) in enumerate(kept) for row in rows}
        flows = {(source, box_of[row]) for row in box_of for source in sources[row] if source in box_of}
        if len(boxes) <= MOST and len({(box_of[source], box) for source, box in flows}) <= 3 * MOST:
            break
    edges: dict[tuple[int, int], int | None] = {}
    for source, box in sorted(flows):
        edge, rows_out = (box_of[source], box), nodes[source].rows_out
        known = edges.setdefault(edge, None)
        edges[edge] = known if rows_out is None else rows_out + (known or 0)
    return {
        "boxes": kept,
        "edges": [(begin, end, rows) for (begin, end), rows in edges.items() if begin != end][: 3 * MOST],
        "grouped": grouped,
        "left_out": len(boxes) - len(kept),
    }
