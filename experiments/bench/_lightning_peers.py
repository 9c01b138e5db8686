"""The lightning attention calls that the benchmark times: ours and those of its peers."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.bench._timing import REFUSALS
from pallas_kernels.lightning_attention import alibi_log_decay, lightning_attention


class Shape(NamedTuple):
    """One call: B rows of T tokens, H heads of width D for q, k and v."""

    batch: int
    length: int
    heads: int = 16
    width: int = 128
    dtype: Any = jnp.bfloat16
    decays: bool = True

    def inputs(self) -> tuple[jax.Array, ...]:
        """Random q, k, v, do and the log decays."""

        @jax.jit
        def draw():
            keys = jax.random.split(jax.random.key(0), 4)
            shape = (self.batch, self.length, self.heads, self.width)
            return tuple(jax.random.normal(key, shape, self.dtype) for key in keys)

        log_decay = alibi_log_decay(self.heads, 0, 1) * self.decays
        return *draw(), log_decay

    def megabytes(self, tensors: int) -> float:
        """Of so many arrays like q."""
        size = self.batch * self.length * self.heads * self.width
        return tensors * size * jnp.dtype(self.dtype).itemsize / 1e6


class Calls(NamedTuple):
    """An implementation on given inputs: forward, forward + backward, and how to wait."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[Any, ...]]
    wait: Callable[[Any], Any] = jax.block_until_ready


class Programs(NamedTuple):
    """What XLA made of an operator of (q, k, v, log_decay), for arrays of one shape."""

    forward: Callable[..., Any]
    both: Callable[..., tuple[Any, ...]]

    def on(self, q, k, v, do, log_decay) -> Calls:
        """Bound to arrays."""
        return Calls(
            lambda: self.forward(q, k, v, log_decay), lambda: self.both(q, k, v, do, log_decay)
        )


def compiled(attend: Callable[..., jax.Array], shape: Shape, dtype: Any = None) -> Programs:
    """Compile for a shape, without arrays, so that threads can do so side by side."""

    def both(q, k, v, do, log_decay):
        o, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, log_decay), q, k, v)
        return o, *pullback(do)

    q, k, v, do, log_decay = (
        jax.ShapeDtypeStruct(x.shape, dtype or x.dtype) for x in jax.eval_shape(shape.inputs)
    )
    return Programs(
        jax.jit(attend).lower(q, k, v, log_decay).compile(),
        jax.jit(both).lower(q, k, v, do, log_decay).compile(),
    )


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


def of_fla(name: str, q, k, v, do, log_decay) -> Calls:
    """An operator of flash-linear-attention on the same memory."""
    torch = importlib.import_module("torch")
    function = getattr(importlib.import_module("fla.ops.simple_gla"), name)
    q, k, v, do, gamma = (torch.from_dlpack(x) for x in (q, k, v, do, log_decay))

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
FLA = ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla")
IMPLEMENTATIONS = (*OPERATORS, *(f"fla {name}" for name in FLA))


class Compiled(NamedTuple):
    """For one shape: our programs by name, or why there is none, and the exact results'."""

    programs: dict[str, Programs | str]
    exact: Programs | None

    @classmethod
    def of(cls, shape: Shape, names: Sequence[str], exact: bool) -> "Compiled":
        """Compile what is not another library's."""
        programs: dict[str, Programs | str] = {}
        for name in OPERATORS.keys() & set(names):
            try:
                programs[name] = compiled(OPERATORS[name], shape)
            except REFUSALS as reason:
                programs[name] = because(reason)
        if not exact:
            return cls(programs, None)
        with jax.enable_x64(True):
            return cls(programs, compiled(OPERATORS["xla"], shape, jnp.float64))

    def calls(self, name: str, inputs: Sequence[jax.Array]) -> Calls:
        """Raises what the implementation raises, RuntimeError if it was not compiled."""
        if name not in OPERATORS:
            return of_fla(name.removeprefix("fla "), *inputs)
        programs = self.programs[name]
        if isinstance(programs, str):
            raise RuntimeError(programs)
        return programs.on(*inputs)

    def wanted(self, inputs: Sequence[jax.Array]) -> tuple[jax.Array, ...] | None:
        """o, dq, dk, dv in float64."""
        if self.exact is None:
            return None
        with jax.enable_x64(True):
            return self.exact.on(*(x.astype(jnp.float64) for x in inputs)).both()


def because(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {str(reason)[:200]}"
