"""Cuts found by halving, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.ops.selection import least, sortable

NUMBERS = [
    np.nan,
    -np.nan,
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-40,
    -1e-40,
    3e38,
    -3e38,
    np.inf,
    -np.inf,
    0.1,
    0.10000001,
]


def test_sortable_keeps_the_order():
    x = np.array(NUMBERS, np.float32)
    keys = np.asarray(sortable(jnp.asarray(x))).astype(np.int64)
    assert (keys[:2] == keys.max()).all() and (keys[2:] < keys.max()).all()  # nan
    x, keys = x[2:], keys[2:]
    np.testing.assert_array_equal(
        np.sign(keys[:, None] - keys[None]), (x[:, None] > x).astype(int) - (x[:, None] < x)
    )


@jax.jit
def least_from(wanted, low, high):
    return least(lambda i: i >= wanted, low, high)


INTEGERS = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), 2**31 - 1, 0, -1, 1])
)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(INTEGERS, INTEGERS, INTEGERS), min_size=3, max_size=3))
def test_the_least_of_each_row(rows):
    ends = [sorted(row[1:]) for row in rows]
    column = lambda values: np.array(values, np.int32)[:, None]
    found = least_from(
        column([row[0] for row in rows]), column([e[0] for e in ends]), column([e[1] for e in ends])
    )
    expected = [min(max(row[0], e[0]), e[1]) for row, e in zip(rows, ends, strict=True)]
    np.testing.assert_array_equal(found, column(expected))
