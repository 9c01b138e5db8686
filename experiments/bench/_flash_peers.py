"""The flash attention calls that the benchmark times: ours and those of its peers."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import flash_attention

Attend = Callable[..., Any]  # of q, k and v


class Shape(NamedTuple):
    """One causal call: B rows of T tokens, H heads over K key/value heads of width D."""

    batch: int
    length: int
    heads: int = 16
    kv_heads: int = 16
    width: int = 128
    window: int | None = None
    document: int | None = None  # length of the documents packed in a row

    def types(self) -> list[jax.ShapeDtypeStruct]:
        """Of q, k, v and do."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, self.length, h, self.width) for h in heads]
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def inputs(self) -> list[jax.Array]:
        """Random q, k, v and do."""
        keys = jax.random.split(jax.random.key(0), 4)
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        return [draw(key, x.shape, x.dtype) for key, x in zip(keys, self.types(), strict=True)]

    def teraflop(self) -> float:
        """Of the forward's two products, on the pairs that are seen."""
        rows = np.arange(self.length, dtype=np.float64)
        seen = rows % (self.document or self.length) + 1
        pairs = np.minimum(seen, self.window or self.length).sum()
        return float(4e-12 * self.batch * self.heads * self.width * pairs)


def ours(shape: Shape, **options: Any) -> Attend:
    """Our operator; documents by the first key that each token sees."""
    if shape.document is None:
        return functools.partial(flash_attention, window=shape.window, **options)
    starts = np.arange(shape.length, dtype=np.int32) // shape.document * shape.document
    lo = np.broadcast_to(starts, (shape.batch, shape.length))
    return lambda q, k, v: flash_attention(q, k, v, lo=jnp.asarray(lo), **options)


def cudnn(shape: Shape) -> Attend:
    """cuDNN's fused attention, as jax calls it."""
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=_window(shape),
        implementation="cudnn",
    )


def tokamax(shape: Shape, implementation: str) -> Attend:
    """One of tokamax's kernels: "mosaic" or "triton"."""
    return functools.partial(
        importlib.import_module("tokamax").dot_product_attention,
        is_causal=True,
        local_window_size=_window(shape),
        implementation=implementation,
    )


def _window(shape: Shape) -> tuple[int, int] | None:
    if shape.document is not None:
        raise NotImplementedError("packed rows")
    return None if shape.window is None else (shape.window - 1, 0)


def jax_triton(shape: Shape) -> Attend:
    """jax's own Pallas kernel for Triton."""
    if shape.document is not None or shape.window is not None or shape.heads != shape.kv_heads:
        raise NotImplementedError("it has neither windows nor grouped heads")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what ships
        module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    sizes = module.BlockSizes.get_default()
    if shape.width > 128:  # the default blocks need more shared memory than there is
        sizes = module.BlockSizes(64, 64, 32, 32, 32, 32)
    options = {"sm_scale": shape.width**-0.5, "causal": True, "block_sizes": sizes}
    return lambda q, k, v: module.mha(q, k, v, segment_ids=None, **options)


def jax_mosaic(shape: Shape) -> Attend:
    """jax's own Pallas kernel for Mosaic GPU: causal forward only, float16 only."""
    if shape.document is not None or shape.window is not None:
        raise NotImplementedError("it has neither windows nor documents")
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    config = module.TuningConfig(128, 128 if shape.width <= 128 else 64, 2, causal=True)
    return lambda q, k, v: module.attention(q, k, v, config)


IMPLEMENTATIONS: dict[str, Callable[[Shape], Attend]] = {
    "ours": ours,
    "cudnn": cudnn,
    "tokamax": functools.partial(tokamax, implementation="mosaic"),
    "tokamax triton": functools.partial(tokamax, implementation="triton"),
    "jax triton": jax_triton,
    "jax mosaic": jax_mosaic,
}
