"""The training engine against the plain study loop: same candidates, same documents, same gradients.

    AFT_TEST_DATA=... python scripts/bench_training.py            # everything, about an hour
    python scripts/bench_training.py --quick                      # under a minute

The plain loop is how such sweeps are usually written: batch size 1, the whole model with a hook, every
option a pass of its own with log-softmax over all its positions, every layer by itself. Its weights do not
require gradients; where they are left as `from_pretrained` makes them, autograd computes theirs too, and the
loop is slower still ("ratio_unfrozen", one round). Both sides train the same layers on the same documents in
turn, in one process; times are process CPU time, medians over rounds with quartiles. Models have random
weights in the shape of the named ones; document lengths are those of real prompts where AFT_TEST_DATA is set.
Where documents share few-shot examples, as in `adaptive`, the plain loop reads each prompt whole.
The last line is the result as JSON.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen2Config

from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.engine.batching import TokenizedDocument, lay_out
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.hooks import add_at
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Recipe, in_steps
from lm_eval_aft.training.cost import Forecast, Passes, UpperBlocks, peak_memory
from lm_eval_aft.training.objectives import Choice
from lm_eval_aft.training.recipe import Protocol, Stage, find_protocol, schedule
from lm_eval_aft.training.trainer import Trajectory

SHAPES: dict[str, Any] = {
    "pythia-70m": GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    ),
    "pythia-160m": GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    ),
    "qwen2-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        tie_word_embeddings=True,
    ),
}
# (context, question, continuation) lengths where no real prompts are at hand: their medians for a
# 4,096-word tokenizer.
TYPICAL = {
    "hellaswag": {0: (39, 39, 17), 10: (630, 39, 17)},
    "arc_challenge": {0: (42, 42, 8), 25: (1228, 42, 8)},
}


@dataclass(frozen=True)
class Case:
    """A shape, a task's lengths, how much of both is timed, and whether prompts show the same examples."""

    shape: str
    task: str
    shots: int
    documents: int
    layers: int
    share: bool = False

    @property
    def name(self) -> str:
        sharing = f", {self.documents} sharing" if self.share else ""
        return f"{self.shape} {self.task} {self.shots}-shot{sharing}"


CASES = [
    Case("pythia-70m", "hellaswag", 0, 1, 6),
    Case("pythia-70m", "arc_challenge", 25, 1, 6),
    Case("pythia-70m", "hellaswag", 10, 1, 6),
    Case("pythia-70m", "hellaswag", 10, 8, 2, share=True),
    Case("pythia-70m", "arc_challenge", 25, 8, 2, share=True),
    Case("qwen2-0.5b", "hellaswag", 0, 1, 3),
    Case("pythia-160m", "hellaswag", 0, 1, 4),
    Case("pythia-160m", "arc_challenge", 25, 1, 2),
]


def lengths(task: str, shots: int, n: int) -> list[tuple[int, int, list[int]]]:
    """Context, question and option lengths of ``n`` prompts, evenly spread over real ones if at hand."""
    root = os.environ.get("AFT_TEST_DATA")
    if not root:
        context, question, option = TYPICAL[task][shots]
        return [(context, question, [option] * 4)] * n
    # Evaluation documents, the whole of which is at hand; only their lengths are used.
    program = f"""
import json, random
from lm_eval_aft.harness.tasks import load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.harness.examples import Extractor, PromptSettings, encode
lm = AFTLM({str(Path(root).resolve() / "models" / "english-neox-12m")!r}, device="cpu")
task = load_task({task!r})
documents = random.Random(0).sample(list(task.eval_docs), 60)

def prompts(shots):
    extractor = Extractor(task, lm, PromptSettings(num_fewshot=shots))
    return encode([extractor.example(document, i) for i, document in enumerate(documents)], lm)

print(json.dumps([
    (len(d.pairs[0][0]), len(bare.pairs[0][0]), [len(tail) for _, tail in d.pairs])
    for d, bare in zip(prompts({shots}), prompts(0), strict=True)
]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(root) / "hub",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = sorted(json.loads(done.stdout.splitlines()[-1]), key=lambda d: d[0] + sum(d[2]))
    return [found[round((i + 0.5) / n * len(found) - 0.5)] for i in range(n)]


def documents(case: Case, vocabulary: int) -> list[TokenizedDocument]:
    """Random tokens in the lengths of the case's prompts."""
    draw = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in draw.integers(10, vocabulary, n))

    made = []
    found = lengths(case.task, case.shots, case.documents)
    examples = ids(int(statistics.median(context - question for context, question, _ in found)))
    for context, question, options in found:
        shared = examples + ids(question) if case.share else ids(context)
        tails = tuple((shared, ids(k)) for k in options)
        group = 0 if case.share else None
        made.append(TokenizedDocument(tails, (0,), tuple(4.0 * k for k in options), group=group))
    return made


