"""Linear attention over a sharded sequence: only states cross devices, whatever the length.

Every rank's tokens are one run of the sequence (contiguous) or two (zigzag), each cut into as many
pieces, of h tokens, as fill the device side by side. With S_j the state that piece j alone leaves
behind, D_j what its rows alone send back to its initial state, e_j the position at which it ends,
and d_j the first position of its last token's document:

    state into piece i        sum_{j < i} w_ij S_j     w_ij = exp(log_decay)^(h (i - 1 - j))
    cotangent out of piece j  sum_{i > j} w_ij D_i             where d_{i-1} < e_j, else 0

so one exchange of states suffices each way: LASP-2 (arXiv 2502.07563) with decay and documents.
The pieces of a run are joined before: what is exchanged is one state per run. Striped ranks are
refused: what one of them owes another is not a product with any state, since their tokens
interleave and every pair has its own decay.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import BATCH, free_size, sequence_axis, shard_operator
from pallas_kernels._dispatch import check_name
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.lightning_attention import (
    lightning_attention,
    lightning_dstate,
    lightning_pieces,
    lightning_state,
)
from pallas_kernels.lightning_attention.api import BACKENDS, make_spec

Exchange = Literal["all_gather", "ring"]

# Name, for rematerialisation policies, of the states with which pieces begin. Where they are kept
# (B H D E float32 per piece) the backward pass does not exchange them again.
INCOMING = "incoming_state"


def context_lightning(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    *,
    strategy: Exchange = "all_gather",
    layout: Layout | Kind = "contiguous",
    doc_start: Int[Array, "B T"] | None = None,
    backend: str = "auto",
    axis: str | None = "seq",
    batch_axes: tuple[str, ...] = BATCH,
    head_axis: str | None = "tensor",
) -> Float[Array, "B T H E"]:
    """`lightning_attention` whose sequence is sharded over the mesh axis `axis`.

    Communicates B H D E float32 per run and direction, independent of T. Call it as
    `context_attention`, with the tokens in the order of `layout`.

    Args:
      strategy: how states are exchanged, by one all-gather (LASP-2) or in P - 1 hops.
      layout: "contiguous" or "zigzag"; a name means one rank per device along `axis` of the mesh
        of `jax.set_mesh`: one rank, slots as they come, without such a mesh.
      doc_start: position of the first token of each token's document, laid out as the tokens
        are (its values are positions, not slots).
      backend: as in `lightning_attention`.
      axis: mesh axis along the sequence; None: it is not sharded.
      batch_axes: mesh axes along the batch, for global arrays.
      head_axis: mesh axis along the heads, for global arrays.

    Raises:
      ValueError: shapes, layout or axes do not fit together, or the layout is striped.
    """
    if strategy not in get_args(Exchange):
        raise ValueError(f"{strategy=} must be one of {get_args(Exchange)}")
    if q.ndim != 4 or v.ndim != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q, k, v must be [B, T, H, D], [B, T, H, D], [B, T, H, E], "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    make_spec(q, k, v, log_decay, None, doc_start)  # raises as kernels would
    check_name(backend, BACKENDS)
    devices, inside = sequence_axis(axis)
    length = q.shape[1] * devices if inside else q.shape[1]
    layout = as_layout(layout, devices)
    layout.check(length, devices)
    if layout.kind == "striped" and not layout.in_order:
        raise ValueError(
            f"{layout}: linear attention needs runs of successive tokens, since the decay "
            "between two striped ranks differs for every pair of tokens: use zigzag or contiguous"
        )
    if q.shape[2] % free_size(head_axis):
        raise ValueError(f"{q.shape[2]} heads must be a multiple of the devices along {head_axis=}")
    call = _Call(strategy, axis or "", devices, layout, length, backend)
    tokens = P(batch_axes, axis)
    rows = P(batch_axes, axis, head_axis, None)
    operator = shard_operator(
        functools.partial(_whole if devices == 1 else _sharded, call),
        (rows, rows, rows, P(head_axis), tokens),
        rows,
    )
    return operator(q, k, v, log_decay, doc_start)


class _Call(NamedTuple):
    """What is static: the exchange, and how the sequence is cut into runs."""

    strategy: Exchange
    axis: str
    devices: int
    layout: Layout
    length: int
    backend: str
    pieces: int = 1  # of each run

    @property
    def runs(self) -> int:
        """Runs of successive tokens on each device."""
        return 1 if self.layout.in_order else 2

    @property
    def parts(self) -> int:
        """Pieces on each device."""
        return self.runs * self.pieces

    @property
    def piece(self) -> int:
        """Tokens in a piece."""
        return self.length // (self.devices * self.parts)

    def numbers(self) -> Int[np.ndarray, "P n"]:
        """Number, in position order, of every device's pieces."""
        first = self.layout.order(self.length)[:: self.piece]
        return (first // self.piece).reshape(self.devices, self.parts)

    def split(self, x: Array) -> Array:
        """[B, T, ...] as one batch row per piece, [B n, h, ...]."""
        return x.reshape(x.shape[0] * self.parts, self.piece, *x.shape[2:])

    def by_piece(self, state: Array) -> Array:
        """[B n, H, D, E] as [n, B, H, D, E]."""
        return jnp.moveaxis(state.reshape(-1, self.parts, *state.shape[1:]), 1, 0)

    def flat(self, state: Array) -> Array:
        """The inverse of `by_piece`."""
        return jnp.moveaxis(state, 0, 1).reshape(-1, *state.shape[2:])


def _whole(
    call: _Call, q: Array, k: Array, v: Array, log_decay: Array, doc_start: Array | None
) -> Array:
    return lightning_attention(q, k, v, log_decay, doc_start=doc_start, backend=call.backend)


def _sharded(
    call: _Call, q: Array, k: Array, v: Array, log_decay: Array, doc_start: Array | None
) -> Array:
    """Split into pieces, with documents counted from each piece's first token."""
    pieces = lightning_pieces(call.split(q), call.split(v), backend=call.backend)
    call = call._replace(pieces=pieces)
    numbers, documents = jnp.asarray(call.numbers()), None
    mine = numbers[lax.axis_index(call.axis)]
    if doc_start is not None:
        last = call.split(doc_start)[:, -1].reshape(-1, call.parts)
        gathered = lax.all_gather(last, call.axis).swapaxes(1, 2)  # [P, n, B]
        order = np.argsort(call.numbers().reshape(-1))
        documents = checkpoint_name(gathered.reshape(-1, gathered.shape[2])[order], INCOMING)
        starts = jnp.tile(mine * call.piece, q.shape[0])[:, None]
        doc_start = call.split(doc_start) - starts
    arrays = (*map(call.split, (q, k, v)), log_decay, doc_start, documents)
    axes = varying_axes(*arrays) | {call.axis}
    return _attend(call, *unify_varying(arrays, axes)).reshape(v.shape)


def _weights(
    call: _Call, log_decay: Array, documents: Array | None, to: Array, source: Array
) -> Float[Array, "n m B H"]:
    """w_ij of the pieces `to` (n) and `source` (m); B is 1 without documents."""
    to, source = to[:, None], source[None, :]
    steps = jnp.maximum(to - 1 - source, 0) * call.piece
    weights = jnp.exp(steps[..., None] * log_decay[None, None])[:, :, None]
    seen = (source < to)[..., None]
    if documents is not None:
        seen &= documents[jnp.maximum(to - 1, 0)] < ((source + 1) * call.piece)[..., None]
    return jnp.where(seen[..., None], weights, 0)


def _exchange(
    call: _Call,
    local: Float[Array, "n B H D E"],
    weights: Callable[[Array, Array], Float[Array, "n m B H"]],
    *,
    reverse: bool,
) -> Float[Array, "n B H D E"]:
    """For my pieces i the sum, over all pieces j, of weights(i, j) times their `local`.

    `reverse`: the sum is over later pieces, not earlier ones.
    """
    rank = lax.axis_index(call.axis)
    numbers = jnp.asarray(call.numbers()).reshape(call.devices, call.runs, call.pieces)
    mine = numbers[rank]
    ends = numbers[:, :, 0 if reverse else -1]  # of the runs, where their sums leave them

    def weighted(to: Array, source: Array, states: Array) -> Array:
        return jnp.sum(weights(to, source)[..., None, None] * states[None], axis=1)

    total = jnp.zeros_like(local)
    if call.pieces > 1:
        by_run = local.reshape(call.runs, call.pieces, *local.shape[1:])
        total = jax.vmap(weighted)(mine, mine, by_run).reshape(local.shape)
        behind = (ends[rank] + (-1 if reverse else 1))[:, None]
        local = jax.vmap(weighted)(behind, mine, by_run)[:, 0]
    mine = mine.reshape(-1)
    if call.strategy == "all_gather":
        states = lax.all_gather(local, call.axis, tiled=True)
        return total + weighted(mine, ends.reshape(-1), states)
    onwards = [(p, (p + 1) % call.devices) for p in range(call.devices)]
    for hop in range(call.devices):
        total += weighted(mine, ends[(rank - hop) % call.devices], local)
        if hop + 1 < call.devices:
            local = lax.ppermute(local, call.axis, onwards)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, k, v, log_decay, doc_start, documents):
    return _attend_fwd(call, q, k, v, log_decay, doc_start, documents)[0]


