"""What `longctx train`, `eval` and `generate` do with their arguments."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from longctx.cli import parse
from longctx.configs import RUNS
from longctx.errors import UserError
from longctx.generate import Sampling
from longctx.launch import LaunchConfig, join
from longctx.parallel.mesh import MeshConfig
from longctx.train.config import RunConfig

ONE_OR_FOUND = LaunchConfig()

TRAIN_HELP = f"""usage: longctx train NAME [--out DIR] [overrides]

NAME is {", ".join(RUNS)}, or file.py:NAME for a RunConfig in a file of your own (an entry of
its RUNS, or a variable). `longctx train NAME --help` lists every field with its value."""


ADAPT_HELP = """usage: longctx adapt SOURCE [--out DIR] [overrides]

SOURCE is a run or a Hugging Face folder (Llama, Mistral, TransNormerLLM, MiniMax-01). The new run
begins with its parameters; overrides are those of `longctx train`. Attention of another kind:

  tensorized  --model.mixers tensorized --model.tensorized.dims 2048 None
  windowed    --model.mixers window --model.softmax.window 1024
  ring        --mesh.seq 4 --parallel.strategy ring
  a hybrid    --model.mixers lightning lightning lightning softmax

`longctx eval` then scores it by length and context."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a run, or resume what its directory already holds."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    # Directory of the run, which all processes must see; default runs/NAME.
    out: pathlib.Path
    # How the processes of the run meet.
    launch: LaunchConfig = ONE_OR_FOUND


IN_FILE = ".py:"  # between a file and the name of a run in it, which may have colons too


def train(arguments: Sequence[str]) -> None:
    """`longctx train NAME [--out DIR] [overrides]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(TRAIN_HELP)
        return
    name, *overrides = arguments
    default = TrainOptions(find_run(name), pathlib.Path("runs") / name.rpartition(IN_FILE)[2])
    _launch(parse(TrainOptions, f"train {name}", overrides, default=default))


def adapt(arguments: Sequence[str]) -> None:
    """`longctx adapt SOURCE --out DIR [overrides]`: train on, with another attention if wanted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(ADAPT_HELP)
        return

    from longctx.train.initial import source_config

    source, *overrides = arguments
    found = source_config(pathlib.Path(source))
    init = str(pathlib.Path(source))  # without a slash at its end, by which resuming would differ
    begun = dataclasses.replace(found, train=dataclasses.replace(found.train, init=init))
    default = TrainOptions(begun, pathlib.Path("runs") / f"{pathlib.Path(source).name}-adapted")
    _launch(parse(TrainOptions, f"adapt {source}", overrides, default=default))


def _launch(options: TrainOptions) -> None:
    join(options.launch)

    from longctx.train.loop import train as run

    run(options.run, options.out)


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """A Hugging Face folder as a run, or the newest checkpoint of a run as such a folder."""

    # A Hugging Face folder, or the directory of a run.
    source: tyro.conf.Positional[pathlib.Path]
    # Where the other form goes.
    out: pathlib.Path


def convert(arguments: Sequence[str]) -> None:
    """`longctx convert SOURCE --out DIR`."""
    options = parse(ConvertOptions, "convert", arguments)

    from longctx.hf import is_hf_folder
    from longctx.train.initial import run_from_hf, run_to_hf

    if is_hf_folder(options.source):
        run_from_hf(options.source, options.out)
    else:
        run_to_hf(options.source, options.out)
    print(f"{options.source} -> {options.out}")


