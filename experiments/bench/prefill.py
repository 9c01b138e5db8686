"""Prefill of a whole model, dense against tensorized: `python -m experiments.bench.prefill`.

Llama 3 8B's shape with random weights in bf16, one prompt of 131072 tokens: from the tokens to the
logits after the last one and the filled cache. All 32 layers fit on 80 GB; give --layers where they
do not. The bound is the model's operations at the device's peak, 3.4 times fewer than dense: the
paper's 11 times (2410.20926) can only be of the attention, which is not all of a prefill.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from longctx.models import MODELS, build
from longctx.models.config import TensorizedConfig
from longctx.nn.cache import Cache
from longctx.provenance import write_rows
from longctx.train.flops import device_peak, forward_flops

RESULTS = Path(__file__).parent / "results" / "prefill.jsonl"


def prefill(graph: nnx.GraphDef, length: int) -> Callable[[nnx.State, Array], tuple[Array, Cache]]:
    """Jitted (state of the model, tokens [1, T]) -> (logits [1, V], cache)."""

    @jax.jit
    def run(state: nnx.State, tokens: Array) -> tuple[Array, Cache]:
        model = nnx.merge(graph, state)
        return model.prefill(tokens, None, model.init_cache(1, length))

    return run


def one_call_ms(function: Callable[..., Any], *args: Any) -> float:
    """Milliseconds of the second call. It takes seconds, and two at once would not fit."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Time, print and write rows; ratios are to the dense model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b", choices=sorted(MODELS))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 256], help="fast to slow")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the rows")
    options = parser.parse_args()

    dense = dataclasses.replace(MODELS[options.model], param_dtype="bfloat16")
    tensorized = dataclasses.replace(
        dense, mixers=("tensorized",), tensorized=TensorizedConfig(dims=tuple(options.dims))
    )
    layers = options.layers or dense.num_layers
    peak, rows = device_peak(jax.devices()[0]), []
    for name, config in (("dense", dense), ("mixed radix", tensorized)):
        config = dataclasses.replace(config, num_layers=layers)
        graph = nnx.split(nnx.eval_shape(lambda config=config: build(config, rngs=nnx.Rngs(0))))[0]
        state = jax.jit(lambda config=config: nnx.state(build(config, rngs=nnx.Rngs(0))))()
        tokens = jax.random.randint(jax.random.key(1), (1, options.length), 0, config.vocab_size)
        ms = one_call_ms(prefill(graph, options.length), state, tokens)
        # Only the last token's logits are computed.
        head = 2 * config.width * config.vocab_size
        flops = (forward_flops(config, options.length) - head) * options.length + head
        bound = None if peak is None else flops / peak * 1e3
        row = {"operator": name, "model": options.model, "layers": layers, "forward_ms": ms}
        row |= {"length": options.length, "dims": options.dims, "bound_ms": bound}
        rows.append(row | {"tokens_per_second": options.length / ms * 1e3})
        share = "" if bound is None else f", bound {bound:.1f} ms ({bound / ms:.0%} of peak)"
        print(f"{name:12} {layers} layers  {ms:.1f} ms{share}", flush=True)
        del state
    print(f"dense / mixed radix: {rows[0]['forward_ms'] / rows[1]['forward_ms']:.2f}")
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
