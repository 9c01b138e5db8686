"""Attention over sharded sequences against its ideal: `python -m experiments.bench.ring`.

Causal attention in bf16, B = 1, D = 128, on all devices of this machine: each strategy of
`context_attention`, forward and forward + backward. The ideal is the time of one device divided
by the number of devices, where one device's time is the smaller of our own kernel's and cuDNN's.

The ring is also run with its moves replaced by nothing (compute only) and with its blocks
replaced by nothing (communication only):

    overlap = (compute + communication - full) / min(compute, communication)

`--xla NAME=VALUE` compiles with an XLA option, such as xla_gpu_use_memcpy_local_p2p=true. Writes
one row per line (ring.jsonl), a chart beside it, and prints a table.
"""

import argparse
import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from experiments.bench._timing import device_info, time_ms, write_rows
from longctx.parallel import Layout, context_attention, make_mesh, ring
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import flash_attention

WIDTH = 128
RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "forward_backward")


class Case(NamedTuple):
    """One program to time."""

    length: int
    heads: int
    kv_heads: int
    name: Any  # a strategy, "one device: ours", "one device: cudnn"
    part: str  # "full", "compute" or "communication"
    which: str  # of PASSES


def attend(case: Case, devices: int) -> Callable[..., Any]:
    """The operator of `case`, on q, k, v."""
    if case.name == "one device: ours":
        return flash_attention
    if case.name == "one device: cudnn":
        return functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
    return functools.partial(context_attention, strategy=case.name, layout=layout_of(case, devices))


def layout_of(case: Case, devices: int) -> Layout:
    """The layout in which a strategy has equal work on all devices."""
    return Layout("zigzag", {"ulysses": 1, "usp": devices // 2}.get(case.name, devices))


def program(case: Case, devices: int) -> Callable[..., Any]:
    """What is timed: the operator, or the operator and its gradients."""
    operator = attend(case, devices)

    def both(q: Array, k: Array, v: Array, do: Array) -> Any:
        o, pull = jax.vjp(operator, q, k, v)
        return o, *pull(do)

    def forward(q: Array, k: Array, v: Array, do: Array) -> Any:
        return operator(q, k, v)

    return forward if case.which == "forward" else both


def without(part: str) -> ExitStack:
    """The ring with its moves ("compute" only) or its blocks ("communication" only) left out.

    What is left out hands on its inputs, so that the rest happens in the same order.
    """
    stack = ExitStack()
    if part == "compute":

        def stay(x: Any, *_: Any) -> Any:
            return lax.optimization_barrier(x)

        stack.enter_context(mock.patch.object(ring.lax, "ppermute", stay))
    if part == "communication":

        def forward(q: Array, k: Array, v: Array, *, out_dtype: Any = None, **how: Any) -> Any:
            o, lse = how.get("carry") or (
                jnp.zeros((*q.shape[:3], v.shape[3]), jnp.float32),
                jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32),
            )
            o, lse = unify_varying((o.astype(out_dtype or o.dtype), lse), varying_axes(q))
            return lax.optimization_barrier(((o, lse), k, v))[0]

        def backward(q: Array, k: Array, v: Array, *rows: Array, **_: Any) -> Any:
            gradients = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
            gradients = unify_varying(gradients, varying_axes(q))
            return lax.optimization_barrier((gradients, k, v, rows))[0]

        stack.enter_context(mock.patch.object(ring, "block_forward", forward))
        stack.enter_context(mock.patch.object(ring, "block_backward", backward))
    return stack


def operands(case: Case, mesh: jax.sharding.Mesh | None) -> list[Array]:
    """Random q, k, v, do; over the mesh's devices, or on the first device."""
    place = jax.devices()[0] if mesh is None else NamedSharding(mesh, P(None, "seq"))
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)

    def draw(seed: int, heads: int) -> Array:
        shape = (1, case.length, heads, WIDTH)
        make = jax.jit(
            lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16),
            out_shardings=place if mesh is not None else None,
        )
        return make()

    return [draw(*pair) for pair in enumerate(heads)]


def cases(options: argparse.Namespace, devices: int) -> Iterator[Case]:
    """What to run, in the order of the table."""
    for length in options.lengths:
        for heads, kv_heads in options.heads:
            for which in PASSES[:1] if options.forward_only else PASSES:
                case = functools.partial(Case, length, heads, kv_heads, which=which)
                if jax.default_backend() == "gpu":
                    yield case("one device: cudnn", "full")
                yield case("one device: ours", "full")
                for name in options.strategies:
                    if name != "usp" or devices >= 4:
                        yield case(name, "full")
                if options.parts and "ring" in options.strategies:
                    yield case("ring", "compute")
                    yield case("ring", "communication")


