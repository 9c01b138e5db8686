"""Lightning attention for callers: checks, choice of the backend, gradients."""

import functools
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.lightning_attention import gpu, reference, tpu, xla
from pallas_kernels.lightning_attention.tiles import (
    GpuTiles,
    Spec,
    TpuTiles,
    XlaTiles,
    state_dtype,
)

# The backends, and the tile class that each takes.
BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "xla": xla,
    "tpu": tpu,
    "gpu": gpu,
}
TILES: dict[str, type] = {"xla": XlaTiles, "tpu": TpuTiles, "gpu": GpuTiles}


@overload
def lightning_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    *,
    state: Float[Array, "B H D E"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    return_state: Literal[False] = False,
    backend: str = "auto",
    tiles: Any = None,
) -> Float[Array, "B T H E"]: ...
@overload
def lightning_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    *,
    state: Float[Array, "B H D E"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    return_state: Literal[True],
    backend: str = "auto",
    tiles: Any = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]: ...
def lightning_attention(
    q,
    k,
    v,
    log_decay,
    *,
    state=None,
    doc_start=None,
    return_state=False,
    backend="auto",
    tiles=None,
):
    """Linear attention with one decay per head, in time linear in the length.

    Definition, for each batch row and head, S being `state` (or 0) at first::

        S_t = exp(log_decay) S_{t-1} + k_t v_t^T        o_t = q_t S_t

    In a packed row S is 0 before the first token of each document. The final state is that of
    the last token's document, its last token undecayed: `lightning_step` continues from it.
    All inputs but `doc_start` are differentiable, once and in reverse mode.

    Args:
      q, k, v: [B, T, H, D], [B, T, H, D] and [B, T, H, E], of one floating dtype.
      log_decay: [H], natural logarithms of the decays, at most 0. The sign is checked only
        when the values are known, that is outside of jit.
      state: [B, H, D, E] float32, what earlier tokens have left, or None.
      doc_start: [B, T] integers, for each token the position in this array at which its
        document begins; documents are contiguous. A negative value is a document that began
        before this array, which therefore sees `state`. None is one such document.
      return_state: return (o, final state).
      backend: "auto" (the best one for the platform being compiled for), "reference", "xla",
        "tpu" or "gpu".
      tiles: tile sizes for a named backend; its default table if None.

    Returns:
      o [B, T, H, E] in the dtype of v; with `return_state` also the state [B, H, D, E], float32.

    Raises:
      ValueError: a shape, dtype, or value breaks a rule above.
      NotImplementedError: the named backend cannot serve this call.

    Source: arXiv 2401.04658 (Lightning Attention-2), arXiv 2405.17381 appendices A to C.
    """
    arrays = _arrays(q, k, v, log_decay, state, doc_start)
    spec = make_spec(*arrays)
    _check_backend(backend, tiles, spec)
    arrays = _unified(*arrays)
    if backend == "reference":
        out = reference.fwd(*arrays)
    else:
        out = _attention(_Static(backend, spec, tiles, return_state), *arrays)
    return out if return_state else out[0]


