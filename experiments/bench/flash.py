"""Flash attention against its peers: dense, grouped, windowed and packed, up to a million tokens.

    python -m experiments.bench.flash [--groups dense gqa ...] [--out results/...]

Groups: `dense`, causal, 16 heads of width 64, 128 and 256; `gqa`, 32 query heads over 8; `window`,
4096 keys at 128K tokens, with the same call without a window; `packed`, 2K documents in one row of
64K tokens, with the same documents as a batch; `long`, a million tokens; `errors`, relative RMS
errors against float64 on one short row. Off a GPU, small ones.

Peers: cuDNN through `jax.nn.dot_product_attention`, tokamax where it is installed, and jax's own
Pallas kernel (Triton). One that is absent or refuses is named in the output. Times are medians of
warm, queued calls in one process, and TFLOP/s count 4 D per seen pair forward and 2.5 times that
backward. Writes JSONL and, of `dense`, a plot beside it.
"""

import argparse
import functools
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench._timing import time_ms, write_rows
from pallas_kernels.flash_attention import flash_attention

RESULTS = Path(__file__).parent / "results"
NAMES = ("o", "dq", "dk", "dv")
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


def ours(shape: Shape, backend: str = "auto") -> Attend:
    """Our operator; documents by the first key that each token sees."""
    if shape.document is None:
        return functools.partial(flash_attention, window=shape.window, backend=backend)
    starts = np.arange(shape.length, dtype=np.int32) // shape.document * shape.document
    lo = np.broadcast_to(starts, (shape.batch, shape.length))
    return lambda q, k, v: flash_attention(q, k, v, lo=jnp.asarray(lo), backend=backend)


def cudnn(shape: Shape) -> Attend:
    """cuDNN's fused attention, as jax calls it; it knows no packed rows without padding."""
    if shape.document is not None:
        raise NotImplementedError("packed rows")
    window = None if shape.window is None else (shape.window - 1, 0)
    options = {"is_causal": True, "local_window_size": window, "implementation": "cudnn"}
    return functools.partial(jax.nn.dot_product_attention, **options)


def tokamax(shape: Shape) -> Attend:
    """Tokamax's Mosaic GPU kernel."""
    if shape.document is not None or shape.window is not None:
        raise NotImplementedError("measured dense only")
    function = importlib.import_module("tokamax").dot_product_attention
    return functools.partial(function, is_causal=True, implementation="mosaic")


def triton(shape: Shape) -> Attend:
    """jax's own Pallas kernel for Triton."""
    if shape.document is not None or shape.window is not None or shape.heads != shape.kv_heads:
        raise NotImplementedError("it has neither windows nor grouped heads")
    if shape.width > 128:
        raise NotImplementedError("its default blocks need more shared memory than there is")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what ships
        mha = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha
    scale = shape.width**-0.5
    return lambda q, k, v: mha(q, k, v, segment_ids=None, sm_scale=scale, causal=True)


IMPLEMENTATIONS = {"ours": ours, "cudnn": cudnn, "tokamax": tokamax, "triton": triton}
PEERS = {"dense": tuple(IMPLEMENTATIONS), "long": ("ours",)}  # elsewhere ours and cuDNN's


def groups_for(platform: str) -> dict[str, list[Shape]]:
    """Shapes of each group; a row of `packed` is followed by the same documents as a batch."""
    if platform != "gpu":
        return {"dense": [Shape(1, 512, 2, 2, 64)], "window": [Shape(1, 512, 2, 2, 64, window=64)]}
    lengths = [(4, 8192), (1, 32768)]
    return {
        "dense": [Shape(b, t, width=d) for d in (128, 64) for b, t in lengths]
        + [Shape(4, 8192, width=256)],
        "gqa": [Shape(4, 8192, 32, 8)],
        "window": [Shape(1, 131072, window=4096), Shape(1, 131072)],
        "packed": [Shape(1, 65536, document=2048), Shape(32, 2048)],
        "long": [Shape(1, 2**20, 1, 1)],
        "errors": [Shape(1, 1024, 4, 4, width) for width in (64, 128, 256)],
    }


def with_gradients(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    """(q, k, v, do) -> (o, dq, dk, dv)."""

    def both(q, k, v, do):
        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    return both


def errors(found: tuple[jax.Array, ...], shape: Shape) -> dict[str, float]:
    """Relative RMS errors of o, dq, dk and dv against float64 on the same bfloat16 inputs."""
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in shape.inputs()]
        wanted = jax.jit(with_gradients(ours(shape, "xla")))(*wide)

        def error(got, want):
            return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())

        pairs = zip(NAMES, found, wanted, strict=True)
        return {n: float(error(got.astype(want.dtype), want)) for n, got, want in pairs}


class Compiled(NamedTuple):
    """Forward, and forward + backward, of one implementation; or why there is none."""

    forward: Callable[..., Any] | None = None
    both: Callable[..., Any] | None = None
    absent: str = ""


