"""Longest context that trains on 32 GPUs, by method: an analysis of compiled steps, not a run.

Claim (2310.01889, table 3, 7B): in thousands of tokens vanilla, memory-efficient, blockwise and
ring attention reach 4, 64, 128 and 4096 on 32 A100.
Command: longctx reproduce experiments/ring_attention/max_context_gpu.py --scale paper
Expected: as in max_context.py, whose method this is. H100s have as much memory as the paper's A100s
of 80 GB; there all is float32, here products are bfloat16. The ring spans 8 of the 32 and not all,
for parameters are split over the other axis alone: over 4. At smoke scale the compiler is a TPU's.
"""

from experiments.ring_attention.max_context import METHODS, PODS, SEVEN, MaxContext, Pod

FIRST = dict(zip(METHODS, (16384, 131072, 131072, 1048576), strict=True))
GPUS = Pod("h100:32", 4, 8, SEVEN, FIRST)
EXPERIMENT = MaxContext({"smoke": PODS["smoke"], "small": [GPUS], "paper": [GPUS]})