def naive_scores(model: Any, document: TokenizedDocument) -> Tensor:
    """Log-likelihood of every option, each from a pass of its own."""
    sums = []
    for context, tail in document.pairs:
        ids = torch.tensor([(*context, *tail)])
        logprobs = F.log_softmax(model(input_ids=ids[:, :-1], use_cache=False).logits.float(), dim=-1)[0]
        sums.append(logprobs[range(len(context) - 1, len(context) + len(tail) - 1), list(tail)].sum())
    return torch.stack(sums)


def naive_step(model: Any, backbone: Backbone, layer: int, document: TokenizedDocument) -> Tensor:
    """The gradient for a vector at ``layer``, shape ``(hidden_size,)``, as a plain loop finds it."""
    vector = torch.zeros(backbone.hidden_size, requires_grad=True)
    with add_at(backbone.blocks[layer], vector):
        loss = F.cross_entropy(naive_scores(model, document).unsqueeze(0), torch.tensor([document.gold[0]]))
        loss.backward()
    assert vector.grad is not None
    return vector.grad


def at_zero(layers: Sequence[int], backbone: Backbone) -> list[Candidate]:
    zero = torch.zeros(backbone.hidden_size)
    return [Candidate(layer, 0, Recipe(), Intervention.static(layer, zero.clone())) for layer in layers]


def nothing(_done: int) -> None:
    pass


def engine_gradients(
    engine: Trajectory, candidates: Sequence[Candidate], docs: Sequence[TokenizedDocument]
) -> list[Tensor]:
    """One gradient per candidate and step (a document, or a group), read off before the optimiser uses it."""
    found: list[Tensor] = []
    for candidate in candidates:

        def read(candidate: Candidate = candidate) -> None:
            assert candidate.vector.grad is not None
            found.append(candidate.vector.grad.clone().float())
            candidate.vector.grad = None

        candidate.step = read  # type: ignore[method-assign]
    engine.train(candidates, list(in_steps(docs, 1)), nothing)
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def quartiles(times: Sequence[float]) -> list[float]:
    return [round(q, 4) for q in np.percentile(times, [25, 50, 75])]


def matmul_peak() -> float:
    """Operations a second of this machine's fp32 matrix product, one size that suits it."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return max(2 * 1024**3 / timed(lambda: a @ b)[0] for _ in range(10))


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def race(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every side, taken in turn, and the engine's largest relative gradient error."""
    sides["engine"]()  # loads what is loaded on first use
    times: dict[str, list[float]] = {name: [] for name in sides}
    error = 0.0
    for number in range(rounds):
        for name, work in sides.items():
            if number and name.startswith("un"):
                continue  # these tell what is gained by what: one round is enough
            seconds, result = timed(work)
            times[name].append(seconds)
            if name == "naive":
                truth = result
            elif name == "engine":
                error = max(
                    error, *(float((a - b).norm() / b.norm()) for a, b in zip(result, truth, strict=True))
                )
    return times, error


