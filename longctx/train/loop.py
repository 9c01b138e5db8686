"""The training loop: a jitted step, a state, and what must happen around them."""

import pathlib
import time

import jax
from flax import nnx
from jax.sharding import Mesh

from longctx.data.episodes import Episodes
from longctx.data.packing import Corpus
from longctx.data.pipeline import load_corpus, train_batches
from longctx.errors import RunError, told_as
from longctx.eval.score import make_scorer
from longctx.launch import is_primary, say
from longctx.parallel.mesh import batch_share, make_mesh
from longctx.train.checkpoint import Checkpoints
from longctx.train.config import RunConfig
from longctx.train.directory import CHECKPOINTS, check_directory, write_config
from longctx.train.initial import begin_with
from longctx.train.meter import Meter
from longctx.train.metrics import Record, Sink, forget_after, open_sinks
from longctx.train.plot import plot_loss
from longctx.train.profiler import Profiler
from longctx.train.progress import ProgressView
from longctx.train.step import (
    TrainState,
    abstract_state,
    create_state,
    make_train_step,
    model_graph,
    put_batch,
)
from longctx.train.stop import StopSignal


def train(config: RunConfig, out: pathlib.Path) -> None:
    """Run `config` to its last step in the directory `out`, resuming what `out` already holds.

    Writes config.json, metrics.jsonl, loss.png and checkpoints/ there.

    Raises:
      DataError: the data cannot serve the run.
      RunError: `out` holds another run or a later step, none of its checkpoints can be read, a loss
        is not finite, or the model, the mesh or the step cannot be built.
      SystemExit: a signal asked the run to stop; everything is saved.
    """
    with told_as(RunError, TypeError):  # a rule of the mesh or of some module
        mesh, graph = make_mesh(config.mesh), model_graph(config)
    with jax.set_mesh(mesh), StopSignal() as stop:
        run = _Run(config, out, mesh, graph)
        try:
            run.steps(stop)
        finally:
            run.close()


class _Run:
    """A run in progress: its state, and everything that reads or writes it."""

    def __init__(
        self, config: RunConfig, out: pathlib.Path, mesh: Mesh, graph: nnx.GraphDef
    ) -> None:
        self._config, self._out, self._mesh = config, out, mesh
        vocab_size, length = config.model.vocab_size, config.data.sequence_length
        corpus = load_corpus(config.data, "train", vocab_size=vocab_size)
        held_out = load_corpus(config.data, "valid", vocab_size=vocab_size)
        part, parts = batch_share(mesh)
        self._batches = train_batches(corpus, config.data, part=part, parts=parts)
        self._score = make_scorer(
            graph,
            held_out,
            length,
            tokens=config.eval.tokens,
            mesh=mesh,
            layout=config.parallel.token_layout,
        )
        check_directory(config, out)
        self._checkpoints = Checkpoints(out / CHECKPOINTS, keep=config.train.checkpoints_kept)
        self.done, self.state = self._restore_or_create()
        self._sinks: list[Sink] = []
        if is_primary():
            forget_after(out / "metrics.jsonl", self.done)
            self._sinks = open_sinks(out, config.train.trackers)
            self._sinks.append(ProgressView(config.train.steps, self.done))
            print(_describe(self.state, corpus, mesh))
            write_config(config, out)  # late: a start that fails claims no directory
        self._meter = Meter(config, corpus.bytes_per_token, self._sinks, self._checkpoints)
        first, last = config.train.profile_steps
        if 0 < last <= self.done:
            say(f"train.profile={config.train.profile}: no trace, the run is past these steps")
        self._profiler = Profiler(out, first, last)

    def _restore_or_create(self) -> tuple[int, TrainState]:
        target = abstract_state(self._config, self._mesh)
        found = self._checkpoints.restore(target, self._batches)
        if found is None:
            return 0, self._first_state()
        say(f"{self._out}: going on after step {int(found.step)}")
        return int(found.step), found

    def _first_state(self) -> TrainState:
        state, source = create_state(self._config, self._mesh), self._config.train.init
        if not source:
            return state
        state, fresh = begin_with(state, self._config, pathlib.Path(source), self._mesh)
        say(f"parameters from {source}; random: {', '.join(fresh) or 'none'}")
        return state

    def steps(self, stop: StopSignal) -> None:
        """Take the steps that are left, or fewer if `stop` says so."""
        train, every = self._config.train, self._config.eval.every
        advance = make_train_step(self._config)
        for step in range(self.done + 1, train.steps + 1):
            self._profiler.before(step)
            batch = next(self._batches)
            batch_on_mesh = put_batch(batch, self._mesh, self._config.parallel.token_layout)
            with told_as(RunError):  # a rule of some operator, found as the step is traced
                self.state, metrics = advance(self.state, batch_on_mesh)
            self._meter.push(step, metrics, batch["index"])
            self._profiler.after(step, metrics)
            if step == train.steps or (every and step % every == 0):
                self._evaluate(step)
            if step == train.steps or step % train.checkpoint_every == 0:
                self._save(step)
            if step < train.steps and stop.after(step):
                self._save(step)
                say(f"stopped by a signal after step {step}; the same command resumes")
                raise SystemExit(stop.exit_code)

    def _evaluate(self, step: int) -> None:
        self._meter.pause()
        began = time.perf_counter()
        score = self._score(self.state.params, self.state.rest)
        record: Record = {
            "step": step,
            "valid_bits_per_byte": score.bits_per_byte,
            "valid_tokens": score.tokens,
            "valid_seconds": time.perf_counter() - began,
        }
        for sink in self._sinks:
            sink.write(record)

    def _save(self, step: int) -> None:
        self._meter.pause()  # also makes sure that a state with a NaN is never saved
        if self._checkpoints.last_saved != step:
            self._checkpoints.save(step, self.state, self._batches)

    def close(self) -> None:
        """Finish writing, and draw the loss curve."""
        self._profiler.close()
        for sink in self._sinks:
            sink.close()
        self._checkpoints.close()
        if self._sinks:
            curve = plot_loss(self._out)
            drawn = f", loss curve in {curve}" if curve else ""
            print(f"checkpoints in {self._out / CHECKPOINTS}{drawn}")


def _describe(state: TrainState, corpus: Corpus | Episodes, mesh: Mesh) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    return (
        f"{parameters:,} parameters, {corpus}, {mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
