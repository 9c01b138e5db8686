"""Parts of experiments: measured once, by one process or several, and shown when some fail."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from longctx.configs import RUNS
from longctx.errors import UserError
from longctx.reproduce import many, part
from longctx.reproduce.command import reproduce
from longctx.reproduce.part import Part

STUDY = Path(__file__).with_name("study.py")


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_parts_are_measured_once_and_say_where(jobs, tmp_path, monkeypatch):
    arguments = [str(STUDY), "--out", str(tmp_path), "--jobs", str(jobs)]
    monkeypatch.setattr("sys.argv", ["longctx", "reproduce", *arguments])
    reproduce(arguments)
    results = tmp_path / "reproduce" / "study" / "smoke" / "results.jsonl"
    second, first = (json.loads(line) for line in results.read_text().splitlines())
    assert (second["arm"], first["arm"]) == ("second", "first")  # as the experiment has them
    assert first["tokens_per_second"] > 0 and "tokens_per_second" not in second
    assert first["command"].endswith(f"--jobs {jobs}")
    assert second["bits_per_byte"] != first["bits_per_byte"]
    (rows,) = tmp_path.glob(f"runs/{first['run']}/reproduce.study.smoke.*.jsonl")
    rows.write_text(rows.read_text().replace("cpu", "another machine"))
    reproduce([str(STUDY), "--out", str(tmp_path)])
    second, first = (json.loads(line) for line in results.read_text().splitlines())
    assert (first["device"], second["device"]) == ("another machine", "cpu")


def test_parts_that_share_a_run_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "trained", lambda config, runs: runs / part.run_name(config))
    same = [Part(name, RUNS["quickstart"], lambda run, name=name: [{"arm": name}]) for name in "ab"]
    for one in same:
        (tmp_path / part.run_name(one.config)).mkdir(exist_ok=True)
        part.measured(one, "study", tmp_path)
    assert [part.rows_of(one, "study", tmp_path)[0]["arm"] for one in same] == ["a", "b"]


def test_what_was_measured_before_a_failure_is_shown(tmp_path, monkeypatch):
    def fails(one, name, runs):
        if one.name == "second":
            raise ValueError("broken on purpose")
        return measured(one, name, runs)

    measured = many.measured
    monkeypatch.setattr(many, "measured", fails)
    with pytest.raises(UserError, match="broken on purpose"):
        reproduce([str(STUDY), "--out", str(tmp_path)])
    assert (tmp_path / "reproduce" / "study" / "smoke" / "table.md").read_text() == "first None\n"


def test_all_of_no_experiments_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="experiments has no experiments"):
        reproduce(["--all"])


def test_jobs_are_dealt_out_over_gpus(monkeypatch, capsys):
    def taken(usable, gpus, count):
        started, found = multiprocessing.Value("i", 0), []
        for _ in range(count):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", usable)
            many._take_gpu(started, gpus)
            found.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return found

    assert taken("", 3, 5) == ["0", "1", "2", "0", "1"]
    assert taken("4,5,7", 2, 3) == ["4", "5", "4"]
    assert taken("4,5", 1, 2) == ["4,5", "4,5"]
    with pytest.raises(UserError, match="gpus=3 must be at most 2"):
        taken("4,5", 3, 1)
    with pytest.raises(SystemExit):
        reproduce([str(STUDY), "--jobs", "2", "--gpus", "3"])
    assert "gpus=3 must be from 1 to jobs=2" in capsys.readouterr().err


def test_a_study_without_its_base_arm_is_no_second_failure(tmp_path, monkeypatch, capsys):
    study = many.Study(STUDY, "smoke", tmp_path)
    study.results.parent.mkdir(parents=True)
    many._show_unfinished(study)  # nothing is there yet
    study.results.write_text("{}\n")

    def table(self, rows):
        raise KeyError("base")

    monkeypatch.setattr(type(study.experiment), "table", table)
    many._show_unfinished(study)
    assert "too little was measured" in capsys.readouterr().out
