"""The loss curve of a run, from its metrics.jsonl alone."""

import pathlib

from longctx.figures import tidy
from longctx.train.metrics import read_metrics


def plot_loss(out: pathlib.Path) -> pathlib.Path | None:
    """Draw `out/loss.png`: training and held-out bits per byte over steps.

    Returns:
      The path, or None when nothing was recorded yet.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once per run

    path = out / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    if not records:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte", title=out.name)
    for field, label, marker in (
        ("bits_per_byte", "training", ""),
        ("valid_bits_per_byte", "held out", "o"),
    ):
        points = [(r["step"], r[field]) for r in records if r.get(field) is not None]
        if points:
            label = f"{label}, {points[-1][1]:.3f} at the end"
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.2)
    tidy(axes)
    axes.legend(frameon=False)
    path = out / "loss.png"
    figure.savefig(path, dpi=150)
    return path
