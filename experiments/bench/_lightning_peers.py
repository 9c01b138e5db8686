"""The lightning attention calls that the benchmark times: ours and those of its peers."""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.bench._passes import with_gradients
from pallas_kernels.lightning_attention import alibi_log_decay, lightning_attention

FORWARD = ("q", "k", "v")
INPUTS = (*FORWARD, "do")  # of forward + backward


class Shape(NamedTuple):
    """One call: B rows of T tokens, H heads of width D for q, k and v."""

    batch: int
    length: int
    heads: int = 16
    width: int = 128
    dtype: Any = jnp.bfloat16
    decays: bool = True

    def inputs(self, names: Sequence[str] = INPUTS) -> dict[str, jax.Array]:
        """Random q, k, v and do, as far as they are named, and the log decays."""
        keys = dict(zip(INPUTS, jax.random.split(jax.random.key(0), len(INPUTS)), strict=True))
        found = {name: draw(self, keys[name]) for name in names}
        return found | {"log_decay": alibi_log_decay(self.heads, 0, 1) * self.decays}

    def megabytes(self, tensors: int) -> float:
        """Of so many arrays like q."""
        size = self.batch * self.length * self.heads * self.width
        return tensors * size * jnp.dtype(self.dtype).itemsize / 1e6


@functools.partial(jax.jit, static_argnums=0)
def draw(shape: Shape, key: jax.Array) -> jax.Array:
    """A normal array like q, by pieces: the bits of a whole one take several times its room."""
    tokens = shape.batch * shape.length
    piece = math.gcd(tokens, 16384)

    def rows(key):
        return jax.random.normal(key, (piece, shape.heads, shape.width), shape.dtype)

    pieces = jax.lax.map(rows, jax.random.split(key, tokens // piece))
    return pieces.reshape(shape.batch, shape.length, shape.heads, shape.width)


class Calls(NamedTuple):
    """An implementation on given inputs: forward, forward + backward, and how to wait."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[Any, ...]]
    wait: Callable[[Any], Any] = jax.block_until_ready


def lowerings(name: str, shape: Shape) -> list[Callable[[], jax.stages.Lowered]]:
    """Of the forward and of forward + backward of one of `OPERATORS`, or of `EXACT`."""
    exact = name == EXACT
    attend = OPERATORS["xla" if exact else name]

    def lower(function: Callable[..., Any], *args: str) -> jax.stages.Lowered:
        types = jax.eval_shape(shape.inputs)
        with jax.enable_x64(exact):
            given = (types[arg] for arg in args)
            dtypes = [(x.shape, jnp.float64 if exact else x.dtype) for x in given]
            return jax.jit(function).lower(*(jax.ShapeDtypeStruct(*x) for x in dtypes))

    return [
        functools.partial(lower, attend, *FORWARD, "log_decay"),
        functools.partial(lower, with_gradients(attend), *INPUTS, "log_decay"),
    ]


def on(programs: Sequence[Any], inputs: Mapping[str, jax.Array]) -> Calls:
    """The two programs of `lowerings` bound to arrays; one that was refused raises its refusal."""

    def bound(program: Any, names: Sequence[str]) -> Callable[[], Any]:
        def refuse():
            raise program

        if isinstance(program, BaseException):
            return refuse
        return functools.partial(program, *(inputs[name] for name in (*names, "log_decay")))

    forward, both = programs
    return Calls(bound(forward, FORWARD), bound(both, INPUTS))


def float64(programs: Sequence[Any], inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """o, dq, dk, dv by the programs of `EXACT`."""
    with jax.enable_x64(True):
        return on(programs, {n: x.astype(jnp.float64) for n, x in inputs.items()}).both()


def scan(q, k, v, log_decay) -> jax.Array:
    """The chunked form as a textbook has it: a scan over chunks of 64, derived by autodiff."""
    chunk = 64
    i = jnp.arange(chunk)
    rate = log_decay.astype(jnp.float32)[:, None]
    pair = jnp.where(i[:, None] >= i, jnp.exp(rate[:, :, None] * (i[:, None] - i)), 0)
    query, key = jnp.exp(rate * (i + 1)), jnp.exp(rate * (chunk - 1 - i))
    through = jnp.exp(rate * chunk)[:, :, None]

    def step(state, rows):
        q, k, v = rows  # [B, C, H, D]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * pair
        o = jnp.einsum("bhts,bshe->bthe", scores.astype(v.dtype), v)
        o += jnp.einsum("bthd,ht,bhde->bthe", q, query, state)
        return through * state + jnp.einsum("bshd,hs,bshe->bhde", k, key, v), o.astype(v.dtype)

    batch, length, heads, width = q.shape
    chunks = (
        jnp.moveaxis(x.reshape(batch, length // chunk, chunk, heads, width), 1, 0)
        for x in (q, k, v)
    )
    state = jnp.zeros((batch, heads, width, width), jnp.float32)
    _, o = jax.lax.scan(step, state, tuple(chunks))
    return jnp.moveaxis(o, 0, 1).reshape(v.shape)


def of_fla(name: str, inputs: Mapping[str, jax.Array]) -> Calls:
    """An operator of flash-linear-attention on the same memory; `name` as in `IMPLEMENTATIONS`."""
    torch = importlib.import_module("torch")
    function = getattr(importlib.import_module("fla.ops.simple_gla"), name.removeprefix("fla "))
    q, k, v, do, gamma = (torch.from_dlpack(inputs[n]) for n in (*INPUTS, "log_decay"))

    def forward():
        with torch.no_grad():
            return function(q, k, v, g_gamma=gamma, scale=1.0)[0]

    wanted = [x.detach().requires_grad_() for x in (q, k, v)]

    def both():
        o = function(*wanted, g_gamma=gamma, scale=1.0)[0]
        return o, *torch.autograd.grad(o, wanted, do)

    return Calls(forward, both, lambda _: torch.cuda.synchronize())


OPERATORS: dict[str, Callable[..., Any]] = {
    "ours": functools.partial(lightning_attention, backend="auto"),
    "xla": functools.partial(lightning_attention, backend="xla"),
    "scan": scan,
}
EXACT = "float64"
FLA = ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla")
IMPLEMENTATIONS = (*OPERATORS, *(f"fla {name}" for name in FLA))
