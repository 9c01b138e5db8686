"""What the five papers report and no experiment here repeats, and why."""

from typing import NamedTuple


class LeftOut(NamedTuple):
    """A result of a paper."""

    what: str
    source: str
    reason: str


LEFT_OUT = (
    LeftOut(
        "TransNormer T1 and T2 against TNL: 2.290 and 2.274 against 2.248",
        "2405.17381, table 12",
        "TNL's predecessors; their two kinds of attention are not in this code",
    ),
    LeftOut(
        "the same model trained with LA1 and LA2: 2.229 and 2.228",
        "2401.04658, table 2",
        "a check that both are exact, which here a test of the two operators makes",
    ),
    LeftOut(
        "training speed of 1B and 3B models",
        "2401.04658, table 1",
        "the 385M model stands for them",
    ),
    LeftOut(
        "speed and longest context of models from 7B to 175B",
        "2307.14995, tables 12 to 14",
        "64 GPUs; what such steps need is under Pods, by the compiler",
    ),
    LeftOut(
        "benchmarks of models from 0.4B to 15B",
        "2405.17381, table 2",
        "trained on a trillion tokens of a corpus that is not public",
    ),
    LeftOut(
        "hash-sparse attention against Reformer on enwik8 and MNIST",
        "2306.01160, text",
        "their settings were not published; coverage is compared instead",
    ),
    LeftOut(
        "perplexities and downstream scores of adapted Llama, Mistral and OpenLlama models",
        "2410.20926",
        "the tables could not be read; only the abstract's numbers stand here",
    ),
    LeftOut(
        "longest contexts on 8 A100, TPUv3-512 and TPUv4-1024, and their MFU",
        "2310.01889, table 3 and figures",
        "v5e-256 and 32 GPUs stand for them, by the compiler",
    ),
    LeftOut(
        "reinforcement learning on ExoRL",
        "2310.01889, table 5",
        "no environment of that kind here",
    ),
    LeftOut(
        "line retrieval of a 13B model up to 512K tokens",
        "2310.01889, figure",
        "32 GPUs and ShareGPT conversations; the task itself is in `longctx eval --tasks lines`",
    ),
)
