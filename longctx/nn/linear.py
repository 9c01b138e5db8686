"""Dense projections and the token embedding."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.nn.sharding import Axes, AxisNames, gather, parameter
from longctx.nn.weights import Gathered, copies, cut_of
from longctx.parallel.placement import place, placed_by_xla

INIT_STD = 0.02  # normal(0, 0.02) for every weight: the TransNormerLLM authors' code


class Linear(nnx.Module):
    """y = x @ kernel without bias; `features` may have several axes, for fused projections.

    y[..., f, g] = sum_m x[..., m] kernel[m, f, g]. Products run in `dtype` and accumulate in
    float32 on every accelerator; the result has `dtype`.
    """

    def __init__(
        self,
        in_features: int,
        features: int | Sequence[int],
        *,
        spec: Sequence[AxisNames],
        axes: Axes,
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, *([features] if isinstance(features, int) else features))
        init = jax.nn.initializers.normal(std)
        self.kernel = parameter(init, shape, param_dtype, spec, rngs)
        self.kept = P(*spec)
        self.used = P(*(None if name == axes.fsdp else name for name in spec))
        self.dtype = dtype
        self.axes = axes
        self.gathered: Gathered | None = nnx.data(None)  # by `gather_layers`

    def weight(self) -> Float[Array, "..."]:
        """The kernel as products take it: in `dtype`, and whole along `fsdp`.

        Where weights were gathered before, one copy for each of N devices along the sequence.
        """
        kernel = self.kernel[...].astype(self.dtype)
        if self.gathered is None:
            return gather(kernel, self.kept, self.used)
        return copies(self.gathered.cut, kernel, jax.lax.stop_gradient(self.gathered[...]))

    def __call__(
        self, x: Float[Array, "*rows M"], weight: Float[Array, "M ..."] | None = None
    ) -> Float[Array, "..."]:
        """Project the last axis; by `weight`, if it is at hand from an earlier call."""
        weight = self.weight() if weight is None else weight
        if self.gathered is not None:
            return self.gathered.cut.product(x.astype(self.dtype), weight)
        product = functools.partial(jnp.tensordot, axes=1)
        split = P(*self.axes.rows(x.ndim - 1), *self.used[1:])
        return placed_by_xla(product, x.astype(self.dtype), weight, split=split)


def gather_layers[M: nnx.Module](layers: M) -> M:
    """A copy of stacked layers that holds their weights, where devices along `seq` have parts."""
    copy = nnx.clone(layers)
    for _, part in nnx.iter_modules(copy):
        if isinstance(part, Linear):
            cut = cut_of(part.kernel.shape[1:], part.kept, part.used, part.axes.seq)
            if cut is not None:
                # XLA would gather parameters, and round them in every layer.
                rounded = jax.lax.optimization_barrier(part.kernel[...].astype(part.dtype))
                part.gathered = Gathered(cut.gather(rounded), cut=cut)
    return copy


class Embedding(nnx.Module):
    """A table [V, M] of vectors, looked up by integer.

    The devices along `fsdp` look up their columns for the tokens of all of them, and then swap
    columns for tokens: neither the table nor its gradient is ever whole on one device. Along `seq`
    they sum their tables' gradients or, if tokens are fewer than rows, swap those of the tokens.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        axes: Axes,
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.normal(std)
        self.table = parameter(init, (rows, width), param_dtype, (axes.tensor, axes.columns), rngs)
        self.shared = tuple(name for name in axes.batch if name not in axes.columns)
        self.axes = axes
        self.dtype = dtype

    def __call__(self, index: Int[Array, "*rows"]) -> Float[Array, "*rows M"]:
        """Rows of the table in the compute dtype."""
        # Rows are rounded after the look-up, so that a frequent token's gradient, the sum over
        # all its occurrences, is taken in the parameters' dtype.
        columns = P(self.shared, self.axes.seq, self.axes.columns)
        few = index.size < self.table.shape[0]
        everyone = P(self.shared, None, self.axes.columns) if few else columns
        index = place(index, P(*everyone[:-1]))
        look_up = functools.partial(jnp.take, axis=0, mode="clip")
        rows = place(placed_by_xla(look_up, self.table[...], index, split=everyone), everyone)
        return gather(rows.astype(self.dtype), everyone, columns)
