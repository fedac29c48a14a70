"""Whether a plan made from a config alone tells the truth, and what it says of a 7-billion-parameter model.

    OMP_NUM_THREADS=1 python scripts/bench_plan.py            # both parts
    OMP_NUM_THREADS=1 python scripts/bench_plan.py --check    # against measurements on this CPU, small shapes

Operations must equal a formula written out here, and what `FlopCounterMode` counts on a loaded model; memory
and time are compared with a process of its own that loads random weights and runs a step at every layer.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.cli.options import print_table
from lm_eval_aft.cli.train import duration
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.studies.planner import Lengths, documents_of, find_config, plan_cost, typical_documents
from lm_eval_aft.studies.simulated_device import DEVICES, this_cpu
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.cost import flops_of, peak_memory
from lm_eval_aft.training.objectives import Choice
from lm_eval_aft.training.recipe import Protocol, find_protocol
from lm_eval_aft.training.trainer import Trajectory

SHAPES: dict[str, Any] = {
    "pythia-70m": GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    ),
    "llama 512x8": LlamaConfig(
        vocab_size=16000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408
    ),
    "qwen2 384x10": Qwen2Config(
        vocab_size=20000,
        hidden_size=384,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=1024,
    ),
}
TASKS: dict[str, tuple[Lengths, ...]] = {
    "4 options, 40 tokens": ((24, (12, 9, 14, 10)), (40, (17, 13, 17, 17))),
    "4 options, 600 tokens": ((590, (8, 12, 9, 10)), (610, (12, 9, 9, 11))),
}


# Larger tensors get pages of their own, returned when they are freed: else the C library's heap keeps holes.
OWN_PAGES = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


@dataclass(frozen=True)
class Measured:
    """What a step at every layer on each document, and judging each, took on a loaded model."""

    flops: int
    bytes: int
    resident: int
    seconds: float


def formula(config: Any, documents: Sequence[TokenizedDocument]) -> int:
    """Operations of a step at every layer on each document, each then judged by itself.

    Per block and token 2 for each weight of its matrices, forwards, and as many backwards (no weight has a
    gradient); 4 x width for each pair of tokens in attention, 10 backwards (its kernel computes the scores
    again); and the head at scored positions.
    """
    width, depth = config.hidden_size, config.num_hidden_layers
    total = 0
    for document in documents:
        ((context, options),) = document.groups().items()
        tails = sum(len(document.pairs[i][1]) - 1 for i in options)
        tokens, scored = len(context) + tails, 1 + tails
        causal = len(context) if len(context) >= 128 else 0
        pairs = causal**2 + (tokens - causal) * tokens
        block, attention = 2 * weights(config) * tokens, 4 * width * pairs
        head = 2 * width * config.vocab_size
        frozen = depth * (block + attention) + head
        for layer in range(depth):
            above = depth - 1 - layer
            judged = scored * head + above * (block + attention)
            stepped = judged + scored * head + above * (block + 10 * width * pairs)
            total += judged + stepped
        total += 2 * frozen
    return total


def weights(config: Any) -> int:
    """Entries of a block's matrices."""
    width, inner = config.hidden_size, config.intermediate_size
    if config.model_type == "gpt_neox":
        return 4 * width**2 + 2 * width * inner
    keys = width // config.num_attention_heads * config.num_key_value_heads
    return 2 * width**2 + 2 * width * keys + 3 * width * inner


def documents_like(task: str, loaded: bool, vocabulary: int = 100) -> list[TokenizedDocument]:
    made = documents_of(TASKS[task])
    if not loaded:
        return made
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocabulary, (n,), generator=generator).tolist())

    filled = []
    for document in made:
        context = ids(len(document.pairs[0][0]))
        tails = tuple((context, ids(len(tail))) for _, tail in document.pairs)
        filled.append(TokenizedDocument(tails, (0,), document.lengths))
    return filled


def nothing(_done: int) -> None:
    pass


def measure(shape: str, task: str) -> Measured:
    """In this process, which should be a new one: the memory of libraries once used stays."""
    torch.manual_seed(0)
    config = SHAPES[shape]
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    backbone = find_backbone(model)
    docs = documents_like(task, True)
    engine = Trajectory(model, backbone, Choice("acc_norm"), packed=True)

    def run() -> None:
        zero = torch.zeros(backbone.hidden_size)
        every = range(config.num_hidden_layers)
        group = [Candidate(layer, 0, Recipe(), Intervention.static(layer, zero.clone())) for layer in every]
        engine.train(group, [[document] for document in docs], nothing)
        for document in docs:
            engine.evaluate(group, [document], nothing)

    # Once on next to nothing: code that is loaded on first use is no memory of the run's.
    context, tail = docs[0].pairs[0]
    engine.train(
        [Candidate(0, 0, Recipe(), Intervention.static(0, torch.zeros(backbone.hidden_size)))],
        [[TokenizedDocument(((context[:4], tail[:2]), (context[:4], tail[2:4])), (0,), (1.0, 1.0))]],
        nothing,
    )
    before = resident()
    with peak_memory(torch.device("cpu")) as peak:
        run()
    used, most = peak(), resident("VmHWM") - before
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    return Measured(flops_of(run), used, most, seconds)


