"""Tensorized attention against dense cuDNN: `python -m experiments.bench.tensorized`.

Forward and forward + backward of mixed-radix attention, T = 131072 folded into 512 x 256, 32 query
and 8 key/value heads of 128 in bf16, with the self-edge bias and RoPE inside the hops, as a model
would call it; then without either. The dense time is cuDNN's through jax.nn on the same arrays.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench._passes import with_gradients
from experiments.bench._timing import time_ms
from longctx.attention.tensorized import tensorized_attention
from longctx.device.programs import compile_all
from longctx.provenance import write_rows

RESULTS = Path(__file__).parent / "results" / "tensorized.jsonl"


def operators(options: argparse.Namespace) -> Iterator[tuple[str, Callable[..., Array]]]:
    """Name and operator of (q, k, v)."""
    if jax.default_backend() == "gpu":
        yield (
            "cudnn dense",
            functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"),
        )
    plain = functools.partial(tensorized_attention, dims=tuple(options.dims), order=options.order)
    pairs = jnp.arange(0, options.width, 2, dtype=jnp.float32)
    whole = functools.partial(
        plain,
        frequencies=10000.0 ** (-pairs / options.width),
        self_bias=jnp.full((len(options.dims) - 1, options.heads), 4.0),
    )
    yield "mixed radix, bias and RoPE", whole
    yield "mixed radix, plain", plain


type Pair = tuple[jax.stages.Compiled, jax.stages.Compiled]


def compile_pairs(
    operators: Iterable[tuple[str, Callable[..., Array]]], q, k, v, do
) -> dict[str, Pair]:
    """Forward, and forward + backward, of each named operator; arrays or their types."""
    pairs = dict(operators)
    programs = compile_all(
        functools.partial(jax.jit(function).lower, *args)
        for operator in pairs.values()
        for function, args in ((operator, (q, k, v)), (with_gradients(operator), (q, k, v, do)))
    )
    return dict(zip(pairs, zip(programs[::2], programs[1::2], strict=True), strict=True))


def main() -> None:
    """Time, print and write rows; ratios are to the first operator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 256], help="fast to slow")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--order", default="slow_first", choices=["slow_first", "fast_first"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the rows")
    options = parser.parse_args()
    length = math.prod(options.dims)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (
        jax.random.normal(key, (1, length, h, options.width), jnp.bfloat16)
        for key, h in zip(keys, heads, strict=True)
    )
    shape = {name: x for name, x in vars(options).items() if name != "out"} | {"length": length}
    rows, dense = [], None
    programs = compile_pairs(operators(options), q, k, v, do)
    for name, (forward_call, both_call) in programs.items():
        forward = time_ms(forward_call, q, k, v, batches=3)
        total = time_ms(both_call, q, k, v, do, batches=3)
        dense = dense or (forward, total)
        row = {
            "operator": name,
            "forward_ms": forward,
            "forward_backward_ms": total,
            "speedup_forward": dense[0] / forward,
            "speedup_forward_backward": dense[1] / total,
        }
        rows.append(shape | row)
        print(name, *(f"{x:.2f}" for x in list(row.values())[1:]), flush=True)
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