def compiled(shape: Shape, name: str) -> Compiled:
    """Compile without arrays, so that threads can do so side by side."""
    types = shape.types()
    try:
        attend = IMPLEMENTATIONS[name](shape)
        both = jax.jit(with_gradients(attend)).lower(*types).compile()
        return Compiled(jax.jit(attend).lower(*types[:3]).compile(), both)
    except (ImportError, NotImplementedError, ValueError, RuntimeError) as reason:
        return Compiled(absent=str(reason).split("\n")[0][:200])


def measure(group: str, shape: Shape, calls: dict[str, Compiled]) -> Iterator[dict]:
    """One row for each implementation."""
    inputs = shape.inputs()
    work = shape.teraflop()
    batches = 7 if work < 50 else 3
    for name, call in calls.items():
        row = {**shape._asdict(), "group": group, "implementation": name}
        if call.forward is None or call.both is None:
            yield {**row, "absent": call.absent}
            continue
        if group == "errors":
            yield {**row, "errors": errors(call.both(*inputs), shape)}
            continue
        row["forward_ms"] = time_ms(call.forward, *inputs[:3], batches=batches)
        row["both_ms"] = time_ms(call.both, *inputs, batches=batches)
        backward = row["both_ms"] - row["forward_ms"]
        row["forward_tflops"] = work / row["forward_ms"] * 1e3
        row["backward_tflops"] = 2.5 * work / backward * 1e3
        yield row


def table(rows: list[dict]) -> str:
    """The rows as Markdown, with each time over cuDNN's of the same shape."""

    def key(row):
        return tuple(row[name] for name in Shape._fields)

    cudnns = {key(r): r for r in rows if r["implementation"] == "cudnn" and "both_ms" in r}
    lines = [
        "| group | D, B x T, H/K | implementation | forward ms (TFLOP/s) | fwd+bwd ms "
        "| bwd TFLOP/s | over cuDNN's | errors o, dq, dk, dv |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        extra = "".join(f", {n} {row[n]}" for n in ("window", "document") if row[n])
        heads = f"{row['heads']}/{row['kv_heads']}"
        where = f"{row['width']}, {row['batch']} x {row['length']}, {heads}{extra}"
        start = f"| {row['group']} | {where} | {row['implementation']} "
        if "absent" in row:
            lines.append(f"{start}| absent: {row['absent']} | | | | |")
            continue
        if "errors" in row:
            found = " ".join(f"{x:.2e}" for x in row["errors"].values())
            lines.append(f"{start}| | | | | {found} |")
            continue
        rival = cudnns.get(key(row))
        ratio = rival and " / ".join(f"{row[n] / rival[n]:.2f}" for n in ("forward_ms", "both_ms"))
        lines.append(
            f"{start}| {row['forward_ms']:.3f} ({row['forward_tflops']:.0f}) "
            f"| {row['both_ms']:.3f} | {row['backward_tflops']:.0f} | {ratio or ''} | |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Rates of the dense shapes, forward and backward."""
    rows = [row for row in rows if row["group"] == "dense" and "both_ms" in row]
    if not rows:
        return
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    labels = list(
        dict.fromkeys(f"{r['width']}\n{r['batch']} x {r['length'] // 1024}K" for r in rows)
    )
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for panel, which in zip(panels, ("forward", "backward"), strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if row["implementation"] == name]
            at = [
                labels.index(f"{r['width']}\n{r['batch']} x {r['length'] // 1024}K") for r in mine
            ]
            width = 0.8 / len(names)
            heights = [row[f"{which}_tflops"] for row in mine]
            panel.bar(np.array(at) + (i - (len(names) - 1) / 2) * width, heights, width, label=name)
        panel.set_xticks(range(len(labels)), labels, fontsize=7)
        panel.set_title(f"causal {which}, 16 heads, bfloat16", fontsize=9)
    panels[0].set_ylabel("TFLOP/s")
    panels[0].legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    """Measure the groups asked for."""
    platform = jax.default_backend()
    groups = groups_for(platform)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--out", type=Path, default=RESULTS / f"flash_{platform}.jsonl")
    parser.add_argument("--plot", type=Path, help="only plot and print these rows")
    options = parser.parse_args()
    if options.plot:
        rows = [json.loads(line) for line in options.plot.open()]
        print(table(rows))
        return plot(rows, options.plot)

    plan = [
        (group, shape, name)
        for group in options.groups
        for shape in groups[group]
        for name in PEERS.get(group, ("ours", "cudnn"))
    ]
    with ThreadPoolExecutor() as pool:
        calls = list(pool.map(lambda item: compiled(*item[1:]), plan))
    rows: list[dict] = []
    for group in options.groups:
        for shape in groups[group]:
            mine = {
                n: c for (g, s, n), c in zip(plan, calls, strict=True) if (g, s) == (group, shape)
            }
            for row in measure(group, shape, mine):
                print(row, flush=True)
                rows.append(row)
            write_rows(options.out, rows)
    print(table(rows))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is absent; for the plot: --plot {options.out}")
    else:
        plot(rows, options.out)


if __name__ == "__main__":
    main()