def resident(field: str = "VmRSS") -> int:
    """This process's resident memory in bytes, now or (``VmHWM``) at most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def planned(shape: str, task: str) -> Any:
    """The plan of just that: every document trained on and judged on once, at every layer."""
    docs = documents_like(task, False)
    once = Protocol("once", train_docs=len(docs), selection_docs=len(docs), epochs=1, seeds=1)
    last = [max(docs, key=lambda document: document.tokens(True))]
    return plan_cost(SHAPES[shape], once, [*docs, *last], device=this_cpu(), dtype=torch.float32, budget=1)


def in_a_process_of_its_own(shape: str, task: str, environment: dict[str, str]) -> Measured:
    command = [sys.executable, __file__, "--measure", shape, "--task", task]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def check(cases: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Plans against measurements."""
    found = []
    for shape, task in cases:
        real = in_a_process_of_its_own(shape, task, OWN_PAGES)
        # Pages of one's own cost time, which an ordinary run does not spend.
        seconds = in_a_process_of_its_own(shape, task, dict(os.environ)).seconds
        plan = planned(shape, task)
        exact = formula(SHAPES[shape], documents_like(task, False))
        found.append(
            {
                "shape": shape,
                "task": task,
                "flops_formula": exact,
                "flops_counted": real.flops,
                "flops_planned": round(plan.estimate.flops),
                "flops_equal": exact == real.flops == round(plan.estimate.flops),
                "bytes_measured": real.bytes,
                "bytes_planned": plan.estimate.peak_bytes,
                "bytes_ratio": round(plan.estimate.peak_bytes / real.bytes, 3),
                "resident_measured": real.resident,
                "seconds_measured": round(seconds, 3),
                "seconds_planned": round(plan.estimate.seconds, 3),
                "seconds_ratio": round(plan.estimate.seconds / seconds, 2),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


# Task, examples in the prompt, protocol.
PLANS = [
    ("hellaswag", 0, "maximum"),
    ("hellaswag", 10, "adaptive"),
    ("arc_challenge", 25, "adaptive"),
    ("gsm8k", 5, "adaptive"),
]


def plans(model: str) -> list[dict[str, Any]]:
    """What runs on a model would cost on devices that are not here, in bfloat16."""
    config, found = find_config(model), []
    for name, device in DEVICES.items():
        for task, shots, protocol in PLANS:
            objective = "lm" if task == "gsm8k" else "choice"
            documents = typical_documents(task, shots, find_protocol(protocol).share_fewshot)
            cost = plan_cost(config, protocol, documents, device=device, objective=objective)
            found.append(
                {
                    "device": name,
                    "task": f"{task} {shots}-shot",
                    "protocol": protocol,
                    "steps": cost.steps,
                    "flops": cost.estimate.flops,
                    "seconds": round(cost.estimate.seconds),
                    "weight_gib": round(cost.weight_bytes / 2**30, 2),
                    "above_gib": round(cost.estimate.peak_bytes / 2**30, 2),
                    "total_gb": round(cost.total_bytes / 1e9, 2),
                    "fits": cost.fits,
                }
            )
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


@click.command()
@click.option("--measure", "shape", hidden=True)
@click.option("--task", hidden=True)
@click.option("--check", "only", flag_value="check", help="Only compare plans with measurements.")
@click.option("--plan", "only", flag_value="plan", help="Only plan.")
@click.option("--model", default="meta-llama/Llama-2-7b-hf", show_default=True)
@click.option("--quick", is_flag=True, help="Only one check, of a small shape on short documents: a minute.")
@click.option("--against", "old", type=click.Path(path_type=Path), help="Compare with this old checkout.")
def main(
    shape: str | None, task: str | None, only: str | None, model: str, quick: bool, old: Path | None
) -> None:
    """Check plans against measurements, then plan for a model that is not here."""
    quiet_libraries()
    if old:
        import against

        against.main(["plan"], old, 2 if quick else None)
        return
    cases = [(next(iter(SHAPES)), next(iter(TASKS)))] if quick else list(itertools.product(SHAPES, TASKS))
    only = "check" if quick else only
    if shape and task:
        print(json.dumps(vars(measure(shape, task))))
        return
    result: dict[str, Any] = {}
    if only != "plan":
        result["checked"] = check(cases)
        keys = ("shape", "task", "flops_equal", "bytes_ratio", "seconds_ratio")
        rows = [[str(each[key]) for key in keys] for each in result["checked"]]
        print_table("Planned over measured", keys, rows)
    if only != "check":
        result["plans"] = plans(model)
        for device in DEVICES.values():
            click.echo(
                f"{device.name}: taken to reach {device.flops:.3g} FLOP/s and {device.bandwidth:.3g} bytes/s."
            )
        rows = [
            [
                each["device"], each["task"], each["protocol"], f"{each['steps']:,}", f"{each['flops']:.2g}",
                duration(each["seconds"]), f"{each['total_gb']:.1f} GB", "yes" if each["fits"] else "no",
            ]
            for each in result["plans"]
        ]  # fmt: skip
        columns = ("GPU", "task", "protocol", "steps", "FLOP", "time", "memory", "fits")
        print_table(f"{model}, bfloat16", columns, rows)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