def measure(case: Case, rounds: int, bf16: bool) -> dict[str, Any]:
    """Time one case on both sides."""
    torch.manual_seed(0)
    config = SHAPES[case.shape]
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    backbone = find_backbone(model)
    docs = documents(case, config.vocab_size)
    depth = len(backbone.blocks)
    layers = [round((i + 0.5) / case.layers * depth - 0.5) for i in range(case.layers)]
    engine = Trajectory(model, backbone, Choice("acc"), packed=True)
    unpacked = Trajectory(model, backbone, Choice("acc"), packed=False)

    def candidates() -> list[Candidate]:
        return at_zero(layers, backbone)

    def naive() -> list[Tensor]:
        found = []
        for step in in_steps(docs, 1):
            for layer in layers:
                each = [naive_step(model, backbone, layer, document) for document in step]
                found.append(torch.stack(each).mean(0))
        return found

    def unfrozen() -> list[Tensor]:
        model.requires_grad_(True)
        try:
            return naive()
        finally:
            model.requires_grad_(False)

    def judge_naive() -> None:
        with torch.no_grad():
            for document in docs:
                with add_at(backbone.blocks[layers[-1]], torch.zeros(backbone.hidden_size)):
                    naive_scores(model, document)

    sides: dict[str, Callable[[], Any]] = {
        "naive": naive,
        "unfrozen": unfrozen,
        "engine": lambda: engine_gradients(engine, candidates(), docs),
        "unpacked": lambda: engine_gradients(unpacked, candidates(), docs),
        "naive judging": judge_naive,
        "engine judging": lambda: engine.evaluate(candidates(), docs, nothing),
    }
    times, error = race(sides, rounds)
    if bf16:
        for name in ("engine", "engine judging"):
            model.to(torch.bfloat16)
            sides[name]()
            times[f"{name} bf16"] = [timed(sides[name])[0] for _ in range(rounds)]
        model.float()
    model.zero_grad()
    counted = {name: flops(sides[name]) for name in ("naive", "unfrozen", "engine")}
    mid = {name: statistics.median(values) for name, values in times.items()}
    ratio = mid["naive"] / mid["engine"]
    packed_tokens = [row.width for row in lay_out(docs, packed=True)]
    tokens = sum(packed_tokens) * len(layers)
    result = {
        "name": case.name,
        "ratio": round(ratio, 2),
        "max_rel_grad_error": error,
        "layers": len(layers),
        "documents": len(docs),
        "median_packed_tokens": int(statistics.median(packed_tokens)),
        "ratio_unfrozen": round(mid["unfrozen"] / mid["engine"], 2),
        "flop_ratio": round(counted["naive"] / counted["engine"], 2),
        "flop_ratio_unfrozen": round(counted["unfrozen"] / counted["engine"], 2),
        "packing_alone": round(mid["unpacked"] / mid["engine"], 2),
        "judging_ratio": round(mid["naive judging"] * len(layers) / mid["engine judging"], 2),
        "engine_tokens_per_second": round(tokens / mid["engine"]),
        "engine_share_of_matmul_peak": round(counted["engine"] / mid["engine"] / matmul_peak(), 2),
        "naive_seconds": quartiles(times["naive"]),
        "engine_seconds": quartiles(times["engine"]),
    }
    if bf16:
        result["bf16_alone"] = round(mid["engine"] / mid["engine bf16"], 2)
        result |= whole_protocol(depth, len(docs), len(layers), mid)
    return result


def whole_protocol(depth: int, docs: int, layers: int, mid: dict[str, float]) -> dict[str, float]:
    """The protocol `adaptive` in bf16 against every one of its candidates trained to the end, plainly.

    Uses the costs just measured, per candidate and document, and the protocol's own counts with
    500 training and 500 selection documents. Both sides train finalists for the fewest epochs the
    protocol allows, which favours the plain side: it would train everything that long.
    """
    protocol = find_protocol("adaptive")
    protocol = replace(protocol, epochs=protocol.min_epochs)
    stages = schedule(protocol, depth, 500, 500)
    tried = [stages[0], *(s for s in stages if s.name != "search")]
    each = docs * layers
    judge = mid["naive judging"] / docs
    plain = sum(s.candidates * protocol.epochs * 500 * (mid["naive"] / each + judge) for s in tried)
    fast_train, fast_judge = mid["engine bf16"] / each, mid["engine judging bf16"] / each
    ours = sum(s.candidates * s.epochs * (s.train * fast_train + s.selection * fast_judge) for s in stages)
    unthinned = sum(s.candidates * protocol.epochs * 500 * (fast_train + fast_judge) for s in tried)
    return {
        "halving_alone": round(unthinned / ours, 2),
        "protocol_ratio": round(plain / ours, 1),
    }


def growth(rounds: int) -> dict[str, list[list[float]]]:
    """By the number of layers, documents and context tokens: that number, engine and plain seconds."""
    config = SHAPES["pythia-70m"]
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    backbone = find_backbone(model)
    engine = Trajectory(model, backbone, Choice("acc"), packed=True)
    draw = np.random.default_rng(0)

    def seconds(layers: int, docs: int, context: int) -> list[float]:
        ids = [tuple(int(i) for i in draw.integers(10, 50000, context)) for _ in range(docs)]
        tails = [tuple(int(i) for i in draw.integers(10, 50000, 17)) for _ in range(4)]
        made = [TokenizedDocument(tuple((c, t) for t in tails), (0,), (1.0,) * 4) for c in ids]
        group = at_zero(range(layers), backbone)

        def plain() -> None:
            for layer, document in itertools.product(range(layers), made):
                naive_step(model, backbone, layer, document)

        sides = (lambda: engine.train(group, [[d] for d in made], nothing), plain)
        times = [[timed(side)[0] for side in sides] for _ in range(rounds)]
        return [round(statistics.median(values), 3) for values in zip(*times, strict=True)]

    return {
        "layers": [[n, *seconds(n, 2, 64)] for n in (1, 2, 4, 6)],
        "documents": [[n, *seconds(2, n, 64)] for n in (1, 2, 4, 8)],
        "context": [[n, *seconds(2, 1, n)] for n in (64, 256, 1024)],
    }


