"""Every benchmark once, and the page that shows them.

    AFT_TEST_DATA=DATA OMP_NUM_THREADS=1 python scripts/benchmarks.py --output results      # about two hours
    python scripts/benchmarks.py --output results --only startup --again
    python scripts/benchmarks.py --output results --list

Runs the `bench_*.py` scripts piece by piece, one after the other. Each piece leaves `results/NAME.json`: the
command, its last line, the commit, the date, the machine. What is there is not run again, so an interrupted
call goes on. Then writes docs/benchmarks.md and docs/growth.png from what there is.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from bench_scoring import SHAPES
from bench_training import CASES

from lm_eval_aft._util.files import replacing

ROOT = Path(__file__).resolve().parents[1]
Results = dict[str, dict[str, Any]]
Rows = Iterable[Sequence[str]]


def pieces() -> dict[str, list[str]]:
    """Script and arguments of every piece, by its name."""
    found = {
        f"training {case.name}": ["bench_training.py", "--only", case.name, "--rounds", "3"] for case in CASES
    }
    found["training growth"] = ["bench_training.py", "--growth"]
    for shape in SHAPES:
        found[f"scoring {shape}"] = ["bench_scoring.py", "--shapes", shape, "--rounds", "5"]
    found["generation"] = ["bench_scoring.py", "--tasks", "--generation", "40", "--rounds", "5"]
    found["export"] = ["bench_export.py"]
    found["plan"] = ["bench_plan.py", "--check"]
    found["startup"] = ["bench_startup.py", "--rounds", "50"]
    return found


def run(name: str, arguments: Sequence[str], folder: Path) -> None:
    """Run one piece and keep what it printed last.

    Raises:
        SystemExit: it failed.
    """
    click.echo(f"{datetime.now():%H:%M} {name} ...", err=True)
    started, commit = time.monotonic(), git("rev-parse", "--short", "HEAD")
    script, *rest = arguments
    command = [sys.executable, str(ROOT / "scripts" / script), *rest]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    record = {
        "command": " ".join(["python", f"scripts/{script}", *(f'"{a}"' if " " in a else a for a in rest)]),
        "result": json.loads(done.stdout.strip().splitlines()[-1]),
        "commit": commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": machine(),
    }
    with replacing(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """Processor, threads and torch, in words."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kinds = ", ".join(kind for kind in ("avx2", "avx512f", "amx_bf16") if f" {kind} " in flags)
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return (
        f"{platform.machine()} ({kinds or 'no wide instructions told'}), {threads}, torch {torch.__version__}"
    )


