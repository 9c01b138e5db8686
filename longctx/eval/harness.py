"""A trained run as a model of lm-eval, EleutherAI's harness of standard benchmarks (an extra).

import lm_eval
from longctx.eval.harness import harness_model

lm_eval.simple_evaluate(model=harness_model("runs/mine"), tasks=["lambada_openai"])
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.progress import track

from longctx.data.tokenizer import decode_behind, load_tokenizer
from longctx.errors import UserError
from longctx.generate import Sampling, generate
from longctx.train.restore import load_run

# Rows of a batch, and the shortest length to which rows are padded; longer ones are powers of two,
# so that few shapes are compiled.
BATCH, SHORTEST = 8, 32


class RunScorer:
    """Likelihoods and continuations of texts under the newest checkpoint of a run.

    Every text begins a document. What exceeds `max_length` tokens (default: the trained length)
    loses its beginning.
    """

    def __init__(self, run: pathlib.Path, *, max_length: int | None = None) -> None:
        loaded = load_run(run)
        self.model = loaded.model
        self.tokenizer = load_tokenizer(loaded.config.data.tokenizer)
        self.max_length = max_length or loaded.config.data.sequence_length
        graph, *variables = nnx.split(self.model, nnx.Param, ...)

        @jax.jit
        def score(
            variables: Any, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
        ) -> tuple[Float[Array, "B T"], Array]:
            model = nnx.merge(graph, *variables)
            logits = model.logits(model(tokens))
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, -1) == targets

        def scored(tokens: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return jax.device_get(score(tuple(variables), tokens, targets))

        self._score = scored

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without the boundary."""
        return self.tokenizer.encode(text.encode()).tolist()

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation of a context, and whether it is the greedy one.

        Spaces at the end of a context belong to the continuation, as in lm-eval: tokenizers join
        them to the word that follows.
        """
        rows = []
        for context, continuation in pairs:
            whole, given = self.encode(context + continuation), self.encode(context.rstrip())
            rows.append(([self.tokenizer.boundary, *whole], max(1, len(whole) - len(given))))
        return list(self._sums(rows))

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of whole texts, cut into windows of the largest length.

        The last window reaches back to be as long as the others; only its new tokens count.
        """
        totals = []
        for text in texts:
            tokens, size = [self.tokenizer.boundary, *self.encode(text)], self.max_length
            windows = []
            for first in range(0, len(tokens) - 1, size):
                last = min(first + size, len(tokens) - 1)
                windows.append((tokens[max(0, last - size) : last + 1], last - first))
            totals.append(sum(s for s, _ in self._sums(windows)))
        return totals

    def _sums(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of the last n tokens of each row, and whether all of them are greedy."""
        for first in track(range(0, len(rows), BATCH), "scoring", disable=len(rows) <= BATCH):
            batch = [(r[-self.max_length - 1 :], n) for r, n in rows[first : first + BATCH]]
            length = _padded(max(len(r) - 1 for r, _ in batch))
            tokens, targets = np.zeros((2, BATCH, length), np.int32)
            for i, (row, _) in enumerate(batch):
                tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
            scores, greedy = self._score(tokens, targets)
            for i, (row, n) in enumerate(batch):
                last = slice(max(0, len(row) - 1 - n), len(row) - 1)
                yield float(scores[i, last].sum()), bool(greedy[i, last].all())

    def continuation(self, prompt: str, until: Sequence[str], count: int) -> str:
        """Greedy continuation by at most `count` tokens, cut before the first of `until`."""
        prefix = [self.tokenizer.boundary, *self.encode(prompt)][-self.max_length :]
        padded = np.zeros((1, _padded(len(prefix))), np.int32)
        padded[0, : len(prefix)] = prefix
        new = generate(
            self.model,
            jnp.asarray(padded),
            jnp.asarray([len(prefix)]),
            max_new_tokens=count,
            sampling=Sampling(0.0, 1.0),
            stop=self.tokenizer.boundary,
            vocab_size=self.tokenizer.vocab_size,
        )
        text = decode_behind(self.tokenizer, prefix, np.asarray(new)[0].tolist())
        return text[: min([text.find(end) for end in until if end in text], default=len(text))]


def _padded(length: int) -> int:
    return max(SHORTEST, 1 << (length - 1).bit_length())


def harness_model(run: str | pathlib.Path, *, max_length: int | None = None) -> Any:
    """The run as an `lm_eval.api.model.LM`: likelihoods, rolling likelihoods, greedy generation.

    Raises:
      UserError: lm-eval is not installed, or a task wants sampling.
      RunError: `run` has no checkpoint that can be read.
    """
    try:
        from lm_eval.api.model import LM  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError:
        raise UserError("lm-eval is not installed: pip install longctx[lm-eval]") from None
    scorer = RunScorer(pathlib.Path(run), max_length=max_length)

    class RunModel(LM):
        """What lm-eval calls."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return scorer.likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [_generated(scorer, *request.args) for request in requests]

    return RunModel()


def _generated(scorer: RunScorer, prompt: str, how: dict[str, Any]) -> str:
    if how.get("do_sample") and how.get("temperature", 1.0) > 0:
        raise UserError(f"{how}: only greedy generation is offered to lm-eval")
    until = how.get("until") or []
    until = [until] if isinstance(until, str) else until
    return scorer.continuation(prompt, until, how.get("max_gen_toks", 128))
