"""An experiment on two tiny runs, one of which goes on from the other."""

import dataclasses
from pathlib import Path

from longctx.reproduce import Part, held_out
from longctx.reproduce.part import run_name
from tests.longctx.train.runs import tiny_run

TEXT = str(Path(__file__).parents[3] / "README.md")


@dataclasses.dataclass(frozen=True)
class Told:
    """Its rows say which arm they are of."""

    def parts(self, scale, runs):
        """The run that goes on comes first, and so would have to wait."""
        first = tiny_run(TEXT, steps=5)
        second = tiny_run(TEXT, steps=4, init=str(runs / run_name(first)))
        return [
            Part("second", second, lambda run: [{"arm": "second", **held_out(run)}], after=first),
            Part("first", first, lambda run: [{"arm": "first", **held_out(run)}], timed=True),
        ]

    def table(self, rows):
        """A line per row."""
        return "".join(f"{r['arm']} {r.get('tokens_per_second')}\n" for r in rows)

    def draw(self, rows, path):
        """No picture."""
        path.write_bytes(b"")


EXPERIMENT = Told()
