"""Values that pipelines hand over without a thought: of any type, some of them failing in every way."""

from __future__ import annotations

import collections
import enum

import numpy as np
import pandas as pd
from hypothesis import strategies as st


class Hostile:
    """An object that fails in every way it can."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __len__ = __iter__ = __bool__ = __hash__ = __str__

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    def __getattr__(self, name):
        raise RuntimeError("no attribute")


class Unreadable(Exception):
    """An exception whose message cannot be had."""

    def __str__(self):
        raise RuntimeError("no message")


class Layer(enum.Enum):
    """Values of an enumeration, one with a secret in it."""

    RAW = "raw"
    LOGIN = "password=hunter2hunter2"


def ring():
    """Return a list that holds itself."""
    circle: list[object] = [1]
    circle.append(circle)
    return circle


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.binary(max_size=20),
    st.datetimes(), st.dates(), st.times(), st.timedeltas(), st.decimals(), st.fractions(), st.complex_numbers(),
    st.uuids(), st.text(max_size=20), st.text(st.characters(categories=("Cs", "Lu", "Cc")), max_size=5),
    st.floats(width=32).map(np.float32), st.integers(-128, 127).map(np.int8), st.sampled_from(Layer),
    st.integers(0, 3).map(np.zeros), st.integers(0, 2).map(lambda rows: pd.DataFrame({"cell": ["private"] * rows})),
    st.builds(Hostile), st.builds(Unreadable), st.builds(object), st.builds(ring),
)  # fmt: skip
keys = st.one_of(st.text(max_size=8), st.text(st.characters(categories=("Cs",)), max_size=3), st.integers(), st.none())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4), st.tuples(inner, inner),
        st.lists(inner, max_size=3).map(collections.deque),
    ),
    max_leaves=12,
)  # fmt: skip
"""Any value at all."""
