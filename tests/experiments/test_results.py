"""RESULTS.md: every experiment stands in it, and rows are read as the comparisons they are."""

import pytest

from experiments import lines, results
from experiments.claims import PAPERS, ROOT
from longctx.reproduce.command import experiment_files

SECTIONS = [section for sections in PAPERS.values() for section in sections]


def test_every_experiment_and_every_committed_file_has_its_place():
    commands = " ".join(section.command for section in SECTIONS)
    for file in experiment_files(ROOT / "experiments"):
        assert str(file.relative_to(ROOT)) in commands
    committed = {p.relative_to(ROOT) for p in ROOT.glob("experiments/*/results/*.jsonl")}
    assert committed <= {section.file for section in SECTIONS}


def test_what_is_not_measured_says_what_it_needs():
    _, _, missing = results.results().partition("## Not measured yet")
    for section in SECTIONS:
        assert (section.command in missing) or section.is_measured
        assert section.needs


@pytest.mark.parametrize("section", [s for s in SECTIONS if s.is_measured], ids=lambda s: s.title)
def test_measured_sections_have_lines(section):
    assert list(section.lines(results.read_rows(ROOT / section.file)))


def test_ring_rows_are_compared_with_a_share_of_one_device():
    row = {"name": "ring", "which": "forward_backward", "length": 32768, "heads": 64}
    row |= {"kv_heads": 8, "devices": 2, "group": "attention", "part": "full"}
    one = row | {"name": "ours", "devices": 1, "ms": 6.0, "errors": {"o": 1e-3, "dq": 2e-3}}
    two = row | {"ms": 4.0, "ideal_ms": 3.0, "of_ideal": 0.75, "errors": {"o": 3e-3, "dq": 1e-3}}
    line, error = lines.ring([one, two])
    part = {name: two[name] for name in two if name != "errors"} | {"part": "alone"}
    (alone,) = lines.ring([part])
    assert alone.what.endswith("heads 64:8, what one computes")
    assert line.what == "ring, forward + backward, 2 x 16384 tokens, heads 64:8"
    assert (line.beside, line.theirs, line.ours) == ("1/2 of one device", "3.000 ms", "4.000 ms")
    assert line.ratio == pytest.approx(4 / 3)
    assert error.ratio == pytest.approx(1.5)


def test_training_over_devices_is_compared_with_one_device_of_equal_work():
    def row(model, devices, each, speed):
        lengths = {"per_device": each, "length": devices * each}
        rates = {"tokens_per_second": speed * devices, "tokens_per_second_per_device": speed}
        return {"model": model, "devices": devices, **lengths, **rates}

    (speed,) = lines.ring_training([row("TNL", 1, 8, 100.0), row("TNL", 2, 8, 90.0)])
    assert (speed.theirs, speed.ours, speed.ratio) == ("100 tokens/s", "90 tokens/s", 0.9)
    softmax = [row("Transformer", 1, 8, 100.0), row("Transformer", 1, 32, 40.0)]
    softmax += [row("Transformer", n, 8, speed) for n, speed in ((2, 60.0), (4, 30.0))]
    alone, same = lines.ring_training(softmax)
    assert (alone.theirs, alone.ours, alone.ratio) == ("", "60 tokens/s", None)
    assert (same.theirs, same.ours, same.ratio) == ("40 tokens/s", "30 tokens/s", 0.75)
    ring = [row("TNL", n, 8, 80.0) | {"states": "ring"} for n in (1, 2)]
    *_, line = lines.ring_training([row("TNL", 1, 8, 100.0), *ring])
    assert "states in a ring" in line.what
    assert (line.theirs, line.ratio) == ("80 tokens/s", 1.0)


def test_the_longest_over_devices_is_compared_with_one_device():
    row = {"model": "TNL", "devices": 2, "of_first": 0.9}
    row |= {"per_device": 90, "length": 180, "memory_bytes": 8e10}
    (longest,) = lines.ring_longest([row])
    assert (longest.theirs, longest.ours, longest.ratio) == ("100 tokens", "180 tokens", 1.8)


def test_schedules_show_what_is_exposed_and_how_memory_grows():
    def row(devices, exposed, memory):
        moves = {"collective-permute": {"bytes": 4e6, "exposed_bytes": exposed}}
        row = {"name": "ring", "which": "forward", "heads": 2, "kv_heads": 2, "moves": moves}
        row["part"] = "full"
        return row | {"devices": devices, "length": 8 * devices, "temporary_bytes": memory}

    hidden, exposed, memory = lines.schedule([row(4, 0, 1e6), row(16, 1e6, 2e6)])
    assert (hidden.ours, hidden.ratio) == ("0 MB", 0)
    assert (exposed.theirs, exposed.ours, exposed.ratio) == ("4 MB", "1 MB", 0.25)
    assert (memory.theirs, memory.ours, memory.ratio) == ("1 MB", "2 MB", 2)


def test_ablations_give_differences_without_a_ratio():
    def row(arm, score, **more):
        paper = {"a": 2.0, "b": 2.5}[arm]
        row = {"arm": arm, "base": "a", "bits_per_byte": score, "paper": paper, "parameters": 1}
        return row | {"source": "table 1"} | more

    seeds = [row("a", s) for s in (1.0, 1.1, 1.2)]
    (line,) = lines.ablation([*seeds, row("b", 3.1)])
    assert line == lines.Line("b against a", "table 1", "+0.500", "+2.0000 ± 0.1155")
    longer = [row("a", 9.0, length=128, trained=64), row("b", 1.0, length=128, trained=64)]
    trained = [row("a", 1.0, length=64, trained=64), row("b", 1.5, length=64, trained=64)]
    (line,) = lines.ablation([*longer, *trained])
    assert line.ours == "+0.5000"


def test_operators_without_a_rival_or_a_time_are_left_out():
    def row(name, length, ms):
        return {"operator": name, "length": length, "ms": ms}

    rows = [row("dense", 64, 8.0), row("hash nb=2", 64, 2.0), row("hash nb=2", 128, 3.0)]
    (line,) = lines.by_operator("dense", "hash")(rows)
    assert line.what == "hash nb=2, forward + backward, 1 x 64"
    assert line.ratio == 0.25