def _attend_fwd(call: _Call, q, k, v, log_decay, doc_start, documents):
    local = lightning_state(k, v, log_decay, doc_start=doc_start, backend=call.backend)
    weights = functools.partial(_weights, call, log_decay.astype(local.dtype), documents)
    state = call.flat(_exchange(call, call.by_piece(local), weights, reverse=False))
    state = checkpoint_name(state, INCOMING)
    o = lightning_attention(
        q, k, v, log_decay, state=state, doc_start=doc_start, backend=call.backend
    )
    return o, (q, k, v, log_decay, doc_start, documents, state)


def _attend_bwd(call: _Call, saved, do):
    q, k, v, log_decay, doc_start, documents, state = saved
    rate = log_decay.astype(state.dtype)
    local = lightning_dstate(q, do, log_decay, doc_start=doc_start, backend=call.backend)

    def weights(to: Array, source: Array) -> Array:  # the transpose
        return jnp.swapaxes(_weights(call, rate, documents, source, to), 0, 1)

    dfinal = call.flat(_exchange(call, call.by_piece(local), weights, reverse=True))

    def attend(q, k, v, log_decay):
        return lightning_attention(
            q, k, v, log_decay,
            state=state, doc_start=doc_start, return_state=True, backend=call.backend,
        )  # fmt: skip

    return *jax.vjp(attend, q, k, v, log_decay)[1]((do, dfinal)), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
