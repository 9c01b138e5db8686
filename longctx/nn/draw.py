"""Random numbers that a module draws in every call, from a key that it holds.

The same key draws the same numbers again: in rematerialisation, in decoding, in a resumed run.
"""

import jax
from flax import nnx
from jaxtyping import Array


class Draw(nnx.Variable):
    """Raw PRNG key data, uint32 [2], of what a module draws at random in every call."""


def redraw(state: nnx.State) -> nnx.State:
    """`state` with another key, derived from its last, in every `Draw`.

    For between training steps: calls that share a cache must share their draws.
    """

    def next_key(data: Array) -> Array:
        if data.ndim > 1:  # stacked layers
            return jax.vmap(next_key)(data)
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data), 1))

    def renew(variable: nnx.Variable) -> nnx.Variable:
        drawn = isinstance(variable, Draw)
        return variable.replace(next_key(variable[...])) if drawn else variable

    return jax.tree.map(renew, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def new_draw(rngs: nnx.Rngs) -> Draw:
    """The `Draw` of a new module."""
    return Draw(jax.random.key_data(rngs.params()), out_sharding=(None,), eager_sharding=False)