def page(found: Results, picture: bool) -> str:
    """The page, in Markdown, of the pieces that were run."""
    machines = sorted({record["machine"] for record in found.values()})
    parts = [
        "# Benchmarks",
        "Written by `AFT_TEST_DATA=DATA OMP_NUM_THREADS=1 python scripts/benchmarks.py --output FOLDER`, "
        "which runs every `scripts/bench_*.py` piece by piece. Times are process CPU time, medians over "
        "rounds in which both sides take turns in one process; models have random weights in the shape of "
        "the named ones, documents the lengths of real prompts. Every script checks that both sides give "
        "the same numbers and says by how much they differ. Whatever else runs on the machine meanwhile "
        "slows both sides, and the one that waits for memory more.",
        *(f"Machine {number}: {each}." for number, each in enumerate(machines, 1)),
    ]
    for title, text, draw in SECTIONS:
        body = draw(found)
        if body:
            parts += [f"## {title}", *([text] if text else []), *body]
    if picture:
        parts += ["## Growth of a training step", GROWTH, "![Growth](growth.png)"]
    commands = [
        [
            f"`{r['command']}`", r["date"], r["commit"], f"{r['minutes']:g}",
            str(1 + machines.index(r["machine"])),
        ]
        for r in found.values()
    ]  # fmt: skip
    parts += ["## Commands", *table(["command", "date", "commit", "minutes", "machine"], commands)]
    missing = [name for name in pieces() if name not in found]
    if missing:
        parts.append("Not run so far: " + "; ".join(missing) + ".")
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Rows) -> list[str]:
    """One Markdown table, or nothing where there are no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"|{'|'.join('---' for _ in columns)}|"
    return ["\n".join([f"| {' | '.join(columns)} |", rule, *lines])] if lines else []


def cases(found: Results, kind: str, key: str = "cases") -> list[dict[str, Any]]:
    """What the pieces whose names begin with ``kind`` found."""
    return [case for name, r in found.items() if name.startswith(kind) for case in r["result"].get(key, [])]


def training(found: Results) -> list[str]:
    rows = [
        [
            case["name"], times(case["ratio"]), times(case["flop_ratio"]), times(case["ratio_unfrozen"]),
            f"{case['max_rel_grad_error']:.0e}", times(case["packing_alone"]), times(case["judging_ratio"]),
            times(case["bf16_alone"]), times(case["halving_alone"]), times(case["protocol_ratio"], 0),
            f"{case['engine_tokens_per_second']:,}", f"{100 * case['engine_share_of_matmul_peak']:.0f} %",
            seconds(case["naive_seconds"]), seconds(case["engine_seconds"]),
        ]
        for case in cases(found, "training")
    ]  # fmt: skip
    columns = [
        *(
            "case",
            "same work",
            "in FLOPs",
            "weights unfrozen",
            "gradients differ by",
            "packing alone",
            "judging",
        ),
        *(
            "bf16 alone",
            "halving alone",
            "whole protocol",
            "tokens/s",
            "of matmul peak",
            "plain, s",
            "engine, s",
        ),
    ]
    return table(columns, rows)


def memory(found: Results) -> list[str]:
    rows = [
        [
            case["name"], f"{case['naive_bytes'] / 1e6:.0f}", f"{case['engine_bytes'] / 1e6:.0f}",
            f"{case['ratio']:.2f}", f"{case['estimate_over_measured']:.2f}",
        ]
        for case in cases(found, "training", "memory")
    ]  # fmt: skip
    return table(["case", "plain, MB", "engine, MB", "engine / plain", "dry run / measured"], rows)


def scoring(found: Results) -> list[str]:
    rows = [
        [
            case["name"], times(case["ratio"], 2),
            times(case["flop_ratio"], 2) if "flop_ratio" in case else "",
            f"{case['max_abs_diff']:.0e}", "yes" if case["greedy_equal"] else "**no**",
        ]
        for case in cases(found, "scoring")
    ]  # fmt: skip
    return table(["case", "ratio", "in FLOPs", "log-likelihoods differ by", "is_greedy equal"], rows)


def generation(found: Results) -> list[str]:
    rows = [
        [case["name"], times(case["ratio"], 2), str(case["max_abs_diff"])]
        for case in cases(found, "generation")
    ]
    return table(["case", "ratio", "outputs that differ"], rows)


def plan(found: Results) -> list[str]:
    rows = [
        [
            f"{case['shape']} {case['task']}", "yes" if case["flops_equal"] else "**no**",
            f"{case['bytes_ratio']:.2f}", f"{case['seconds_ratio']:.2f}",
        ]
        for case in cases(found, "plan", "checked")
    ]  # fmt: skip
    return table(["case", "operations equal", "memory, planned / measured", "time, planned / measured"], rows)


def export(found: Results) -> list[str]:
    if "export" not in found:
        return []
    result = found["export"]["result"]
    rows = [
        [name, "yes" if each["same_products"] else "**no**", f"{100 * each['extra_time']:+.1f} %"]
        for name, each in result["cost"].items()
    ]
    share = result["memory"]["peak_over_checkpoint"]
    return [
        *table(["checkpoint", "same matrix products", "time against the unsteered model"], rows),
        f"Writing a checkpoint of Qwen2-0.5B's shape took {share:.2f} times its size in memory at the peak.",
    ]


def startup(found: Results) -> list[str]:
    if "startup" not in found:
        return []
    r = found["startup"]["result"]
    rows = [[f"{r[key]:.1f} ms"] for key in ("without_ms", "with_ms", "start_up_file_alone_ms")]
    rows.append([f"{r['import_package_ms']:.1f} ms"])
    names = (
        "`python -c pass`",
        "the same with the start-up file",
        "the file by itself",
        "`import lm_eval_aft`",
    )
    return table(["", "median"], [[name, *row] for name, row in zip(names, rows, strict=True)])


def times(ratio: float, digits: int = 1) -> str:
    return f"{ratio:.{digits}f}×"


def seconds(quartiles: Sequence[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


Section = tuple[str, str, Callable[[Results], list[str]]]
SECTIONS: list[Section] = [
    (
        "Training",
        "The engine against a plain loop over layers (batch size 1, every option a whole pass), the same "
        "candidates on the same documents in fp32. *Weights unfrozen*: the plain loop with the weights' "
        "gradients left on. *Judging*: selection passes. *Whole protocol*: `adaptive` in bfloat16 "
        "against all of its candidates trained to the end. *N sharing*: N documents' prompts show the same "
        "examples, as in `onepass` and `adaptive`.",
        training,
    ),
    ("Memory of training", "Peak above the loaded weights, each side in a process of its own.", memory),
    (
        "Scoring",
        "`--model aft` against the better of lm-eval's `hf` and `steered` at its best batch size; "
        "*baseline+N*: the baseline and N vectors in one go against as many runs of theirs; *steering "
        "overhead*: with a vector over without.",
        scoring,
    ),
    (
        "Generation",
        "Real gsm8k prompts, 64 new tokens, against `hf` at its best batch size; few-shot examples drawn for "
        "every document, as stock gsm8k does, or *fixed*: the same for all.",
        generation,
    ),
    ("Merged exports", "", export),
    ("Dry runs", "What a plan from a config alone says, against a process that does it.", plan),
    ("Starting Python", "", startup),
]
GROWTH = (
    "Process CPU seconds of one pass over the documents, in the shape of pythia-70m, four options of 17 "
    "tokens; with 2 documents of 64 tokens, 2 layers and 2 documents of 64 tokens, and 2 layers and 1 "
    "document."
)


def draw_growth(growth: dict[str, list[list[float]]], path: Path) -> None:
    """Seconds of the engine and the plain loop by layers, documents and context tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"layers": "layers trained", "documents": "documents", "context": "context tokens"}
    for axes, (name, points) in zip(figure.subplots(1, 3), growth.items(), strict=True):
        x, engine, plain = zip(*points, strict=True)
        axes.plot(x, plain, "o--", color="#6b7280", label="plain loop")
        axes.plot(x, engine, "o-", color="#c2410c", label="engine")
        axes.set(xlabel=labels[name], ylabel="CPU seconds", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Results.")
@click.option("--only", default="", help="Only the pieces whose name contains this.")
@click.option("--again", is_flag=True, help="Also what was run before.")
@click.option("--list", "names", is_flag=True, help="Name the pieces and run nothing.")
@click.option("--no-run", is_flag=True, help="Write the page from what there is.")
def main(output: Path, only: str, again: bool, names: bool, no_run: bool) -> None:
    """Run the benchmarks that are missing, then write the page."""
    every = pieces()
    if names:
        click.echo("\n".join(every))
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, arguments in every.items():
        wanted = only in name and not no_run
        if wanted and (again or not (output / f"{name}.json").exists()):
            run(name, arguments, output)
    files = {name: output / f"{name}.json" for name in every}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if not found:
        raise click.ClickException(f"Nothing was run yet: {output} is empty.")
    growth = found.get("training growth")
    if growth:
        draw_growth(growth["result"]["growth"], ROOT / "docs" / "growth.png")
    with replacing(ROOT / "docs" / "benchmarks.md") as temporary:
        temporary.write_text(page(found, growth is not None))
    click.echo(f"Wrote docs/benchmarks.md from {len(found)} of {len(every)} pieces.")


if __name__ == "__main__":
    main()
