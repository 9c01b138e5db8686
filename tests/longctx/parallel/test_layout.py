import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.parallel.layout import KINDS, Layout, as_layout

layouts = st.builds(Layout, st.sampled_from(KINDS), st.sampled_from([1, 2, 3, 4]))


def test_the_picture_in_the_docstring():
    assert Layout("contiguous", 4).order(8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert Layout("zigzag", 4).order(8).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert Layout("striped", 4).order(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert as_layout("zigzag", 4) == Layout("zigzag", 4)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(layouts, st.integers(1, 3), st.sampled_from([1, 2, 5]))
def test_shards_hold_what_they_say(layout, pieces, per_piece):
    devices = layout.ranks * pieces
    length = 2 * devices * per_piece
    tokens = np.arange(3 * length).reshape(3, length)
    laid_out = layout.apply({"tokens": tokens, "jax": jnp.asarray(tokens)})
    np.testing.assert_array_equal(laid_out["tokens"], laid_out["jax"])
    np.testing.assert_array_equal(layout.invert(laid_out["tokens"]), tokens)
    shards = jnp.asarray(laid_out["tokens"]).reshape(3, devices, -1).swapaxes(0, 1)
    np.testing.assert_array_equal(layout.in_position_order(shards), tokens)
    np.testing.assert_array_equal(layout.in_shards(jnp.asarray(tokens), devices), shards)
    probe = np.arange(-2, length + 3)
    for device in range(devices):
        held = np.asarray(layout.positions(length, devices, device))
        np.testing.assert_array_equal(held, layout.order(length).reshape(devices, -1)[device])
        assert (np.diff(held) > 0).all()
        count = layout.count_before(probe, length, devices, device)
        np.testing.assert_array_equal(count, (held[:, None] < probe).sum(0))


def test_traced_device():
    layout = Layout("zigzag", 4)
    got = jax.vmap(lambda d: layout.positions(16, 4, d))(jnp.arange(4))
    np.testing.assert_array_equal(got.reshape(-1), layout.order(16))


def test_errors():
    with pytest.raises(ValueError, match="kind='spiral'"):
        Layout("spiral", 2)
    with pytest.raises(ValueError, match="ranks=0"):
        Layout("zigzag", 0)
    with pytest.raises(ValueError, match="length=12 must be a multiple of 8"):
        Layout("zigzag", 4).order(12)
    with pytest.raises(ValueError, match="length=10"):
        Layout("contiguous", 4).check(10, 4)
    with pytest.raises(ValueError, match="devices=6"):
        Layout("zigzag", 4).check(16, 6)
