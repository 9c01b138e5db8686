"""What RESULTS.md covers: for every claim its committed rows, and what it takes to measure them.

One entry per results file. An experiment file says itself what is claimed and how to measure it
(the first sentence of "Claim" in its docstring); its rows are committed as
`experiments/<paper>/results/<experiment>-<scale>.jsonl`.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

from experiments import lines
from experiments.bench import _flash_report, _lightning_report, sparse

ROOT = Path(__file__).parents[1]


class Section(NamedTuple):
    """A claim: where its rows are, how to read them, and what measures them."""

    title: str
    claim: str
    file: Path
    lines: lines.Reader
    command: str
    needs: str
    superseded: bool = False  # by newer rows of the same programs: not told in the README

    @property
    def is_measured(self) -> bool:
        """Whether there are committed rows."""
        return (ROOT / self.file).exists()


def bench(
    name: str,
    title: str,
    claim: str,
    reader: lines.Reader,
    command: str,
    needs: str = "one H100",
    superseded: bool = False,
) -> Section:
    """The rows `name` of a benchmark, which `python -m experiments.bench.COMMAND` makes."""
    file = Path("experiments/bench/results") / f"{name}.jsonl"
    command = f"python -m experiments.bench.{command}"
    return Section(title, claim, file, reader, command, needs, superseded)


def experiment(
    name: str, reader: lines.Reader, scale: str = "small", needs: str = "one H100"
) -> Section:
    """The rows of `longctx reproduce experiments/NAME.py`; what they mean is in its docstring."""
    path = Path("experiments") / f"{name}.py"
    told = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    found = re.search(r"^Claim \(([^)]*)\): (.*?)^Command: ", told, re.S | re.M)
    assert found is not None, f"the docstring of {path} must have its Claim (source) and Command"
    source, claim = (" ".join(group.split()) for group in found.groups())
    first = re.split(r"(?<![. ])\.(?: |$)", claim)[0]
    return Section(
        title=re.split("[:.]", told)[0],
        claim=f"{first[0].upper()}{first[1:]} ({source}).",
        file=path.parent / "results" / f"{path.stem}-{scale}.jsonl",
        lines=reader,
        command=f"longctx reproduce {path} --scale {scale}",
        needs=needs,
    )


PAPERS: dict[str, list[Section]] = {
    "Lightning Attention-2, TransNormerLLM / TNL (2401.04658, 2307.14995, 2405.17381)": [
        bench(
            "lightning_gpu",
            "Lightning attention",
            "Constant time per token at any length (2401.04658), faster than every peer.",
            lines.judged(lines.lightning, _lightning_report.claims),
            "lightning --groups shapes heads worst",
        ),
        bench(
            "lightning_gpu_lengths",
            "Lightning attention by length",
            "Time per token does not depend on the length (2401.04658).",
            lines.judged(lines.lightning_lengths, _lightning_report.claims),
            "lightning --groups heads lengths full --out "
            "experiments/bench/results/lightning_gpu_lengths.jsonl",
        ),
        bench(
            "lightning_cpu",
            "Lightning attention by length, plain JAX on two CPU cores",
            "Heads of 128 in float32; the least of many batches, as other programs use the cores.",
            lines.lightning_lengths,
            "lightning",
            needs="two CPU cores",
        ),
        experiment("transnormer/lightning_generations", lines.lightning_generations, "paper"),
        experiment("transnormer/training_speed", lines.training_speed, "paper"),
        experiment("transnormer/decoding", lines.decoding, "paper"),
        experiment("transnormer/positional_encoding", lines.ablation),
        experiment("transnormer/decay_temperature", lines.ablation),
        experiment("transnormer/gating", lines.ablation),
        experiment("transnormer/normalization", lines.ablation),
        experiment("transnormer/gla_activation", lines.ablation),
        experiment("transnormer/glu_activation", lines.ablation),
        experiment("transnormer/transformer", lines.ablation),
        experiment("transnormer/transformer_1b", lines.ablation),
        experiment(
            "transnormer/wikitext103",
            lines.wikitext103,
            "paper",
            needs="one H100 for some hours; WikiText-103 and GPT-2's tokenizer in data/",
        ),
    ],
    "Hybrids of lightning and softmax attention (2501.08313)": [
        experiment("hybrids/recall", lines.hybrids),
    ],
    "Sparse Flash Attention (2306.01160)": [
        *(
            bench(
                f"sparse_{length}",
                f"Sparse flash attention, {length} tokens",
                "Dropping and hashing beat dense attention, everything included.",
                lines.judged(
                    lines.by_operator("cudnn dense", "hash", "drop", "our dense"), sparse.claims
                ),
                "sparse",
            )
            for length in (8192, 16384, 32768)
        ),
        experiment(
            "sparse_flash/runtime",
            lines.by_operator("cudnn dense", "our dense", "hash", "drop"),
            "paper",
        ),
        experiment("sparse_flash/coverage", lines.coverage, "paper", needs="a CPU"),
        experiment("sparse_flash/tiles", lines.tiles, "paper", needs="a CPU"),
        experiment("sparse_flash/language_model", lines.ablation),
    ],
    "Attention Tensorization (2410.20926)": [
        bench(
            "tensorized",
            "Tensorized attention",
            "The operator is 11x faster than dense attention at 128K tokens.",
            lines.by_operator("cudnn dense", "mixed radix"),
            "tensorized",
        ),
        experiment("tensorized/operator_speed", lines.by_operator("dense", "tensorized"), "paper"),
        bench(
            "prefill",
            "Prefill of an 8B model, 131072 tokens",
            "End to end the operations allow 3.4x; the rows hold each model's bound.",
            lines.by_operator("dense", "mixed radix"),
            "prefill",
        ),
        experiment("tensorized/language_model", lines.ablation),
        experiment("tensorized/long_range", lines.recall),
        experiment("tensorized/adaptation", lines.ablation),
    ],
    "Ring Attention (2310.01889)": [
        experiment("ring_attention/max_context", lines.max_context, "paper", needs="libtpu"),
        experiment(
            "ring_attention/max_context_gpu",
            lines.max_context,
            "paper",
            needs="jax's CUDA plugin, ptxas",
        ),
        bench(
            "ring_pair_ideal",
            "Ring attention",
            "Two GPUs take half of one's time.",
            lines.ring,
            "ring --groups ideal --devices 1 2 --batches 15 --name ring_pair",
            "two H100",
        ),
        bench(
            "ring_h200_ideal",
            "Ring attention on H200s",
            "Two GPUs take half of one's time.",
            lines.ring,
            "ring --groups ideal --devices 1 2 --batches 15 --name ring_h200",
            "two H200",
        ),
        bench(
            "ring_four_ideal",
            "Ring attention on four GPUs",
            "Four GPUs take a quarter of one's time.",
            lines.ring,
            "ring --groups ideal --devices 1 4 --batches 9 --name ring_four",
            "four H100",
        ),
        bench(
            "ring_h200_strategies",
            "Strategies over devices",
            '"auto" is within 5% of the fastest.',
            lines.strategies,
            "ring --groups strategies --devices 1 2 --per-device 32768 8192 4096 --batches 7 "
            "--name ring_h200",
            "two H200",
        ),
        bench(
            "ring_h200_alone",
            "What one of two or eight devices computes, on one alone",
            "Moves are left out: this bounds what so many reach, and is not a measurement of them.",
            lines.ring,
            "ring --groups alone --ranks 2 8 --per-device 8192 32768 --strategies ring all_gather "
            "--batches 5 --name ring_h200",
            "H200",
        ),
        bench(
            "ring_h200_pair_alone",
            "What one of two devices computes of 32768 tokens, on one alone",
            "Moves are left out: this bounds what two reach, and is not a measurement of them.",
            lines.ring,
            "ring --groups alone --ranks 2 --per-device 16384 --strategies ring --batches 15 "
            "--name ring_h200_pair",
            "H200",
        ),
        *(
            bench(
                f"ring_{group}",
                f"{title}, with older kernels, timed in one order",
                f"{claim} In one order slow clocks may always fall on the same program "
                "(docs/guides/scaling.md).",
                lines.ring,
                f"ring --groups {command}",
                "four H100",
                superseded=True,
            )
            for group, title, claim, command in (
                (
                    "peer_ideal",
                    "Ring attention on up to four GPUs",
                    "Two GPUs take half of one's time, four a quarter.",
                    "ideal --name ring_peer",
                ),
                (
                    "ideal",
                    "Ring attention on up to four GPUs as XLA compiles it by default",
                    "Communication hides behind the blocks.",
                    "ideal",
                ),
                (
                    "strategies",
                    "Strategies over up to four GPUs as XLA compiles them by default",
                    "Each has its place.",
                    "strategies",
                ),
            )
        ),
        bench(
            "ring_four_training",
            "Training over devices",
            "Each device is as fast as one alone with as many tokens.",
            lines.ring_training,
            "ring --groups training --models TNL --chunk 4096 --devices 1 2 4 --name ring_four",
            "four H100",
        ),
        bench(
            "ring_step_training",
            "Training over devices, weights gathered once a step",
            "Each device is as fast as one alone: TNL's as one with as many tokens, a "
            "Transformer's as one with the same sequence.",
            lines.ring_training,
            "ring --groups training --models TNL --chunk 0 --devices 1 2 --batches 11 "
            "--fsdp-over-seq --gather step --states ring --name ring_step",
            "two H200",
        ),
        *(
            bench(f"ring_{group}", title, claim, reader, f"ring --groups {group}", "two H100")
            for group, title, claim, reader in (
                (
                    "methods",
                    "Longest sequences by method, trained on",
                    "Every method trains on longer sequences than the one before it, the ring on "
                    "as many times longer ones as there are devices (2310.01889, table 3).",
                    lines.ring_methods,
                ),
                (
                    "longest",
                    "Longest sequences over devices",
                    "Two devices train on twice the length of one.",
                    lines.ring_longest,
                ),
            )
        ),
        bench(
            "ring_training",
            "Training over devices, MLPs in chunks of 1024 tokens",
            "Each device is as fast as one alone: TNL's as one with as many tokens, a "
            "Transformer's as one with the same sequence.",
            lines.ring_training,
            "ring --groups training",
            "four H100",
            superseded=True,
        ),
        bench(
            "ring_chunks_training",
            "Training over devices, on H200s that gather states through NCCL",
            "Each device is as fast as one alone with as many tokens.",
            lines.ring_training,
            "ring --groups training --models TNL --chunk 4096 --name ring_chunks",
            "four H200",
            superseded=True,
        ),
        bench(
            "ring_trace",
            "Where the time of a training step goes",
            "By the profiler, beside which kernels start more slowly.",
            lines.ring_trace,
            "ring --groups trace --models TNL --chunk 8192 --per-device 8192 --devices 1 2 --xla "
            "xla_gpu_all_reduce_combine_threshold_bytes=67108864 "
            "xla_gpu_pipeline_all_reduce=COLLECTIVE_PIPELINING_MODE_ON",
            "two H100",
        ),
        *(
            bench(
                f"ring_schedule_{chip}",
                f"Compiled ahead of time for {name}",
                "A ring's moves all hide behind kernels; its memory is to grow by at most a tenth "
                "from 4 devices to 16. Analysis of schedules, not a measurement: nothing was run.",
                lines.schedule,
                f"ring.schedule {chip}",
                needs=needs,
            )
            for chip, name, needs in (
                ("h100", "H100", "jax's CUDA plugin, ptxas"),
                ("v5e", "TPU v5e", "libtpu"),
                ("v5p", "TPU v5p", "libtpu"),
                ("v6e", "TPU v6e", "libtpu"),
            )
        ),
        bench(
            "ring_scaling",
            "Extrapolated to 8, 64 and 512 devices",
            "Predictions of the cost model, whose assumptions stand in docs/guides/scaling.md; "
            "not a measurement.",
            lines.extrapolated,
            "ring.scaling",
            needs="nothing",
        ),
    ],
    "The kernel under the last three": [
        bench(
            "flash_gpu",
            "Flash attention over intervals",
            "As fast and as exact as cuDNN, and faster than every kernel in JAX.",
            lines.judged(lines.flash, _flash_report.claims),
            "flash",
        ),
        bench(
            "flash_h200",
            "Flash attention over intervals, on an H200",
            "A forward step takes its exponentials without waiting for their maximum.",
            lines.judged(lines.flash, _flash_report.claims),
            "flash --groups errors dense gqa packed window --out "
            "experiments/bench/results/flash_h200.jsonl",
            "one H200",
        ),
    ],
    "Every kernel on a device": [
        Section(
            "Checks on an H200",
            "Every feature of both kernel families is right on the device itself.",
            Path("experiments/bench/results/check_device_h200.jsonl"),
            lines.checked,
            "longctx check-device",
            needs="one H200",
        ),
    ],
    "Pods": [
        Section(
            "Training steps for pods, compiled ahead of time",
            "The compiler's count, not a measurement: what one device needs, and what it moves "
            "between devices with nothing to compute meanwhile. Two cores, shared with others.",
            Path("experiments/plans/results/plans.jsonl"),
            lines.plans,
            "python -m experiments.plans",
            needs="a CPU, libtpu, jax's CUDA plugin",
        ),
    ],
}
