"""Rows that belong beside a study's vectors: LoRA, the training documents in the prompt, answers alone.

    aft bench scripts/studies/real.yaml --output real --only 'smollm2/arc_easy/*'
    python scripts/study_rows.py scripts/studies/real.yaml --study real --output rows \\
      --model smollm2 --task arc_easy

For one model and task of a study, on the same training, selection and evaluation documents as its cells:

- **lora**: rank 8 on all linear layers (PEFT), three learning rates, three epochs; rate and epoch are chosen
  by the same criterion on the same selection split;
- **few-shot**: the first of the very training documents shown in every prompt, as many as `--shots` says;
- **answer-only**: baseline and the cell's `static` vector with the questions taken away.

What is finished is kept. `rows.json` has each row against the study's baseline, document by document.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.engine.batching import continuation_logits, make_batch, token_budget_batches
from lm_eval_aft.evaluation.compare import compare_runs
from lm_eval_aft.evaluation.results import ScoredRun, read_run
from lm_eval_aft.evaluation.run import PlannedRun, read_flags, score
from lm_eval_aft.harness.examples import encode
from lm_eval_aft.harness.tasks import find_definition, task_manager_for
from lm_eval_aft.library.load import load_vector
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.studies.config import read_bench_study
from lm_eval_aft.studies.jobs import Store, StudyCell, build_cells, flags_of
from lm_eval_aft.training.selection import Score
from lm_eval_aft.training.setup import Prepared, prepare

RANK, EPOCHS, BATCH = 8, 3, 4
LEARNING_RATES = (1e-4, 3e-4, 1e-3)


class Rows:
    """The rows of one model and task, in one folder."""

    def __init__(self, cell: StudyCell, study: Path, output: Path, batch_size: str) -> None:
        self.cell, self.store, self.output, self.batch_size = cell, Store(study), output, batch_size
        self.lm = self.load()

    def load(self, **more: Any) -> AFTLM:
        """The cell's model, as the study loads it."""
        entry = self.cell.model
        return AFTLM(
            entry.pretrained, softmax_dtype="float32", **entry.model_args, **more, batch_size=self.batch_size
        )

    def scored(
        self, name: str, lm: AFTLM, task: str = "", include: Sequence[str] = (), answer_only: bool = False
    ) -> Path:
        """lm-eval's results of the model as it is now, on the whole evaluation split; scored unless there."""
        place = self.output / "scores" / name
        if place.exists():
            return place
        work = self.output / "work" / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        task = task or self.cell.task.task
        flags = flags_of(self.cell.plan, self.cell.task.limit, self.batch_size)
        if include:  # it says itself how many examples it shows
            flags = ["--batch_size", self.batch_size, "--include_path", include[0]]
        config = read_flags([task], work, flags)
        lm.answer_only = answer_only
        described = {"pretrained": self.cell.model.pretrained, **self.cell.model.model_args}
        score(
            lm,
            PlannedRun(name, answer_only=answer_only),
            config,
            task_manager_for([task], include),
            work / "r",
            described,
        )
        lm.answer_only = False
        place.parent.mkdir(parents=True, exist_ok=True)
        (work / "r").rename(place)
        return place

    def answer_only(self) -> dict[str, Any]:
        """Both sides without the questions."""
        before = self.scored("answer-only-baseline", self.lm, answer_only=True)
        self.lm.steer(load_vector(str(self.store.vector(self.cell.vector_key))))
        after = self.scored("answer-only-static", self.lm, answer_only=True)
        self.lm.steer(None)
        return self.row("answer-only", after, before)

    def few_shot(self, prepared: Prepared, shots: int) -> dict[str, Any]:
        """The first training documents of the cell's seed in every prompt, in the order they were drawn."""
        task, name = self.cell.task.task, f"{self.cell.task.task}_shown_{shots}"
        shown = [example.doc for example in prepared.splits.train(self.cell.plan.first_seed)[:shots]]
        folder = self.output / "prompts"
        folder.mkdir(parents=True, exist_ok=True)
        definition = {
            "include": str(find_definition(task)),
            "task": name,
            "num_fewshot": shots,
            "fewshot_config": {"sampler": "first_n", "samples": json.loads(json.dumps(shown))},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
        place = self.scored(f"few-shot-{shots}", self.lm, name, [str(folder)])
        return self.row(f"few-shot ({shots})", place)

    def lora(self, prepared: Prepared) -> dict[str, Any]:
        """An adapter trained on the same documents with the same loss, chosen on the same selection split."""
        adapter = self.output / "lora"
        if not (adapter / "chosen.json").exists():
            train_lora(self.load(), prepared, self.cell.plan.first_seed, adapter)
        chosen: dict[str, Any] = json.loads((adapter / "chosen.json").read_text())
        return self.row("lora", self.scored("lora", self.load(peft=str(adapter)))) | chosen

    def row(self, name: str, place: Path, baseline: Path | None = None) -> dict[str, Any]:
        """The primary metric against the study's baseline (or the one given), document by document."""
        runs = []
        for folder, kind in (
            (baseline or self.store.baseline(self.cell.baseline_key), "baseline"),
            (place, "steered"),
        ):
            run = read_run(folder, name if kind == "steered" else kind, kind)
            runs.append(with_task(run, self.cell.task.task))
        compared = next(each for each in compare_runs(*runs) if each.row.primary)
        click.echo(f"  {name}: {100 * compared.row.baseline:.2f} % → {100 * compared.row.steered:.2f} %")
        return {"row": name, **asdict(compared.row)}


def with_task(run: ScoredRun, task: str) -> ScoredRun:
    """The run with its one task called so: prompts of its own have a name of their own."""
    (each,) = run.tasks.values()
    return replace(run, tasks={task: replace(each, task=task)})


def train_lora(lm: AFTLM, prepared: Prepared, seed: int, folder: Path) -> None:
    """Train rank-8 adapters with every learning rate; save the one that is best on the selection split."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    objective, splits = prepared.objective, prepared.splits
    train, selection = encode(splits.train(seed), lm), encode(splits.selection, lm)
    base = lm.model.requires_grad_(False)
    before = judged(base, objective, selection)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    best: tuple[Score, dict[str, Any], dict[str, Any]] | None = None
    tried, started = [], time.process_time()
    for rate in LEARNING_RATES:
        set_peft_model_state_dict(model, start)
        weights = [each for each in model.parameters() if each.requires_grad]
        optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        order = torch.Generator().manual_seed(seed)
        for epoch in range(1, EPOCHS + 1):
            model.train()
            shuffled = [train[i] for i in torch.randperm(len(train), generator=order)]
            for i in range(0, len(shuffled), BATCH):
                documents = shuffled[i : i + BATCH]
                for document in documents:
                    batch = make_batch([document], True, torch.device("cpu"), base.dtype)
                    loss = objective.losses(continuation_logits(base, batch), batch).sum() / len(documents)
                    torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimiser.step()
                optimiser.zero_grad()
            model.eval()
            now = judged(base, objective, selection)
            about = {"lr": rate, "epoch": epoch, "selection": now.score, "accuracy": now.accuracy}
            tried.append(about)
            click.echo(f"  lora {rate:g}, epoch {epoch}: {before.score:.4f} → {now.score:.4f}")
            if best is None or now.score < best[0].score:
                kept = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
                best = (now, about, kept)
    assert best is not None
    set_peft_model_state_dict(model, best[2])
    partial = folder.with_name("lora.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    parameters = sum(value.numel() for value in best[2].values())
    chosen = {"chosen": best[1], "selection_change": best[0].score - before.score, "tried": tried}
    chosen |= {"parameters": parameters, "train_seconds": time.process_time() - started}
    (partial / "chosen.json").write_text(json.dumps(chosen, indent=2))
    partial.rename(folder)


@torch.no_grad()
def judged(model: Any, objective: Any, documents: Sequence[Any]) -> Score:
    """The selection criterion of the model as it is."""
    outcomes: list[Any] = []
    for indices in token_budget_batches(documents, True, 1024):
        batch = make_batch([documents[i] for i in indices], True, torch.device("cpu"), model.dtype)
        outcomes += objective.outcomes(continuation_logits(model, batch), batch)
    score: Score = objective.summarise(outcomes)
    return score


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--study", required=True, type=click.Path(path_type=Path), help="The study's output folder.")
@click.option("--model", required=True, help="Name of a model of the study.")
@click.option("--task", required=True, help="Name of a task of the study.")
@click.option(
    "--method", default="static", show_default=True, help="Whose first seed is scored without questions."
)
@click.option(
    "--shots", multiple=True, default=(5, 25), show_default=True, help="Documents shown; repeatable."
)
@click.option("--rows", default="few-shot,answer-only,lora", show_default=True, help="Which rows to make.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder; what is there is kept."
)
def main(
    file: Path,
    study: Path,
    model: str,
    task: str,
    method: str,
    shots: tuple[int, ...],
    rows: str,
    output: Path,
) -> None:
    """Score LoRA, few-shot and answer-only rows for a MODEL and TASK of the study in FILE."""
    quiet_libraries()
    described = read_bench_study(file)
    with contextlib.chdir(described.data or "."):
        own = described.model_copy(
            update={
                "models": [each for each in described.models if each.name == model],
                "tasks": [each for each in described.tasks if each.name == task],
                "methods": [each for each in described.methods if each.name == method],
                "seeds": described.seeds[:1],
            }
        )
        (cell,) = build_cells(own)
        made = Rows(cell, study, output.resolve() / f"{model}-{task}", described.evaluation.batch_size)
        prepared = prepare(made.lm, cell.plan)
        started, found = time.process_time(), []
        if "few-shot" in rows:
            found += [made.few_shot(prepared, each) for each in shots]
        if "answer-only" in rows:
            found.append(made.answer_only())
        if "lora" in rows:
            found.append(made.lora(prepared))
        table = made.output / "rows.json"
        kept = json.loads(table.read_text()) if table.exists() else []
        names = {each["row"] for each in found}
        both = [each for each in kept if each["row"] not in names] + found
        table.write_text(json.dumps(both, indent=2))
        click.echo(f"{table}: {time.process_time() - started:.0f} CPU s")


if __name__ == "__main__":
    main()
