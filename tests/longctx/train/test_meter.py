import dataclasses
import itertools
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from longctx.errors import RunError
from longctx.train import meter as meter_module
from longctx.train.meter import Meter
from longctx.train.metrics import (
    JsonLines,
    forget_after,
    held_out_curve,
    open_sinks,
    read_metrics,
)
from longctx.train.plot import plot_loss
from longctx.train.progress import ProgressView
from tests.longctx.train.runs import tiny_run


@dataclasses.dataclass
class Saved:
    last_saved: int | None
    directory: pathlib.Path = pathlib.Path("run/checkpoints")


class Kept:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def metrics(loss, grad_norm=1.0):
    values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": 0.1}
    return {name: np.float32(value) for name, value in values.items()}


def test_pauses_count_for_what_is_left_but_not_for_the_speed(monkeypatch):
    clock = itertools.count()  # a second between two looks at it
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: float(next(clock)))
    kept, config = Kept(), tiny_run("", steps=10, log_every=2)
    meter = Meter(config, 0.5, [kept], Saved(None))
    for step in range(1, 5):
        meter.push(step, metrics(1.0), np.arange(2))
        if step == 2:
            meter.pause()
            for _ in range(100):  # an evaluation
                next(clock)
    meter.flush()
    before, after = kept.records
    assert before["eta_seconds"] < 8 * 5 and 6 * 30 < after["eta_seconds"] < 6 * 40
    assert after["tokens_per_second"] > config.tokens_per_step / 5


def test_records_are_means_written_one_step_late():
    kept = Kept()
    meter = Meter(tiny_run("", log_every=2), 0.5, [kept], Saved(None))
    meter.push(1, metrics(1.0), np.arange(2))
    meter.push(2, metrics(3.0), np.arange(2))
    assert kept.records == []  # step 2 is still on the device
    meter.push(3, metrics(9.0), np.arange(2))
    (record,) = kept.records
    assert (record["step"], record["loss"]) == (2, 2.0)
    assert record["bits_per_byte"] == pytest.approx(2.0 / np.log(2) / 0.5)
    assert record["tokens_per_second"] > 0
    meter.push(4, metrics(11.0), np.arange(2))
    meter.pause()
    assert [(r["step"], r["loss"]) for r in kept.records] == [(2, 2.0), (4, 10.0)]


@pytest.mark.parametrize("bad", [metrics(np.nan), metrics(1.0, np.inf)])
@pytest.mark.parametrize(("saved", "where"), [(None, "there is none"), (5, r"run/checkpoints/5$")])
def test_a_loss_that_is_not_finite_stops_the_run(bad, saved, where):
    meter = Meter(tiny_run(""), 1.0, [], Saved(saved))
    meter.push(6, metrics(1.0), np.array([1, 2]))
    meter.push(7, bad, np.array([40, 41]))
    with pytest.raises(RunError, match=rf"step 7: .*windows \[40, 41\].*checkpoint: .*{where}"):
        meter.flush()


def test_records_after_a_checkpoint_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 3)  # nothing there yet
    sink = JsonLines(path)
    for step in range(1, 6):
        sink.write({"step": step, "loss": float("nan") if step == 2 else 0.1 * step})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # the process died here
    forget_after(path, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.1 * 3},
    ]
    assert read_metrics(path) == lines


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match=r"pip install longctx\[wandb\]"):
        open_sinks(tmp_path, ("wandb",))


def test_wandb_gets_every_record_at_its_step(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for sink in open_sinks(tmp_path, ("wandb",)):
        sink.write({"step": 3, "loss": 0.5})
        sink.close()
    assert calls == [
        {"project": "longctx", "name": tmp_path.name, "dir": tmp_path},
        (3, {"loss": 0.5}),
        "finished",
    ]


def test_no_curve_without_records(tmp_path):
    assert plot_loss(tmp_path) is None


def test_progress_in_lines(capsys):
    view = ProgressView(20, 0)
    numbers = {"bits_per_byte": 2.5, "tokens_per_second": 12345.6, "mfu": 0.4321, "eta_seconds": 61}
    view.write({"step": 3, "loss": 1.25} | numbers)
    view.write({"step": 3, "valid_bits_per_byte": 2.75})
    view.close()
    first, second = capsys.readouterr().out.splitlines()
    for part in ("step 3/20", "1.2500 nats", "2.500 bits/byte", "12,346", "MFU 43.2%", "0:01:01"):
        assert part in first
    assert "held out 2.750 bits/byte" in second


def test_the_bar_shows_the_time_left_of_the_record(monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    view = ProgressView(20, 0)
    view.write({"step": 3, "loss": 1.25, "eta_seconds": 61})
    view.close()
    assert "1.2500 nats  ETA 0:01:01" in capsys.readouterr().out


def test_held_out_curve():
    records = [
        {"step": 11, "loss": 4.0, "tokens_per_second": 100.0},
        {"step": 15, "valid_bits_per_byte": 3.0},
        {"step": 21, "loss": 3.0},
        {"step": 21, "valid_bits_per_byte": 2.0},
    ]
    assert held_out_curve(records) == [(15, 3.0), (21, 2.0)]
    assert held_out_curve(records[:1]) == []