def lightning_state(
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    *,
    state: Float[Array, "B H D E"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    backend: str = "auto",
) -> Float[Array, "B H D E"]:
    """The final state of `lightning_attention`, without its outputs: reads only k and v.

    Definition: sum over the tokens s of the last document of exp(log_decay)^(T-1-s) k_s v_s^T,
    plus exp(log_decay)^T `state` if that document began before this array. Arguments, errors
    and source as in `lightning_attention`; differentiable in the same way.
    """
    arrays = _arrays(k, k, v, log_decay, state, doc_start)
    spec = make_spec(*arrays)
    _check_backend(backend, None, spec)
    _, *arrays = _unified(*arrays)
    if backend == "reference":
        return reference.final_state(*arrays)
    return _final_state(_Static(backend, spec), *arrays)


def lightning_dstate(
    q: Float[Array, "B T H D"],
    do: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    *,
    doc_start: Int[Array, "B T"] | None = None,
    backend: str = "auto",
) -> Float[Array, "B H D E"]:
    """What the cotangent `do` of the outputs of `lightning_attention` sends to its `state`.

    Definition: sum over the tokens t = 0, 1, ... of the document that began before this array of
    exp(log_decay)^(t+1) q_t do_t^T: `lightning_state` in reversed time. Reads only q and do. For
    those who write backward passes: it has no derivative. Shapes, dtypes and errors as in
    `lightning_attention`, `do` in the place of v.
    """
    arrays = _arrays(q, q, do, log_decay, None, doc_start)
    spec = make_spec(*arrays)
    _check_backend(backend, None, spec)
    q, _, do, log_decay, _, doc_start = _unified(*arrays)
    return _Static(backend, spec).call("initial_cotangent", q, do, log_decay, doc_start)


def lightning_pieces(
    q: Float[Array, "B T H D"], v: Float[Array, "B T H E"], *, backend: str = "auto"
) -> int:
    """In how many pieces of its sequence, given their states, `lightning_attention` is fastest.

    A power of two that divides T: few heads leave a GPU idle, and its backend then cuts the
    sequence, for whose states k and v are read once more. Where these are known anyway, pieces
    may be rows of the batch instead. 1 where the GPU kernels do not serve the call.
    """
    B, T, H, D = q.shape
    spec = Spec(B, T, H, D, v.shape[-1], q.dtype, packed=False)
    serves = gpu.unsupported(spec) is None and (
        backend == "gpu" or (backend == "auto" and _dispatch.target().platform == "gpu")
    )
    return gpu.pieces(spec) if serves else 1


def lightning_step(
    q: Float[Array, "B H D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"],
) -> tuple[Float[Array, "B H E"], Float[Array, "B H D E"]]:
    """One token of `lightning_attention`, for decoding: S <- exp(log_decay) S + k v^T; o = q S.

    Elementwise products and a sum, which XLA fuses: the state is read once and written once.
    Donate the state to update it in place. Plain JAX, hence differentiable and the same on every
    platform. Returns o in the dtype of v and the state in float32.

    Raises:
      ValueError: a shape or dtype breaks a rule of `lightning_attention`.
    """
    q, k, v, log_decay, state, _ = _arrays(q, k, v, log_decay, state, None)
    make_spec(q, k, v, log_decay, state, None, axes="BHD")
    wide = state.dtype
    decay = jnp.exp(log_decay.astype(wide))[None, :, None, None]
    update = k.astype(wide)[..., :, None] * v.astype(wide)[..., None, :]
    state = decay * state + update
    o = jnp.sum(q.astype(wide)[..., :, None] * state, axis=2)
    return o.astype(v.dtype), state


def _arrays(*inputs: Any) -> list[Any]:
    return [None if x is None else jnp.asarray(x) for x in inputs]


def make_spec(q, k, v, log_decay, state, doc_start, axes: str = "BTHD") -> Spec:
    """Raise on any input that breaks a rule; return what the backends need to know."""
    if q.ndim != len(axes):
        raise ValueError(f"q has shape {q.shape}; its axes must be {' '.join(axes)}")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; it must be that of q, {q.shape}")
    if v.shape[:-1] != q.shape[:-1] or v.ndim != q.ndim:
        raise ValueError(f"v has shape {v.shape}; all but the last axis must equal q's {q.shape}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q has shape {q.shape}, v {v.shape}; every axis must be at least 1 long")
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must share a floating one"
        )
    sizes = dict(zip(axes, q.shape, strict=True))
    batch, length, heads = sizes["B"], sizes.get("T", 1), sizes["H"]
    if log_decay.shape != (heads,) or not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise ValueError(
            f"log_decay is {log_decay.dtype}{log_decay.shape}; it must be float[{heads}]"
        )
    known = not isinstance(log_decay, jax.core.Tracer) and log_decay.is_fully_addressable
    if known and not np.all(np.asarray(log_decay) <= 0):
        raise ValueError(f"{log_decay=} must be at most 0: a decay above 1 grows without bound")
    wide = state_dtype(q.dtype)
    state_shape = (batch, heads, sizes["D"], v.shape[-1])
    if state is not None and (state.shape != state_shape or state.dtype != wide):
        raise ValueError(f"state is {state.dtype}{state.shape}; it must be {wide}{state_shape}")
    if doc_start is not None and (
        doc_start.shape != (batch, length) or not jnp.issubdtype(doc_start.dtype, jnp.integer)
    ):
        raise ValueError(
            f"doc_start is {doc_start.dtype}{doc_start.shape}; it must be int{(batch, length)}"
        )
    packed = doc_start is not None
    return Spec(batch, length, heads, sizes["D"], v.shape[-1], q.dtype, packed)


def _check_backend(backend: str, tiles: Any, spec: Spec) -> None:
    _dispatch.check_backend(backend, BACKENDS, spec)
    if tiles is not None and not isinstance(tiles, TILES.get(backend, ())):
        wanted = TILES[backend].__name__ if backend in TILES else "None"
        raise ValueError(f"{tiles=} with {backend=}: it must be {wanted}")


