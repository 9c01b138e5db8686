"""Every experiment file runs at smoke scale and leaves rows, a table and a figure."""

import json
from pathlib import Path

import pytest

from longctx.reproduce.command import experiment_files, reproduce

ROOT = Path(__file__).parents[2]
FILES = [file.relative_to(ROOT) for file in sorted(experiment_files(ROOT / "experiments"))]
# One per paper; of 2405.17381 test_transnormer.py runs one more.
FAST = (
    "transnormer/lightning_generations.py",
    "transnormer/decoding.py",
    "sparse_flash/coverage.py",
    "tensorized/operator_speed.py",
    "ring_attention/max_context.py",
)


def left_behind(out: Path, file: Path) -> None:
    folder = out / file.parent.name / file.stem / "smoke"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows
    assert all({"command", "commit", "device", "versions", "date"} <= row.keys() for row in rows)
    assert (folder / "table.md").read_text().count("|---") > 1
    assert (folder / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("name", FAST)
def test_one_experiment_per_paper(name, tmp_path, monkeypatch):
    if name.startswith("ring_attention"):
        pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    monkeypatch.chdir(ROOT)
    reproduce([f"experiments/{name}", "--scale", "smoke", "--out", str(tmp_path)])
    left_behind(tmp_path, Path("experiments") / name)


@pytest.mark.slow
def test_all_experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    reproduce(["--all", "--scale", "smoke", "--out", str(tmp_path)])
    assert len(FILES) > 14
    for file in FILES:
        left_behind(tmp_path, file)
