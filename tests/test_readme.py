"""The README does what it says: its example runs, its commands exist, its table is up to date."""

import io
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from experiments import results
from longctx.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_example_trains():
    (example,) = blocks("python")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert 4 < float(printed.getvalue()) < 7  # ln 256 is 5.5
    assert len(example.splitlines()) <= 30


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c[1] for c in commands() if c[0] == "make"]
    assert targets == ["quickstart", "test"]
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)


def test_every_command_has_help(capsys):
    named = {c[1] for c in commands() if c[0] == "longctx"}
    named |= set(re.findall(r"`longctx ([a-z-]+)", README))
    assert named <= set(COMMANDS)
    for name in sorted(named):
        with suppress(SystemExit):  # how tyro ends after its help
            main([name, "--help"])
        assert name in capsys.readouterr().out


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    program = [sys.executable, "-c", "from longctx.cli import main; main()"]
    # As a user has them: optimized, unlike what else the tests run.
    env = {name: x for name, x in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}

    def run(*lines: list[str]) -> None:
        for line in lines:
            done = subprocess.run(
                [*program, *line], cwd=tmp_path, capture_output=True, text=True, env=env
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"

    lines = [arguments for name, *arguments in commands() if name == "longctx"]
    alone = ["check-device"]  # as long as all others, which need what the ones before them wrote
    assert alone in lines
    lines.remove(alone)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(run, *lines), pool.submit(run, alone)]:
            done.result()


def test_tables_are_those_of_the_committed_rows():
    assert (ROOT / "RESULTS.md").read_text() == results.results()
    assert results.with_table(README) == README
