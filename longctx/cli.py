"""The `longctx` command: one sub-command per entry of `COMMANDS`."""

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any, Never

from longctx.errors import UserError

PROGRAM = "longctx"

# Name -> what it does, and the function (module:name) that takes the arguments after the name.
# The module is imported when the command is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train a named run, or resume it", "longctx.commands:train"),
    "eval": ("score a trained run by length and context", "longctx.commands:evaluate"),
    "generate": ("continue prompts with a trained run", "longctx.commands:generate"),
    "adapt": ("train on from a run or a Hugging Face model", "longctx.commands:adapt"),
    "convert": ("between runs and Hugging Face folders", "longctx.commands:convert"),
    "reproduce": ("run experiments of the papers", "longctx.reproduce.command:reproduce"),
    "plan": ("compile a training step for a pod and report its cost", "longctx.plan:plan"),
    "check-device": ("check and time the kernels here", "longctx.device.check:check_device"),
    "tune-device": ("choose the kernels' tile sizes here", "longctx.device.tune:tune_device"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND ...   ({PROGRAM} COMMAND --help lists its options)\n")
        for command, (summary, _) in COMMANDS.items():
            print(f"  {command:14}{summary}")
        return
    if name not in COMMANDS:
        fail(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[name][1].partition(":")
    try:
        getattr(importlib.import_module(module), function)(arguments[1:])
    except UserError as error:
        fail(str(error))


def fail(message: str) -> Never:
    """Say what is wrong in one line and exit with code 2."""
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse[Options](
    form: type[Options], command: str, arguments: Sequence[str], **settings: Any
) -> Options:
    """The arguments of a command as an instance of the dataclass `form`, through tyro.

    tyro reports a mistake in a box of several parts; here its first one becomes one line.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(form, args=arguments, prog=f"{PROGRAM} {command}", **settings)
    except SystemExit as end:
        if not end.code:
            raise
        fail(f"{_first_part(said.getvalue(), form.__name__)} (see {PROGRAM} {command} --help)")
    except ValueError as error:  # a rule of the outermost dataclass, which tyro lets through
        fail(str(error))


def _first_part(box: str, form: str) -> str:
    """What stands between the first two rules of a box, drawn in Unicode or in ASCII."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if line.startswith(("╭", "─", "╰")) or set(line) == {"-"}:
            parts.append([])
        elif line:
            parts[-1].append(line)
    first = next((part for part in parts[1:] if part), parts[0])
    return " ".join(first).removeprefix(f"Error parsing {form}: ")
