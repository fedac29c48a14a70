"""What a merged vector costs: nothing when the checkpoint runs, and little memory to make it.

  cost    A model and its merged export, both in this process, generate in turns. Compared are the matrix
          products of one generation (number and FLOPs) and the medians of process CPU time.
  memory  A random checkpoint of Qwen2-0.5B's shape (24 blocks) is exported in a process of its own. Reported
          is that process's peak memory over what it holds after its imports, as a share of the checkpoint's
          size. The export's check, which reloads it, is included.

The last line is one JSON object.

  python scripts/bench_export.py                   # both, about five minutes on one core
  python scripts/bench_export.py cost --rounds 30
  python scripts/bench_export.py memory --dtype float32
  python scripts/bench_export.py --quick --against OLD     # an old checkout's export against this one's
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

QWEN2_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# A model of each kind of route, large enough that Python's own time does not hide the rest.
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROUTES = {
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
}
BOUND_TIME, BOUND_MEMORY = 0.05, 1.3


def make(folder: Path, family: str, settings: dict[str, Any], dtype: str) -> Path:
    """Save a random checkpoint; return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def some_vector(size: int, layer: int) -> Any:
    import torch

    from lm_eval_aft import SteeringVector

    return SteeringVector({layer: torch.randn(size, generator=torch.Generator().manual_seed(0))})


def products(run: Any) -> tuple[dict[str, int], int]:
    """Matrix products of a call: how many of each kind, and the FLOPs of all."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.overloadpacket in flop_registry:
                # A product with a bias added on the way out is still one product.
                self.seen[op.overloadpacket.__name__.replace("addmm", "mm")] += 1
            return op(*args, **(kwargs or {}))

    counter, flops = Count(), FlopCounterMode(display=False)
    with flops, counter:
        run()
    return dict(counter.seen), flops.get_total_flops()


def cost(rounds: int, tokens: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from lm_eval_aft.export.formats import export_vector

    found = {}
    for family, extra in ROUTES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = make(Path(folder, "base"), family, {**SMALL, **extra}, "float32")
            export_vector(some_vector(512, 2), "merged", Path(folder, "merged"), model=str(base))
            models = {
                name: AutoModelForCausalLM.from_pretrained(Path(folder, name)).eval()
                for name in ("base", "merged")
            }
            ids = torch.randint(8192, (1, 32), generator=torch.Generator().manual_seed(0))

            def generate(name: str, models: Any = models, ids: Any = ids) -> None:
                models[name].generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
                )

            counted = {name: products(lambda name=name: generate(name)) for name in models}
            times: dict[str, list[float]] = {"base": [], "merged": []}
            for name in models:
                generate(name)
            shuffled = random.Random(0)
            for _ in range(rounds):
                # In turns and in random order, so that a slow moment of the machine favours neither.
                for name in shuffled.sample(sorted(models), 2):
                    begin = time.process_time()
                    generate(name)
                    times[name].append(time.process_time() - begin)
        medians = {name: statistics.median(values) for name, values in times.items()}
        found[family] = {
            "products": {name: sum(kinds.values()) for name, (kinds, _) in counted.items()},
            "flops": {name: flops for name, (_, flops) in counted.items()},
            "same_products": counted["base"] == counted["merged"],
            "base_ms": round(medians["base"] * 1e3, 2),
            "merged_ms": round(medians["merged"] * 1e3, 2),
            "extra_time": round(medians["merged"] / medians["base"] - 1, 4),
        }
        print(f"{family}: {found[family]}", flush=True)
    return found


def memory(dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base = make(Path(folder, "base"), "qwen2", QWEN2_05B, dtype)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        command = [
            sys.executable,
            __file__,
            "child",
            "--base",
            str(base),
            "--folder",
            str(Path(folder, "out")),
        ]
        shown = subprocess.run(command, capture_output=True, text=True)
        if shown.returncode:
            raise SystemExit(f"bench_export: the export failed\n{shown.stderr}")
        found = json.loads(shown.stdout.splitlines()[-1])
        exported = sum(path.stat().st_size for path in Path(folder, "out").glob("*.safetensors"))
    found |= {"checkpoint_mb": round(size / 2**20), "export_mb": round(exported / 2**20), "dtype": dtype}
    found["peak_over_checkpoint"] = round((found["peak_mb"] - found["imports_mb"]) * 2**20 / size, 3)
    print(f"memory: {found}", flush=True)
    return found


def child(base: str, folder: str) -> None:
    """In a process of its own: export, and print the memory held after imports and at the peak."""
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import lm_eval_aft.export.merged  # noqa: F401
    from lm_eval_aft.export.formats import export_vector

    vector = some_vector(896, 12)
    imports = status("VmRSS")
    begin = time.perf_counter()
    made = export_vector(vector, "merged", folder, model=base)
    seconds = round(time.perf_counter() - begin, 1)
    assert made.agreement is not None
    print(
        json.dumps(
            {
                "imports_mb": imports,
                "peak_mb": status("VmHWM"),
                "seconds": seconds,
                "difference": made.agreement.difference,
                "bound": made.agreement.bound,
            }
        )
    )


def status(field: str) -> float:
    """MiB from /proc/self/status; getrusage would count the parent's memory of before exec."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{field}:"))
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", "cost", "memory", "child"], default="all")
    parser.add_argument("--rounds", type=int, default=20, help="generations by each model (default 20)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a generation (default 48)")
    parser.add_argument("--dtype", default="bfloat16", help="of the large checkpoint (default bfloat16)")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="only the cost, ten generations: two minutes")
    parser.add_argument("--against", type=Path, metavar="OLD", help="compare with an old checkout instead")
    options = parser.parse_args()
    if options.against:
        import against

        against.main(["export"], options.against, 4 if options.quick else None)
        return
    if options.quick:
        options.part, options.rounds, options.tokens = "cost", 10, 24
    if options.part == "child":
        child(options.base, options.folder)
        return
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result: dict[str, Any] = {}
    if options.part in ("all", "cost"):
        result["cost"] = cost(options.rounds, options.tokens)
    if options.part in ("all", "memory"):
        result["memory"] = memory(options.dtype)
    routes = result.get("cost", {}).values()
    result["met"] = all(r["same_products"] and r["extra_time"] <= BOUND_TIME for r in routes) and (
        result.get("memory", {}).get("peak_over_checkpoint", 0) <= BOUND_MEMORY
    )
    result |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
