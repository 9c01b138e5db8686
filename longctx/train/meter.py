"""Metrics of the steps: fetched one step late, checked, averaged, written."""

import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from longctx.errors import RunError
from longctx.train.checkpoint import Checkpoints
from longctx.train.config import RunConfig
from longctx.train.flops import device_peak, step_flops
from longctx.train.metrics import Record, Sink
from longctx.train.step import Metrics


class Meter:
    """Takes the metrics of every step while the device already works on the next.

    Each record is the mean loss since the record before. The first step after a start is left
    out of the speed, since it contains the compilation. What is left of the run is reckoned by all
    that passed since that step, evaluation and saving included.
    """

    def __init__(
        self,
        config: RunConfig,
        bytes_per_token: float,
        sinks: Sequence[Sink],
        checkpoints: Checkpoints,
    ) -> None:
        self._config, self._sinks, self._checkpoints = config, sinks, checkpoints
        self._bits_per_nat = 1 / (math.log(2) * bytes_per_token)
        self._flops = step_flops(config.model, config.data.sequence_length, config.tokens_per_step)
        peak = device_peak(jax.devices()[0])
        self._peak = None if peak is None else peak * config.mesh.size
        self._pending: tuple[int, Metrics, np.ndarray] | None = None
        self._losses: list[float] = []
        self._timed_steps = 0
        self._clock: float | None = None
        self._first: tuple[int, float] | None = None  # step since the start, and when it was done

    def push(self, step: int, metrics: Metrics, index: np.ndarray) -> None:
        """Hand over the unfetched metrics of `step` and its batch's window numbers."""
        self.flush()
        self._pending = step, metrics, index

    def flush(self) -> None:
        """Fetch what is pending.

        Raises:
          RunError: the loss or the gradient was not finite.
        """
        if self._pending is None:
            return
        (step, metrics, index), self._pending = self._pending, None
        values = {name: float(v) for name, v in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise RunError(self._explain(step, values, index))
        self._losses.append(values["loss"])
        if self._first is None:
            self._first = step, time.perf_counter()
        if self._clock is None:
            self._clock = time.perf_counter()
        else:
            self._timed_steps += 1
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            self._record(step, values)

    def pause(self) -> None:
        """Keep what follows (evaluation, saving) out of the speed."""
        self.flush()
        self._clock, self._timed_steps = None, 0

    def _record(self, step: int, values: dict[str, float]) -> None:
        loss = sum(self._losses) / len(self._losses)
        record: Record = {
            "step": step,
            "loss": loss,
            "bits_per_byte": loss * self._bits_per_nat,
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
        }
        now = time.perf_counter()
        if self._clock is not None and self._timed_steps:
            seconds = (now - self._clock) / self._timed_steps
            flops = self._flops / seconds
            record |= {
                "tokens_per_second": self._config.tokens_per_step / seconds,
                "model_tflops_per_second": flops / 1e12,
                "mfu": None if self._peak is None else flops / self._peak,
            }
        if self._first is not None and step > self._first[0]:
            first, then = self._first
            left = self._config.train.steps - step
            record["eta_seconds"] = (now - then) / (step - first) * left
        self._losses, self._timed_steps, self._clock = [], 0, now
        for sink in self._sinks:
            sink.write(record)

    def _explain(self, step: int, values: dict[str, float], index: np.ndarray) -> str:
        saved = self._checkpoints.last_saved
        where = "there is none" if saved is None else str(self._checkpoints.directory / str(saved))
        return (
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the batch "
            f"was windows {index.tolist()} of the training split; last good checkpoint: {where}"
        )
