import re
import subprocess
import sys

import pytest

from longctx import cli
from longctx.cli import COMMANDS, main
from longctx.commands import find_run
from longctx.configs import RUNS
from longctx.provenance import read_rows
from tests.longctx.train.runs import write_text

RUN_FILE = """
import dataclasses
from longctx.configs import QUICKSTART
from tests.longctx.train.runs import tiny_run
WIDE = dataclasses.replace(QUICKSTART, model=dataclasses.replace(QUICKSTART.model, width=64))
RUNS = {"small": tiny_run("SOURCE")}
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli")
    path = directory / "mine.py"
    path.write_text(RUN_FILE.replace("SOURCE", write_text(directory)))
    return path


def refusal(capsys, *arguments):
    """The one line on stderr of a command that must fail with code 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_train_evaluate_generate(run_file, tmp_path, capsys):
    out = str(tmp_path / "run")
    main(["train", f"{run_file}:small", "--out", out, "--train.steps", "4"])
    assert "step 4/4" in capsys.readouterr().out

    main(["eval", out, "--lengths", "96,24", "--tokens", "960"])  # trained at 24
    rows = read_rows(tmp_path / "run" / "eval.jsonl")
    assert [(r["length"], r["tokens"], r["step"], r["train_length"]) for r in rows] == [
        (24, 960, 4, 24),
        (96, 960, 4, 24),
    ]
    table = capsys.readouterr().out
    assert all(f"{row['bits_per_byte']:.3f}" in table for row in rows)
    assert {"commit", "device", "date"} <= rows[0].keys()
    assert (tmp_path / "run" / "eval.png").stat().st_size > 5000

    sampling = ["--temperature", "1", "--max-new-tokens", "5"]
    main(["generate", out, "--prompt", "abc", "a longer prompt", *sampling])
    together = capsys.readouterr().out
    assert together.startswith("abc") and "\na longer prompt" in together
    main(["generate", out, "--prompt", "abc", *sampling, "--seed", "1"])
    assert not together.startswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bake"], "unknown command 'bake'; there are train, eval, generate"),
        (["train", "nothing"], "unknown run 'nothing'; there are quickstart"),
        (["train", "absent.py:A"], "'absent.py' is not a Python file"),
        (["train", "quickstart", "--train.stepz", "4"], "Unrecognized options: --train.stepz"),
        (["train", "quickstart", "--train.steps", "x"], "--train.steps: invalid literal"),
        (["train", "quickstart", "--train.steps", "0"], "train.steps=0 must be at least 1"),
        (["train", "quickstart", "--model.remat", "some"], "--model.remat"),
        (["train", "quickstart", "--model.dtype", "f31"], "dtype='f31' must be one of"),
        (["train", "quickstart", "--model.lightning.head-dim", "0"], "head_dim=0 must be at least"),
        (["train", "quickstart", "--out", __file__], "test_cli.py is a file"),
        (["train", "quickstart", "--mesh.data", "7"], "must divide by mesh.data"),
        (["eval"], "PATH"),
        (["eval", "absent"], "absent is not a run"),
        (["eval", "absent", "--lengths", "1,x"], "lengths=1,x must be positive numbers"),
        (["eval", "absent", "--lengths", "512,300"], "300 does not divide the largest"),
        (["generate", "absent", "--prompt", "a"], "absent is not a run"),
        (["generate", "absent"], "--prompt"),
        (["generate", "absent", "--prompt", "a", "--top-p", "0"], "top_p=0.0 must be above 0"),
    ],
)
def test_mistakes_are_one_line_and_code_two(capsys, arguments, message):
    assert message in refusal(capsys, *arguments)


BOXES = [
    "╭─ Parsing error ─╮\n│ Error parsing A: wrong, │\n│ 3     │\n│ ───── │\n│ help │\n╰─────╯\n",
    " Value error \n ------ \n  Error parsing A: wrong,  \n  3\n  ----- \n  help \n\n",
]


@pytest.mark.parametrize("box", BOXES, ids=["Unicode", "ASCII"])
def test_the_first_part_of_a_box_is_what_is_said(box):
    assert cli._first_part(box, "A") == "wrong, 3"


def test_data_errors_are_one_line_too(capsys, tmp_path):
    arguments = ["train", "quickstart", "--out", str(tmp_path), "--data.source", "absent.txt"]
    assert refusal(capsys, *arguments) == "longctx: data source absent.txt does not exist"
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_claims_no_directory(run_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["train", f"{run_file}:small", "--out", str(tmp_path), "--train.trackers", "wandb"]
    assert "pip install longctx[wandb]" in refusal(capsys, *arguments)
    assert not (tmp_path / "config.json").exists()


def test_runs_in_files(run_file, capsys):
    assert find_run(f"{run_file}:small").train.steps == 20
    assert find_run(f"{run_file}:WIDE").model.width == 64
    assert find_run("experiments/hybrids/recall.py:1 lightning : 1").model.num_layers == 8
    message = refusal(capsys, "train", f"{run_file}:large")
    assert "has no RunConfig 'large'; its RUNS are small" in message


def test_help_shows_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "quickstart", "--help"])
    assert end.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for part in ("--model.width", "--mesh.fsdp", "--data.tokenizer", "--train.profile"):
        assert part in text
    assert "--optim.learning-rate FLOAT Peak learning rate (author code)." in text
    assert "--eval.tokens INT Held-out tokens behind each score" in text
    form = r"(?: [A-Z]+| \{[^}]*\}| \[[^()]*\])?"
    assert not re.findall(rf"--[\w.-]+{form} \((?:default|required)", text)


def test_the_command_lists_its_commands(capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", listed, re.M) for name in COMMANDS)
    main(["train"])
    said = capsys.readouterr().out
    assert all(name in said for name in RUNS)


def test_listing_commands_loads_no_jax():
    script = "import sys; from longctx.cli import main; main([]); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
