"""Keys that lie in pieces in several arrays, and calls for the last rows only.

In a ring a rank's late rows attend to its own keys while another's are on their way. The early rows
then meet both in one block, in the order of their positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.tiles import Spec

MOST_PIECES = 8  # that kernels know the order of


class Pieces(NamedTuple):
    """Keys, or values, of arrays of one shape; `order` names their pieces one after another.

    All pieces are of one length: 0 is the first of the first array, and so on through all arrays.
    """

    arrays: Sequence[Float[Array, "B S K D"]]
    order: Int[Array, "pieces"]

    @property
    def length(self) -> int:
        """Keys of all pieces."""
        return sum(x.shape[1] for x in self.arrays)

    @property
    def size(self) -> int:
        """Keys of one piece."""
        return self.length // self.order.shape[0]

    def like(self) -> jax.ShapeDtypeStruct:
        """What `joined` would be.

        Raises:
          ValueError: the arrays differ, or `order` does not name their pieces.
        """
        (batch, keys, *rest), dtype = self.arrays[0].shape, self.arrays[0].dtype
        if any(x.shape != self.arrays[0].shape or x.dtype != dtype for x in self.arrays):
            found = [f"{x.dtype} {x.shape}" for x in self.arrays]
            raise ValueError(f"arrays of Pieces must be of one shape and dtype, got {found}")
        count, arrays = self.order.size, len(self.arrays)
        whole = count % arrays == 0 and keys % max(1, count // arrays) == 0
        if self.order.ndim != 1 or not whole or not 2 <= count <= MOST_PIECES:
            raise ValueError(
                f"order of shape {self.order.shape} must name 2 to {MOST_PIECES} pieces, equally "
                f"many and long in each of {arrays} arrays of {keys} keys"
            )
        return jax.ShapeDtypeStruct((batch, self.length, *rest), dtype)

    def joined(self) -> Float[Array, "B S K D"]:
        """All keys in order, as one array."""
        batch, _, *rest = self.arrays[0].shape
        pieces = jnp.concatenate(self.arrays, 1).reshape(batch, -1, self.size, *rest)
        return jnp.take(pieces, self.order, axis=1).reshape(batch, -1, *rest)


def whole(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"] | Pieces,
    v: Float[Array, "B S K E"] | Pieces,
    carry: tuple[Float[Array, "B C H E"], Float[Array, "B H C"]] | None,
    spec: Spec,
) -> tuple[Array, Array, Array, tuple[Array, Array] | None]:
    """The same call with one array of keys, of its rows only, with a carry of all of them."""
    q = q[:, q.shape[1] - spec.q_length :]
    k, v = (x.joined() if isinstance(x, Pieces) else x for x in (k, v))
    if carry is not None and (new := spec.q_length - carry[0].shape[1]):
        o, lse = carry
        o = jnp.pad(o, [(0, 0), (new, 0), (0, 0), (0, 0)])
        carry = o, jnp.pad(lse, [(0, 0), (0, 0), (new, 0)], constant_values=-jnp.inf)
    return q, k, v, carry
