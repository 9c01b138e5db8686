"""Losses of two tiny runs, so that a change of results never passes unnoticed.

`python -m tests.golden.losses` runs them and writes the file anew: do it on purpose, and say why
in the commit.
"""

import json
import pathlib
import tempfile

from longctx.train.loop import train
from longctx.train.metrics import read_metrics
from tests.longctx.train.runs import TNL, TRANSFORMER, tiny_run, write_text

PATH = pathlib.Path(__file__).with_name("losses.json")
GOLDEN: dict[str, dict[str, float]] = json.loads(PATH.read_text()) if PATH.exists() else {}
MODELS = {"tnl": TNL, "transformer": TRANSFORMER}

# Processors round differently; a changed initialisation, order or formula moves far more.
TOLERANCE = 2e-4


def check_golden(name: str, losses: dict[int, float]) -> None:
    """Assert that the losses by step are those on file."""
    wanted = {int(step): loss for step, loss in GOLDEN[name].items()}
    assert losses.keys() == wanted.keys()
    wrong = [s for s in wanted if abs(losses[s] - wanted[s]) > TOLERANCE * wanted[s]]
    assert not wrong, f"step {wrong[0]}: loss {losses[wrong[0]]}, on file {wanted[wrong[0]]}"


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        source = write_text(pathlib.Path(directory))
        for name, model in MODELS.items():
            out = pathlib.Path(directory) / name
            train(tiny_run(source, model), out)
            records = read_metrics(out / "metrics.jsonl")
            found[name] = {str(r["step"]): r["loss"] for r in records if "loss" in r}
    PATH.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