def compile_all(
    todo: list[Case], devices: int, xla: dict[str, str]
) -> dict[Case, concurrent.futures.Future[Any]]:
    """All programs: traced here one by one, compiled by a pool of threads."""
    mesh = make_mesh(seq=devices)
    pool = concurrent.futures.ThreadPoolExecutor(8)
    compiling = {}
    for case in todo:
        one = case.name.startswith("one device")
        place = None if one else NamedSharding(mesh, P(None, "seq"))
        q, k = (
            jax.ShapeDtypeStruct((1, case.length, h, WIDTH), jnp.bfloat16, sharding=place)
            for h in (case.heads, case.kv_heads)
        )
        with ExitStack() as stack:
            stack.enter_context(without(case.part))
            if not one:
                stack.enter_context(jax.set_mesh(mesh))
            lowered = jax.jit(program(case, devices)).lower(q, k, k, q)
        compiling[case] = pool.submit(lowered.compile, compiler_options=xla or None)
    return compiling


def measure(options: argparse.Namespace, devices: int) -> Iterator[dict[str, Any]]:
    """One row per program, with its share of the ideal."""
    todo = list(cases(options, devices))
    compiling = compile_all(todo, devices, dict(options.xla))
    concurrent.futures.wait(compiling.values())  # compiling would disturb what is timed
    mesh = make_mesh(seq=devices)
    times: dict[Case, float] = {}
    for case in todo:
        one = case.name.startswith("one device")
        times[case] = time_ms(
            compiling[case].result(), *operands(case, None if one else mesh), batches=5
        )
        single = [
            times[other]
            for name in ("one device: cudnn", "one device: ours")
            if (other := case._replace(name=name, part="full")) in times
        ]
        row = case._asdict() | {"devices": devices, "ms": times[case], "xla": dict(options.xla)}
        if not one and case.part == "full":
            row["ideal_ms"] = min(single) / devices
            row["of_ideal"] = row["ideal_ms"] / times[case]
            if options.check and case.which == "forward_backward":
                ours = compiling[case._replace(name="one device: ours")].result()
                row["errors"] = errors(case, compiling[case].result(), ours, mesh)
        if case.part == "communication":
            full, compute = (times[case._replace(part=p)] for p in ("full", "compute"))
            hidden = compute + times[case] - full
            row["overlap"] = hidden / min(compute, times[case])
        yield row


def errors(
    case: Case, sharded: Callable[..., Any], single: Callable[..., Any], mesh: jax.sharding.Mesh
) -> list[float]:
    """Relative RMS differences of o, dq, dk, dv to one device's, from the same operands."""
    layout, args = layout_of(case, mesh.size), operands(case, mesh)

    def in_order(x: Array) -> np.ndarray:
        return layout.invert(np.asarray(x))

    got = [in_order(x).astype(np.float32) for x in sharded(*args)]
    want = [np.asarray(x, np.float32) for x in single(*map(jnp.asarray, map(in_order, args)))]
    pairs = zip(got, want, strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


def draw_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of the ideal by strategy, one panel per pass."""
    rows = [row for row in rows if "of_ideal" in row]
    passes = [which for which in PASSES if any(row["which"] == which for row in rows)]
    figure, panels = plt.subplots(1, len(passes), figsize=(5 * len(passes), 3.5), squeeze=False)
    for panel, which in zip(panels[0], passes, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            line = [row for row in rows if row["which"] == which and row["name"] == name]
            labels = [f"{r['length'] // 1024}K\n{r['heads']}:{r['kv_heads']}" for r in line]
            panel.plot(labels, [row["of_ideal"] for row in line], "o-", label=name)
        panel.set(title=which.replace("_", " + "), ylabel="share of ideal", ylim=(0, 1.1))
        panel.axhline(0.95, color="grey", linewidth=0.5)
        panel.legend()
    figure.suptitle(f"{rows[0]['devices']} x {device_info()['device']}, total tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def heads_pair(text: str) -> tuple[int, int]:
    """ "64:8" as (64, 8)."""
    heads, kv_heads = text.split(":")
    return int(heads), int(kv_heads)


def main() -> None:
    """Time, print, and write the rows and the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="in all")
    parser.add_argument("--heads", type=heads_pair, nargs="+", default=[(16, 16)])
    parser.add_argument("--strategies", nargs="+", default=["ring", "all_gather", "ulysses", "usp"])
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="full runs only")
    parser.add_argument("--check", action="store_true", help="compare with one device, too")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument(
        "--xla", type=lambda x: tuple(x.split("=", 1)), nargs="*", default=[], metavar="NAME=VALUE"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", default="ring", help="of the results' files")
    options = parser.parse_args()
    rows = []
    for row in measure(options, len(jax.devices())):
        rows.append(row)
        share = f"{row['of_ideal']:7.1%} of ideal" if "of_ideal" in row else ""
        share += f" errors {max(row['errors']):.1e}" if "errors" in row else ""
        share += f" overlap {row['overlap']:.1%}" if "overlap" in row else ""
        size = f"{row['length']:7} {row['heads']}:{row['kv_heads']}"
        print(f"{size} {row['which']:16} {row['name']:17} {row['part']:13}", end=" ")
        print(f"{row['ms']:9.3f} ms {share}", flush=True)
        write_rows(options.out / f"{options.name}.jsonl", rows)
    draw_chart(rows, options.out / f"{options.name}.png")


if __name__ == "__main__":
    main()
