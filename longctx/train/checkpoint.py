"""Checkpoints: saved in the background, restored from the newest one that can be read."""

import pathlib
from typing import Any

import grain
import orbax.checkpoint as ocp
from flax import nnx

from longctx.errors import RunError
from longctx.launch import say
from longctx.train.step import TrainState

# Orbax writes a checkpoint under a name with this mark and renames it when all of it is on disk.
UNFINISHED = ".orbax-checkpoint-tmp"

# What reading a damaged checkpoint raises: tensorstore's refusals are ValueErrors, missing files
# OSErrors, missing entries KeyErrors.
DAMAGED = (ValueError, OSError, KeyError)


class Checkpoints:
    """The checkpoints of one run, by step; whole for any number of processes and any mesh.

    Each holds `model` (parameters, constants, random streams), `optimizer` (moments and step) and
    `data` (the position of the input pipeline, the same in all processes).
    """

    def __init__(self, directory: pathlib.Path, *, keep: int | None = None) -> None:
        """Open `directory`, to write as well if `keep` (newest ones to keep) is given."""
        self.directory = directory.absolute()
        self._writable = keep is not None
        self._unfinished = sorted(p.name for p in self.directory.glob(f"*{UNFINISHED}*"))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=self._writable,
            cleanup_tmp_directories=self._writable,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self.last_saved: int | None = None

    def save(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Save after `step`; the copy is taken before this returns, the writing goes on behind."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(_model(state)),
                optimizer=ocp.args.StandardSave(_optimizer(state)),
                data=ocp.args.JsonSave(batches.get_state()),
            ),
        )
        self.last_saved = step

    def save_model(self, step: int, state: TrainState) -> None:
        """Save what evaluation and generation need, without optimizer and data."""
        items = ocp.args.Composite(model=ocp.args.StandardSave(_model(state)))
        self._manager.save(step, args=items)

    def restore(self, target: TrainState, batches: grain.DatasetIterator) -> TrainState | None:
        """The state of the newest checkpoint that can be read; `batches` is moved along with it.

        Checkpoints that cannot be read are named on the console and removed: the resumed run
        will come by their steps again.

        Args:
          target: a tree of `jax.ShapeDtypeStruct` with the shardings wanted.

        Returns:
          None if nothing was ever saved.

        Raises:
          RunError: there are checkpoints, and none can be read.
        """
        found = self._newest(
            model=ocp.args.StandardRestore(_model(target)),
            optimizer=ocp.args.StandardRestore(_optimizer(target)),
            data=ocp.args.JsonRestore(),
        )
        if found is None:
            return None
        step, items = found
        for newer in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(newer)
        batches.set_state(items["data"])
        self.last_saved = step
        return TrainState(**items["model"], **items["optimizer"])

    def restore_model(self, target: TrainState) -> tuple[int, nnx.State, nnx.State] | None:
        """Step, parameters and other variables, as `restore` finds them; nothing is removed."""
        found = self._newest(model=ocp.args.StandardRestore(_model(target)))
        if found is None:
            return None
        step, items = found
        return step, items["model"]["params"], items["model"]["rest"]

    def _newest(self, **items: ocp.args.CheckpointArgs) -> tuple[int, Any] | None:
        for name in self._unfinished:
            say(f"skipping {self.directory / name}: half-written")
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, self._manager.restore(step, args=ocp.args.Composite(**items))
            except DAMAGED as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                say(f"skipping {self.directory / str(step)}: it cannot be read ({reason})")
        if steps or self._unfinished:
            raise RunError(
                f"no checkpoint in {self.directory} can be read; remove the run to start anew"
            )
        return None

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _model(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "rest": state.rest}


def _optimizer(state: TrainState) -> dict[str, Any]:
    return {"moments": state.moments, "step": state.step}
