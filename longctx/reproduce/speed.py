"""How fast the steps of a run are, on a device that does nothing else meanwhile."""

import statistics
import time
from pathlib import Path

import jax

from longctx.data.pipeline import load_corpus, train_batches
from longctx.parallel.mesh import make_mesh
from longctx.provenance import write_rows
from longctx.reproduce.part import Part, alone, speed_file
from longctx.train.config import RunConfig
from longctx.train.step import create_state, make_train_step, put_batch

BATCHES, STEPS = 5, 8  # batches of queued steps, and steps in one


def timed(part: Part, runs: Path) -> None:
    """Write down how fast the steps of a part are, if that is not known yet.

    Other processes that time something for `runs` wait; none may train meanwhile.
    """
    path = speed_file(part, runs)
    if not path.exists():
        seconds = step_seconds(part.config, runs / "device.lock")
        write_rows(path, [{"tokens_per_second": part.config.tokens_per_step / seconds}])


def step_seconds(config: RunConfig, lock: Path) -> float:
    """Seconds of a training step on one batch, the median over batches of queued steps.

    Reading data and writing metrics is left out. The program is compiled before `lock` is taken.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        corpus = load_corpus(config.data, "train", vocab_size=config.model.vocab_size)
        batch = put_batch(next(train_batches(corpus, config.data)), mesh)
        state, advance, found = create_state(config, mesh), make_train_step(config), []
        state, metrics = advance(state, batch)
        jax.block_until_ready(metrics)
        with alone(lock):
            for _ in range(BATCHES):
                began = time.perf_counter()
                for _ in range(STEPS):
                    state, metrics = advance(state, batch)
                jax.block_until_ready(metrics)
                found.append((time.perf_counter() - began) / STEPS)
    return statistics.median(found)
