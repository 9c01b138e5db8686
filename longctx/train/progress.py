"""What a person sees while a run trains: a live bar on a terminal, a line per record elsewhere."""

import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from longctx.train.metrics import Record


class ProgressView:
    """A sink that shows records on the console.

    The time remaining is the record's own: Rich forgets the speed of what is over 30 s old.
    """

    def __init__(self, steps: int, first: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._steps = steps
        whole, rest = Column(no_wrap=True), Column(ratio=1)  # a narrow terminal costs the bar only
        self._bar = Progress(
            MofNCompleteColumn(table_column=whole),
            BarColumn(bar_width=None, table_column=rest),
            TextColumn("{task.fields[numbers]}", table_column=whole),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=first, numbers="compiling")
        self._bar.start()

    def write(self, record: Record) -> None:
        """Show the newest numbers."""
        step = int(record["step"] or 0)
        left = record.get("eta_seconds")
        eta = "" if left is None else f"  ETA {datetime.timedelta(seconds=round(left))}"
        numbers = describe(record) + eta
        if "loss" in record and self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self._console.print(f"step {step}/{self._steps}  {numbers}")

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.stop()


def describe(record: Record) -> str:
    """The numbers of a record that a person watches, in one line."""
    formats = {
        "loss": "{:.4f} nats",
        "bits_per_byte": "{:.3f} bits/byte",
        "valid_bits_per_byte": "held out {:.3f} bits/byte",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }
    if record.get("mfu") is None:  # a device without a published peak
        formats["model_tflops_per_second"] = "{:.3g} TFLOP/s"
    shown = [form.format(record[n]) for n, form in formats.items() if record.get(n) is not None]
    return "  ".join(shown)