def memory(case: Case) -> dict[str, Any]:
    """Peak memory above the loaded weights of either side, each in a process of its own."""
    found = {}
    for side in ("naive", "engine", "estimate"):
        command = [sys.executable, __file__, "--memory-of", case.name, "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = int(done.stdout.splitlines()[-1])
    return {
        "name": case.name,
        "naive_bytes": found["naive"],
        "engine_bytes": found["engine"],
        "ratio": round(found["engine"] / found["naive"], 3),
        "estimate_over_measured": round(found["estimate"] / found["engine"], 3),
    }


def measure_memory(case: Case, side: str) -> int:
    """Most resident bytes above what was resident once the model was loaded.

    ``estimate``: what a dry run says of the engine's, in a process that has done nothing else.
    """
    torch.manual_seed(0)
    config = SHAPES[case.shape]
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    backbone = find_backbone(model)
    docs = documents(case, config.vocab_size)
    engine = Trajectory(model, backbone, Choice("acc"), packed=True)
    depth = len(backbone.blocks)
    if side == "estimate":
        part = UpperBlocks(model, backbone, Choice("acc"), like=docs[0], packed=True)
        return (
            Forecast(
                part,
                lambda layer: at_zero([layer], backbone)[0],
                range(depth),
                Passes.of(docs, part, step=1),
                Passes.of(docs, part),
                len(docs),
                [Stage("final", depth, len(docs), len(docs), 1, 1)],
                Protocol("once", seeds=1),
            )
            .estimate()
            .peak_bytes
        )
    candidates = at_zero(range(depth), backbone)

    def train(some: Sequence[TokenizedDocument]) -> None:
        if side == "naive":
            for document in some:
                naive_step(model, backbone, 0, document)
        else:
            engine.train(candidates, list(in_steps(some, 1)), nothing)
            engine.evaluate(candidates, some, nothing)

    with peak_memory(torch.device("cpu")) as peak:
        train(docs)
    return peak()


@click.command()
@click.option("--quick", is_flag=True, help="One small case, under a minute.")
@click.option("--rounds", default=5, show_default=True, help="Interleaved rounds per case.")
@click.option("--only", help="Only the case of this name, or those whose name contains this.")
@click.option("--growth", "growing", is_flag=True, help="Only growth with layers, documents and context.")
@click.option("--against", "old", type=click.Path(path_type=Path), help="Compare with this old checkout.")
@click.option("--memory-of", hidden=True)
@click.option("--side", hidden=True)
def main(
    quick: bool,
    rounds: int,
    only: str | None,
    growing: bool,
    old: Path | None,
    memory_of: str | None,
    side: str | None,
) -> None:
    """Time the training engine against the plain loop."""
    quiet_libraries()
    if old:
        import against

        against.main(["training"], old, 4 if quick else None)
        return
    by_name = {case.name: case for case in CASES}
    if memory_of and side:
        print(measure_memory(by_name[memory_of], side))
        return
    if quick:
        small = replace(CASES[0], documents=1, layers=2)
        print(json.dumps({"cases": [measure(small, 2, bf16=False)]}))
        return
    if growing:
        print(json.dumps({"growth": growth(rounds)}))
        return
    chosen = CASES
    if only is not None:
        chosen = [by_name[only]] if only in by_name else [case for case in CASES if only in case.name]
    cases = []
    for case in chosen:
        cases.append(measure(case, rounds, bf16=True))
        print(json.dumps(cases[-1], indent=1), flush=True)
    result = {"cases": cases, "memory": [memory(case) for case in chosen if case.shape != "qwen2-0.5b"]}
    print(json.dumps(result if only is not None else result | {"growth": growth(rounds)}))


if __name__ == "__main__":
    main()