def find_run(name: str) -> RunConfig:
    """The run called `name` in `longctx.configs`, or `NAME` of `file.py:NAME`.

    Raises:
      UserError: there is no such run.
    """
    stem, in_file, entry = name.partition(IN_FILE)
    if not in_file:
        if name not in RUNS:
            raise UserError(f"unknown run {name!r}; there are {', '.join(RUNS)}, and file.py:NAME")
        return RUNS[name]
    path = f"{stem}.py"
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
        raise UserError(f"{path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs = getattr(module, "RUNS", {})
    found = runs[entry] if entry in runs else getattr(module, entry, None)
    if not isinstance(found, RunConfig):
        raise UserError(f"{path!r} has no RunConfig {entry!r}; its RUNS are {', '.join(runs)}")
    return found


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Score the newest checkpoint of a run: bits per byte by length and context, or tasks."""

    # Directory of the run.
    run: tyro.conf.Positional[pathlib.Path]
    # Sequence lengths, separated by commas; of text, each must divide the largest.
    lengths: str = "512,1024,2048,4096"
    # Tasks to score instead of held-out text, separated by commas: needle,mqar,... or "all".
    tasks: str = ""
    # Episodes per task and length.
    episodes: int = 64
    # Held-out tokens to score, at least one sequence of the largest length.
    tokens: int = 2**16
    # The devices: --mesh.seq 4 splits sequences over four, --mesh.data 4 the batch.
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if not all(n.isdecimal() and int(n) > 0 for n in self.lengths.split(",")):
            raise ValueError(f"lengths={self.lengths} must be positive numbers, as in 512,1024")
        for length in self.parsed:
            if not self.tasks and max(self.parsed) % length:
                raise ValueError(f"lengths={self.lengths}: {length} does not divide the largest")
            if length % self.mesh.seq:
                seq = self.mesh.seq
                raise ValueError(f"lengths={self.lengths}: mesh.seq={seq} must divide {length}")
        if self.episodes < 1 or self.tokens < 1:
            raise ValueError(f"episodes={self.episodes} and tokens={self.tokens} must be positive")

    @property
    def parsed(self) -> list[int]:
        """The lengths as numbers."""
        return [int(n) for n in self.lengths.split(",")]


def evaluate(arguments: Sequence[str]) -> None:
    """`longctx eval RUN [--lengths 512,1024] [--tokens N | --tasks needle,mqar] [--mesh.seq N]`."""
    options = parse(EvalOptions, "eval", arguments)

    if options.tasks:
        from longctx.eval.recall import evaluate_tasks
        from longctx.tasks import TASKS

        names = list(TASKS) if options.tasks == "all" else options.tasks.split(",")
        count, mesh = options.episodes, options.mesh
        evaluate_tasks(options.run, names, options.parsed, count=count, mesh=mesh)
        return

    from longctx.eval.lengths import evaluate as run

    run(options.run, options.parsed, tokens=options.tokens, mesh=options.mesh)


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continue prompts with the newest checkpoint of a run."""

    # Directory of the run.
    run: tyro.conf.Positional[pathlib.Path]
    # Texts to continue, each as the beginning of a document; they may differ in length.
    prompt: tuple[str, ...]
    # Tokens to add to each.
    max_new_tokens: int = 200
    # Divides the logits; 0 takes the likeliest token every time.
    temperature: float = 0.7
    # Draw from the fewest tokens whose probabilities sum to this.
    top_p: float = 0.95
    # Seed of the draws.
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError("give at least one --prompt, and --max-new-tokens of at least 1")
        Sampling(self.temperature, self.top_p)  # has rules of its own


def generate(arguments: Sequence[str]) -> None:
    """`longctx generate RUN --prompt TEXT...`."""
    options = parse(GenerateOptions, "generate", arguments)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from longctx.data.tokenizer import decode_behind, load_tokenizer
    from longctx.generate import generate as run
    from longctx.train.restore import load_run

    loaded = load_run(options.run)
    tokenizer = load_tokenizer(loaded.config.data.tokenizer)
    prompts = [[tokenizer.boundary, *tokenizer.encode(text.encode())] for text in options.prompt]
    lengths = np.array([len(tokens) for tokens in prompts])
    longest = int(lengths.max()) + options.max_new_tokens
    loaded.config.model.check_length(longest, "tokens with the prompt")
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, tokens in zip(padded, prompts, strict=True):
        row[: len(tokens)] = tokens
    added = run(
        loaded.model,
        jnp.asarray(padded),
        jnp.asarray(lengths),
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_p),
        keys=jax.random.split(jax.random.key(options.seed), len(prompts)),
        stop=tokenizer.boundary,
        vocab_size=tokenizer.vocab_size,
    )
    for text, prompt, row in zip(options.prompt, prompts, np.asarray(added), strict=True):
        print(text + decode_behind(tokenizer, prompt, row.tolist()))