def _unified(q, k, v, log_decay, state, doc_start) -> tuple[Any, ...]:
    """Canonical dtypes, and one set of varying mesh axes: custom_vjp refuses a mixture.

    A log_decay of -inf becomes finite, so that it may be multiplied by a distance of 0.
    """
    log_decay = jnp.maximum(log_decay.astype(state_dtype(q.dtype)), -1e4)
    if doc_start is not None:
        doc_start = doc_start.astype(jnp.int32)
    arrays = (q, k, v, log_decay, state, doc_start)
    return unify_varying(arrays, varying_axes(*arrays))


class _Static(NamedTuple):
    """What the custom_vjp functions know without tracing."""

    backend: str
    spec: Spec
    tiles: Any = None
    return_state: bool = True

    def call(self, name: str, *args: Any) -> Any:
        """The backend's function `name`, its results varying as its first argument does."""
        # A Python int must not become int64 inside a kernel: Mosaic refuses it.
        with jax.enable_x64(self.spec.dtype == jnp.float64):
            out = _dispatch.call(name, self.backend, BACKENDS, self.spec, *args, tiles=self.tiles)
        return unify_varying(out, varying_axes(args[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, log_decay, state, doc_start):
    return static.call("fwd", q, k, v, log_decay, state, doc_start)


def _attention_fwd(static, *inputs):
    return _attention(static, *inputs), inputs


def _attention_bwd(static, inputs, cotangents):
    state = inputs[4]
    do, dstate = cotangents if static.return_state else (cotangents[0], None)
    dq, dk, dv, dinitial = static.call("bwd", *inputs, do, dstate)
    dlog_decay = _dlog_decay(inputs, do, dstate)
    return dq, dk, dv, dlog_decay, None if state is None else dinitial, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _dlog_decay(inputs, do, dstate) -> Float[Array, "H"]:
    """The cotangent of log_decay, whatever the backend; XLA drops it where nobody asks.

    Heads do not mix, so one forward-mode pass gives the derivative of every output by its own
    head's log_decay. The textbook sum over t of t (q_t.dq_t - k_t.dk_t) costs less but cancels:
    its error, against the result, grows with the length over the decay's reach.
    """
    q, k, v, log_decay, state, doc_start = inputs
    ones = unify_varying(jnp.ones_like(log_decay), varying_axes(log_decay))
    wide = log_decay.dtype
    q, k, v = (x.astype(wide) for x in (q, k, v))  # a few numbers, each a sum that cancels

    def outputs(log_decay):
        return xla.fwd(q, k, v, log_decay, state, doc_start)

    _, (o, final) = jax.jvp(outputs, (log_decay,), (ones,))
    total = jnp.einsum("BTHE,BTHE->H", do.astype(wide), o)
    if dstate is not None:
        total += jnp.einsum("BHDE,BHDE->H", dstate, final)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _final_state(static: _Static, k, v, log_decay, state, doc_start):
    return static.call("final_state", k, v, log_decay, state, doc_start)


def _final_state_fwd(static, *inputs):
    return _final_state(static, *inputs), inputs


def _final_state_bwd(static, inputs, dstate):
    """Closed form: the final state is linear in k, in v, and in the initial state."""
    del static
    k, v, log_decay, state, doc_start = inputs
    length, wide = k.shape[1], dstate.dtype
    age = (length - 1 - jnp.arange(length, dtype=wide))[None, :, None, None]
    weight = jnp.exp(log_decay[None, None, :, None] * age)
    carry = jnp.exp(log_decay * length)[None, :, None, None]
    if doc_start is not None:
        last = doc_start[:, -1, None, None, None]
        weight = jnp.where(
            last <= jnp.arange(length, dtype=jnp.int32)[None, :, None, None], weight, 0
        )
        carry = jnp.where(last < 0, carry, 0)
    dot = functools.partial(jnp.einsum, precision=xla.precision(k.dtype))
    dk = weight * dot("BTHE,BHDE->BTHD", v.astype(wide), dstate)
    dv = weight * dot("BTHD,BHDE->BTHE", k.astype(wide), dstate)
    dinitial = carry * dstate
    dlog_decay = jnp.sum(age * k.astype(wide) * dk, axis=(0, 1, 3))
    if state is not None:
        dlog_decay += length * jnp.sum(state * dinitial, axis=(0, 2, 3))
    dinitial = None if state is None else dinitial
    return dk.astype(k.dtype), dv.astype(v.dtype), dlog_decay, dinitial, None


_final_state.defvjp(_final_state_fwd, _final_state_bwd)
