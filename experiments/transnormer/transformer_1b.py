"""TransNormerLLM against a softmax Transformer, the larger pair: does the gap grow with the size?

Claim (2405.17381, table 11): Transformer-1B 2.061, TNL-1B 1.896.
Command: longctx reproduce experiments/transnormer/transformer_1b.py --scale small
Expected: TNL below the Transformer, by 0.165 bits per token in the paper, where it was 0.114 at
385M. The small scale is 94M parameters here, 28M there; both read the same 17M bytes.
"""

import dataclasses

from experiments.transnormer.base import PAPER, SMALL, ablation
from longctx.models import BYTE_VOCAB, MODELS, tnl, transformer
from longctx.reproduce import Arm

LARGER = dataclasses.replace(tnl(768, 12, 2112, head_dim=64), vocab_size=BYTE_VOCAB)
TABLE = ablation(
    "Transformer and TNL, 1B",
    "table 11",
    base="TNL",
    arms={
        "TNL": Arm(paper=1.896),
        "Transformer": Arm(
            paper=2.061,
            change=lambda run: dataclasses.replace(run, model=transformer(run.model)),
        ),
    },
)
EXPERIMENT = dataclasses.replace(
    TABLE,
    paper_unit="bits per token of a 1B model",
    scales={
        **TABLE.scales,
        "paper": dataclasses.replace(PAPER, model=MODELS["tnl-1b"]),
        "small": dataclasses.replace(SMALL, model=LARGER),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
