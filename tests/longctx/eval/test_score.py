import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from longctx.data.packing import Windows, pack
from longctx.data.pipeline import stack
from longctx.data.tokenizer import ByteTokenizer
from longctx.eval import score as score_module
from longctx.eval.score import make_scorer
from longctx.parallel.mesh import make_mesh
from tests.longctx.models.tiny import TINY, tiny_model

MODEL = tiny_model(dataclasses.replace(TINY, vocab_size=257))
GRAPH, PARAMS, REST = nnx.split(MODEL, nnx.Param, ...)


def corpus(*sizes):
    draw = np.random.default_rng(0)
    texts = [("", draw.integers(97, 123, n, dtype=np.uint8).tobytes()) for n in sizes]
    return pack(texts, ByteTokenizer())


def nll_of(text, windows):
    """Straight from the logits."""
    batch = stack([Windows(text, 256)[i] for i in windows])
    hidden = jax.jit(lambda t, d: MODEL(t, doc_start=d))(batch["tokens"], batch["doc_start"])
    log_p = np.asarray(jax.nn.log_softmax(MODEL.logits(hidden)), np.float64)
    return -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]


def test_score_is_the_mean_over_the_targets_by_context(monkeypatch):
    monkeypatch.setattr(score_module, "BATCH_TOKENS", 256)  # rounded up to a row per device
    text = corpus(300, 700, 400)
    mesh = make_mesh(data=2)
    with jax.set_mesh(mesh):
        score = make_scorer(GRAPH, text, 256, tokens=3 * 256, mesh=mesh)(PARAMS, REST)
    nll = nll_of(text, [0, 2, 4])  # three windows of five, evenly spread
    to_bits = 1 / np.log(2) / text.bytes_per_token
    assert score.tokens == nll.size
    assert score.bits_per_byte == pytest.approx(nll.mean() * to_bits, rel=1e-5)
    assert [(b.first, b.last) for b in score.buckets] == [(0, 63), (64, 127), (128, 255)]
    context = np.arange(256) - np.stack([Windows(text, 256)[i]["doc_start"] for i in (0, 2, 4)])
    for bucket in score.buckets:
        member = (bucket.first <= context) & (context <= bucket.last)
        assert bucket.tokens == member.sum() > 0
        assert bucket.bits_per_byte == pytest.approx(nll[member].mean() * to_bits, rel=1e-5)


def test_scorers_of_one_block_see_the_same_text():
    text, mesh = corpus(2000), make_mesh()
    rows = [
        make_scorer(GRAPH, text, length, tokens=512, mesh=mesh, block=256)(PARAMS, REST)
        for length in (64, 256)
    ]
    assert rows[0].tokens == rows[1].tokens == 512
    assert rows[0].buckets[0].tokens == 512
    with pytest.raises(ValueError, match="length=100 must divide block=256"):
        make_scorer(GRAPH, text, 100, tokens=512, mesh=mesh, block=256)
