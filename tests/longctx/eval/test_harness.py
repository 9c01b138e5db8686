"""The lm-eval adapter: likelihoods are the model's own, greedy text is greedy, errors are clear."""

import sys
import types
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from longctx.data.tokenizer import load_tokenizer
from longctx.errors import UserError
from longctx.eval import harness
from longctx.eval.harness import RunScorer, harness_model
from longctx.train.loop import train
from longctx.train.restore import load_run
from tests.longctx.train.runs import tiny_run

BOUNDARY = 256


class Request(NamedTuple):
    args: tuple


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    (folder / "text.txt").write_text("All work and no play makes a dull model. " * 400)
    train(tiny_run(str(folder / "text.txt")), folder / "run")
    return folder / "run"


@pytest.fixture
def lm(run, monkeypatch):
    """The adapter with a stand-in for lm-eval's base class; nothing else of it is used."""
    stub = types.ModuleType("lm_eval.api.model")
    stub.LM = type("LM", (), {})
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", stub)
    return harness_model(run)


def log_likelihoods(run, text):
    """Of every byte, by a plain pass over the whole text."""
    model, tokens = load_run(run).model, np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    logits = model.logits(model(jnp.asarray([[BOUNDARY, *tokens[:-1]]])))[0]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(tokens))
    return -np.asarray(nll), np.asarray(jnp.argmax(logits, -1)) == tokens


def test_likelihoods_of_continuations(run, lm):
    pairs = [("All work", " and no"), ("", "x"), ("All work and", " q")]
    got = lm.loglikelihood([Request(p) for p in pairs * 4])  # more than a batch
    assert got[:3] * 4 == got
    for (context, rest), (total, greedy) in zip(pairs, got[:3], strict=True):
        scores, best = log_likelihoods(run, context + rest)
        np.testing.assert_allclose(total, scores[-len(rest) :].sum(), rtol=1e-4)
        assert greedy == best[-len(rest) :].all()


def test_spaces_between_belong_to_the_continuation(run, lm):
    """Tokenizers join a space to the word behind it: alone it is another token."""
    apart, joined = lm.loglikelihood(
        [Request(("All work and ", "no play")), Request(("All work and", " no play"))]
    )
    assert apart == joined


def test_rolling_likelihood_is_the_sum_over_windows(run, lm):
    text = "All work and no play. " * 5
    (total,) = lm.loglikelihood_rolling([Request((text,))])
    tokens = [BOUNDARY, *text.encode()]
    length = load_run(run).config.data.sequence_length
    model, want = load_run(run).model, 0.0
    assert (len(tokens) - 1) % length, "the last window is shorter than the others"
    for first in range(0, len(tokens) - 1, length):
        last = min(first + length, len(tokens) - 1)  # the last window has as much context
        window = jnp.asarray(tokens[max(0, last - length) : last + 1])
        logits = model.logits(model(window[None, :-1]))[0]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, window[1:])
        want -= float(nll[-(last - first) :].sum())
    np.testing.assert_allclose(total, want, rtol=1e-4)


def test_generation_is_greedy_and_ends_where_told(run, lm):
    how = {"until": ["\n\n"], "max_gen_toks": 12}
    (text,) = lm.generate_until([Request(("All wo", how))])
    assert 0 < len(text) <= 12
    assert lm.loglikelihood([Request(("All wo", text))])[0][1]  # every byte the likeliest
    (shorter,) = lm.generate_until([Request(("All wo", how | {"until": text[3]}))])
    assert shorter == text[: text.index(text[3])]
    with pytest.raises(UserError, match="only greedy"):
        lm.generate_until([Request(("a", {"do_sample": True, "temperature": 0.7}))])


def test_a_space_that_the_continuation_begins_with_is_kept(run, tmp_path, monkeypatch):
    """Metaspace, as in Llama's tokenizers, strips it where a text begins."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "▁no": 1, "▁play": 2}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    scorer = RunScorer(run)
    scorer.tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    monkeypatch.setattr(harness, "generate", lambda *_, **__: np.array([[2, 1, 0]]))
    assert scorer.continuation("no", [], 3) == " play no"


def test_without_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install longctx\[lm-eval\]"):
        harness_model(run)
