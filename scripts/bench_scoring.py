"""Times log-likelihood scoring: stock `hf`, stock `steered` and `--model aft`, in one process.

Models have random weights at the shapes of published ones; documents are real ones of hellaswag and
arc_challenge where AFT_TEST_DATA names a folder with ``hub/`` and ``models/``, else random tokens of
about their lengths. Times are process CPU seconds, rounds interleaved; medians with quartiles.

    OMP_NUM_THREADS=1 python scripts/bench_scoring.py --quick
    OMP_NUM_THREADS=1 AFT_TEST_DATA=../shared python scripts/bench_scoring.py --shapes pythia-70m --rounds 5

The last line is JSON: {"cases": [{"name": …, "ratio": …, "max_abs_diff": …}, …]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from torch.utils.flop_counter import FlopCounterMode

from lm_eval_aft import SteeringVector
from lm_eval_aft.engine.precision import ReorderedWeights
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import find_backbone

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia-70m": (
        "GPTNeoXConfig",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    ),
    "pythia-160m": (
        "GPTNeoXConfig",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "qwen2-0.5b": (
        "Qwen2Config",
        {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}
COMMON = {"vocab_size": 50304, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0}
# task and shots, median tokens of context and of each option (for random documents), documents a round
TASKS: dict[str, tuple[str, int, int, int, int]] = {
    "hellaswag-0shot": ("hellaswag", 0, 37, 18, 32),
    "hellaswag-10shot": ("hellaswag", 10, 615, 18, 6),
    "arc_challenge-25shot": ("arc_challenge", 25, 1239, 8, 4),
}
Requests = list[tuple[Any, list[int], list[int]]]


def make_model(shape: str) -> Any:
    kind, settings = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**COMMON, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_tokenizer(data: Path | None) -> Any:
    if data is not None:
        return transformers.AutoTokenizer.from_pretrained(data / "models" / "english-neox-12m")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "a": 2}, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )


def real_documents(task_name: str, shots: int, count: int, tokenizer: Any) -> Requests:
    """The first documents of a stock task, tokenised as `hf` would."""
    from lm_eval.tasks import get_task_dict

    from lm_eval_aft.harness.tasks import task_manager_for

    (task,) = get_task_dict([task_name], task_manager_for([task_name], [])).values()
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=count, rank=0, world_size=1)
    requests: Requests = []
    for instance in task.instances:
        context, continuation = instance.args
        head = tokenizer.encode(context)
        requests.append((None, head, tokenizer.encode(context + continuation)[len(head) :]))
    return requests


def random_documents(context: int, option: int, count: int) -> Requests:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        n = max(1, int(n * (0.6 + 0.8 * torch.rand(1, generator=generator).item())))
        return [int(i) for i in torch.randint(2, 4096, (n,), generator=generator)]

    documents = [(ids(context), [ids(option) for _ in range(4)]) for _ in range(count)]
    return [(None, head, tail) for head, tails in documents for tail in tails]


def with_strings(requests: Requests) -> Requests:
    """Requests that the answers kept for further vectors can be told apart by."""
    return [((str(i), ""), head, tail) for i, (_, head, tail) in enumerate(requests)]


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def peak() -> float:
    """GF/s of one large fp32 matmul here and now, weights as they lie or reordered."""
    layer, inputs = torch.nn.Linear(1024, 1024, bias=False), torch.randn(1024, 1024)
    weights = ReorderedWeights(layer)

    def reordered() -> None:
        with weights.in_use():
            layer(inputs)

    with torch.no_grad():
        fastest = min(cpu_seconds(run)[0] for run in 8 * [lambda: layer(inputs), reordered])
    return 2 * 1024**3 / fastest / 1e9


def flops(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


class Bench:
    """The contestants at one shape."""

    def __init__(self, shape: str, tokenizer: Any, folder: Path) -> None:
        self.shape = shape
        model = make_model(shape)
        self.layers, self.hidden = model.config.num_hidden_layers, model.config.hidden_size
        common: dict[str, Any] = {"tokenizer": tokenizer, "device": "cpu", "max_length": 2048}
        size = 0.02 * self.hidden**0.5
        self.vectors = []
        for seed in range(4):
            draw = torch.randn(self.hidden, generator=torch.Generator().manual_seed(seed))
            self.vectors.append(SteeringVector({self.layers // 2: size * draw}))
        self.hf = HFLM(model, **common)
        hookpoint = find_backbone(model).name.removeprefix(f"{model.base_model_prefix}.")
        add = {
            "steering_vector": self.vectors[0].layers[self.layers // 2],
            "steering_coefficient": 1.0,
            "action": "add",
        }
        torch.save({f"{hookpoint}.{self.layers // 2}": add}, folder / "steer.pt")
        self.steered = SteeredModel(model, str(folder / "steer.pt"), **common)
        # Stock `steered` leaves its hooks to each pass, ours to the handle: one model serves all.
        self.ours = AFTLM(model, **common)
        self.logits = model.config.vocab_size * 4

    def stock(self, lm: Any, requests: Requests, batch_size: int) -> Any:
        lm.batch_size_per_gpu = batch_size
        return lm._loglikelihood_tokens(requests, disable_tqdm=True)

    def best_batch_size(self, requests: Requests) -> int:
        longest = max(len(head) + len(tail) for _, head, tail in requests)
        # Two copies of the logits must fit in memory.
        sizes = [n for n in (1, 4, 8, 16) if n == 1 or 2 * n * longest * self.logits < 6e9]
        return min(sizes, key=lambda n: cpu_seconds(lambda: self.stock(self.hf, requests, n))[0])

    def score(self, requests: Requests, vector: SteeringVector | None = None) -> Any:
        self.ours.steer(vector)
        return self.ours._loglikelihood_tokens(requests, disable_tqdm=True)

    def together(self, requests: Requests, count: int) -> Any:
        """Baseline and ``count`` vectors in one run: all their answers."""
        self.ours.score_along(self.vectors[:count])
        found = [self.score(requests)]
        strings = [request[0] for request in requests]
        found += [self.ours._companions.answers(vector, strings) for vector in self.vectors[:count]]
        self.ours._companions = None
        return found


def difference(left: Any, right: Any) -> float:
    return max(abs(a[0] - b[0]) for a, b in zip(left, right, strict=True))


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:8.3f} [{low:.3f}, {high:.3f}]"


def run_case(bench: Bench, name: str, requests: Requests, rounds: int, many: bool) -> list[dict[str, Any]]:
    requests = with_strings(requests)
    batch_size = bench.best_batch_size(requests)
    vector = bench.vectors[0]
    bench.score(requests)  # first-use checks
    bench.steers_all_layers(requests[:8], 1)
    contestants: dict[str, Callable[[], Any]] = {
        "hf": lambda: bench.stock(bench.hf, requests, batch_size),
        "steered": lambda: bench.stock(bench.steered, requests, batch_size),
        "ours, no vector": lambda: bench.score(requests),
        "ours": lambda: bench.score(requests, vector),
        "ours, baseline + 1": lambda: bench.steers_all_layers(requests, 1),
    }
    if many:
        contestants["ours, baseline + 4"] = lambda: bench.steers_all_layers(requests, 4)
    times: dict[str, list[float]] = {key: [] for key in contestants}
    results: dict[str, Any] = {}
    for _, key in itertools.product(range(rounds), contestants):
        seconds, results[key] = cpu_seconds(contestants[key])
        times[key].append(seconds)
    work = {key: flops(contestants[key]) for key in ("hf", "ours, no vector", "ours", "ours, baseline + 1")}
    rate = peak()
    print(f"\n{bench.shape}, {name}: {len(requests)} requests, stock batch size {batch_size}")
    print(f"  matmul peak {rate:.0f} GF/s")
    for key, values in times.items():
        share = f"{work[key] / statistics.median(values) / rate / 1e9:6.0%} of peak" if key in work else ""
        print(f"  {key:20s} {spread(values)} s  {share}")
    median = {key: statistics.median(values) for key, values in times.items()}
    cases = compared(f"{bench.shape}/{name}", median, work, results)
    equal = all(a[1] == b[1] for a, b in zip(results["ours"], results["steered"], strict=True))
    for case in cases:
        case["greedy_equal"] = equal
        work_ratio = f"{case['flop_ratio']:6.2f}x in flops" if "flop_ratio" in case else ""
        print(f"  {case['name']:50s} {case['ratio']:6.2f}x, off by {case['max_abs_diff']:.1e}, {work_ratio}")
    return cases


def compared(
    label: str, median: dict[str, float], work: dict[str, int], results: dict[str, Any]
) -> list[dict[str, Any]]:
    """Ours against stock: median seconds, operations counted, and how far apart the answers are."""
    best = min(median["hf"], median["steered"])
    cases = [
        {
            "name": f"{label}/steered",
            "ratio": best / median["ours"],
            "flop_ratio": work["hf"] / work["ours"],
            "max_abs_diff": difference(results["ours"], results["steered"]),
        },
        {
            "name": f"{label}/baseline+1",
            "ratio": (median["hf"] + median["steered"]) / median["ours, baseline + 1"],
            "flop_ratio": 2 * work["hf"] / work["ours, baseline + 1"],
            "max_abs_diff": max(
                difference(results["ours, baseline + 1"][0], results["hf"]),
                difference(results["ours, baseline + 1"][1], results["steered"]),
            ),
        },
        {
            "name": f"{label}/steering overhead",
            "ratio": median["ours"] / median["ours, no vector"],
            "flop_ratio": work["ours"] / work["ours, no vector"],
            "max_abs_diff": 0.0,
        },
    ]
    if "ours, baseline + 4" in results:
        cases.append(
            {
                "name": f"{label}/baseline+4",
                "ratio": (median["hf"] + 4 * median["steered"]) / median["ours, baseline + 4"],
                "max_abs_diff": difference(results["ours, baseline + 4"][1], results["steered"]),
            }
        )
    return cases


def generation_case(
    data: Path, name: str, shots: int, count: int, rounds: int, fixed: bool = False
) -> dict[str, Any]:
    """Real gsm8k prompts on a small trained model: stock against ours, the same strings wanted.

    Stock gsm8k draws every document's examples anew. With ``fixed`` all documents have the same ones, as in
    gsm8k_cot, minerva_math and bbh, and so a common prefix.
    """
    from lm_eval.api.samplers import FirstNSampler
    from lm_eval.tasks import get_task_dict

    from lm_eval_aft.harness.tasks import task_manager_for

    (task,) = get_task_dict(["gsm8k"], task_manager_for(["gsm8k"], [])).values()
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(1234)
    if fixed:
        task.sampler = FirstNSampler(task.sampler.fewshot_docs())
    task.build_all_requests(limit=count, rank=0, world_size=1)
    instances = [
        Instance("generate_until", {}, (i.args[0], {**i.args[1], "max_gen_toks": 64}), n, ("gsm8k", n, 1))  # type: ignore[arg-type]
        for n, i in enumerate(task.instances)
    ]
    path = str(data / "models" / name)
    ours = AFTLM(path, device="cpu", batch_size=1)
    stock = HFLM(path, device="cpu", batch_size=1)

    def run(lm: Any, size: int) -> Any:
        lm.batch_size_per_gpu = size
        return lm.generate_until(instances, disable_tqdm=True)

    size = min((1, 4, 8, 16), key=lambda n: cpu_seconds(lambda: run(stock, n))[0])
    run(ours, size)
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    answers: dict[str, Any] = {}
    for _ in range(rounds):
        for key, lm in (("stock", stock), ("ours", ours)):
            seconds, answers[key] = cpu_seconds(lambda lm=lm: run(lm, size))
            times[key].append(seconds)
    same = sum(a == b for a, b in zip(answers["stock"], answers["ours"], strict=True))
    ratio = statistics.median(times["stock"]) / statistics.median(times["ours"])
    kind = f"gsm8k-{shots}shot" + ("-fixed" if fixed else "")
    print(f"\n{name}, {kind}: {count} prompts, stock batch size {size}")
    for key, values in times.items():
        print(f"  {key:20s} {spread(values)} s")
    print(f"  {ratio:6.2f}x, {same} of {count} outputs the same")
    return {"name": f"{name}/{kind}/generation", "ratio": ratio, "max_abs_diff": count - same}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=float, default=1.0, help="times the usual number a round")
    parser.add_argument("--generation", type=int, default=0, metavar="N", help="also generate for N prompts")
    parser.add_argument("--quick", action="store_true", help="one shape, few documents: about a minute")
    parser.add_argument("--against", type=Path, metavar="OLD", help="compare with an old checkout instead")
    options = parser.parse_args()
    if options.against:
        import against

        against.main(["scoring", "generation"], options.against, 6 if options.quick else None)
        return
    if options.quick:
        options.shapes, options.documents, options.rounds = ["pythia-70m"], 0.25, 3
        options.tasks = ["hellaswag-0shot"]
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    root = os.environ.get("AFT_TEST_DATA")
    data = Path(root).resolve() if root else None
    tokenizer = make_tokenizer(data)
    if data is not None:
        os.chdir(data / "hub")  # where the stock tasks find their files
    print(f"{torch.get_num_threads()} thread(s), {'real' if data else 'random'} documents")
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            bench = Bench(shape, tokenizer, Path(folder))
            for name in options.tasks:
                task, shots, context, option, count = TASKS[name]
                count = max(1, round(count * options.documents / (4 if shape == "qwen2-0.5b" else 1)))
                requests = (
                    real_documents(task, shots, count, tokenizer)
                    if data is not None
                    else random_documents(context, option, count)
                )
                cases += run_case(bench, name, requests, options.rounds, many=shots == 0)
    if options.generation and data is not None:
        count, rounds = options.generation, max(2, options.rounds)
        for name, shots in (("english-neox-12m", 5), ("scratch-demo", 2)):
            for fixed in (False, True):
                cases.append(generation_case(data, name, shots, count, rounds, fixed))
    sys.stdout.flush()
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
