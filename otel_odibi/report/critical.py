"""What the nodes of a run waited for: each other's results, and the chain that decided when the run ended."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from otel_odibi.names import SKIPPED
from otel_odibi.store import NodeView, RunView


def sources(nodes: Sequence[NodeView]) -> list[list[int]]:
    """Return for each node the rows of those whose results went in: by span, else the last of that name before it."""
    by_span, latest = {node.span_id: row for row, node in enumerate(nodes)}, dict[str, int]()
    found = []
    for row, node in enumerate(nodes):
        linked = [by_span[span_id] for span_id in node.links if span_id in by_span and span_id != node.span_id]
        known = {nodes[other].name for other in linked}
        found.append(linked + [latest[name] for name in node.depends_on if name in latest and name not in known])
        latest[node.name] = row
    return found


def critical_path(view: RunView) -> frozenset[int]:
    """Return the rows of the nodes that decided how long the run took: had one been faster, so had been the run.

    From the node that ended last it goes back to what that one waited for: the one that ended last before it began. Of
    two side by side that ended within a hundredth of the run of each other, it is the one whose result went in. Inside
    a node it goes on the same way.
    """
    inside, above = dict[int, list[int]](), list[int]()
    for row, node in enumerate(view.nodes):
        del above[node.depth :]
        if node.outcome != SKIPPED:
            inside.setdefault(above[-1] if above else -1, []).append(row)
        above.append(row)
    before, slack = sources(view.nodes), view.run.duration_ns // 100
    path = [-1]
    for row in path:  # which grows
        path += _chain(view.nodes, inside.get(row, ()), before, slack)
    return frozenset(path[1:])


def _chain(nodes: Sequence[NodeView], rows: Iterable[int], before: Sequence[Sequence[int]], slack: int) -> list[int]:
    ends = sorted((nodes[row].start_ns + nodes[row].duration_ns, row) for row in rows)
    end_of = {row: end for end, row in ends}
    chain, given = list[int](), set[int]()
    waited_for = {row for _, row in ends[-1:]}
    while waited_for:
        at = max(waited_for, key=lambda row: (end_of[row], row))
        giver = max(given, key=lambda row: (end_of[row], row), default=at)
        at = giver if nodes[at].start_ns < end_of[giver] >= end_of[at] - slack else at
        chain.append(at)
        del end_of[at]
        place = bisect_right(ends, (nodes[at].start_ns, len(nodes)))
        while place and ends[place - 1][1] not in end_of:
            place -= 1
        given = end_of.keys() & set(before[at])
        waited_for = given | {row for _, row in ends[max(0, place - 1) : place]}
    return chain
