"""The tables in docs/: how their lines are written, and the lines a document has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.support.task_data import STOCK
from tests.support.task_trial import TaskRow
from tests.support.trial import EXPORTS, Row

DOCS = Path(__file__).parents[2] / "docs"
FAMILIES = DOCS / "families.md"
TASKS = DOCS / "tasks.md"
MADE_BY = "<!-- Written by scripts/support_tables.py: change what it runs, not this page. -->"

FAMILIES_TEXT = """\
{all} tiny random models: {passed} pass the fast way, {fallback} pass by a slower one, {refused} are
refused. Each that is not refused was trained for an epoch, its vector saved and loaded, attached, scored
and used in generation, and exported. Log-likelihoods are stock `hf`'s with a plain hook (bit for bit with
`fast=false`, within 1e-4 with `fast=true`), texts are equal, gradients are plain autograd's; in 16 bits
errors are no larger than stock's own.

*training*: `packed` shares a document's context among its options, `unpacked` shares the frozen part
only, `reference` shares nothing. *scoring*: `prefixed` reads what prompts share once, `packed` each
context once, `trimmed` saves head and log-softmax only, `stock` nothing. *generation*: `shared` decodes
in batches that finished rows leave. A window of 6 tokens stands for any window that prompts outgrow:
within it those models may pack too."""
TASKS_TEXT = """\
{stock} stock tasks of lm-eval (their YAML and code as they are, with made-up documents in their data
set's schema) and {own} of our own making: {works} train and score, {refused} are refused. For each that
works, 2-shot where the task allows it: prompts are the harness's own, byte for byte; the selection score
of the baseline follows from stock's log-likelihoods of those strings; answers and metrics of the steered
model are those of stock `hf` with a plain hook. `aft tasks --trainable` lists those that work and no
others, save that it imports no task's code.

*gold marked right*: whether the task's own metric rewards what training moves towards. Where it says `not
always`, the harness's target and its metric are at odds, and a vector follows the target."""


def line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"


def table(head: Sequence[str], lines: Iterable[str]) -> list[str]:
    return [line(*head), "|" + "---|" * len(head), *lines]


def family_line(row: Row) -> str:
    exports = [row.exports.get(kind, "-") for kind in EXPORTS]
    return line(row.name, row.kind, row.verdict, row.training, row.scoring, row.generation, *exports)


def family_reasons(row: Row) -> list[str]:
    """Why, part by part; parts with one reason share a line."""
    found: dict[str, list[str]] = {}
    for part, why in row.why.items():
        found.setdefault(why, []).append(part)
    return [f"- **{row.name}**, {', '.join(parts)}: {why}" for why, parts in found.items()]


def untried(names: Iterable[str]) -> list[str]:
    """A list of what has no line yet; nothing where there is nothing to list."""
    listed = [f"- {name}" for name in names]
    return ["## Not tried yet", "", *listed, ""] if listed else []


def families_page(rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """docs/families.md; ``missing`` are to be listed without a line."""
    count = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in ("passed", "fallback", "refused")
    }
    head = ("model", "kind", "verdict", "training", "scoring", "generation", *EXPORTS)
    return "\n".join(
        [
            "# Which models work",
            "",
            MADE_BY,
            "",
            FAMILIES_TEXT.format(all=len(rows), **count),
            "",
            *table(head, map(family_line, rows)),
            "",
            "## Why not the fast way, and what refusals say",
            "",
            *(each for row in rows for each in family_reasons(row)),
            "",
            *untried(missing),
        ]
    )


def task_line(row: TaskRow) -> str:
    features = ", ".join(row.features) or "-"
    return line(row.name, row.kind, features, row.verdict, row.trained, row.marked, row.scored)


def task_reasons(row: TaskRow) -> list[str]:
    return [f"- **{row.name}**: {row.why}"] if row.why else []


def tasks_page(rows: Sequence[TaskRow], missing: Sequence[str] = ()) -> str:
    """docs/tasks.md; ``missing`` are to be listed without a line."""
    refused = sum(bool(row.why) for row in rows)
    stock = sum(row.name in STOCK for row in rows)
    head = ("task", "output type", "made of", "verdict", "objective", "gold marked right", "scores")
    return "\n".join(
        [
            "# Which tasks work",
            "",
            MADE_BY,
            "",
            TASKS_TEXT.format(stock=stock, own=len(rows) - stock, works=len(rows) - refused, refused=refused),
            "",
            *table(head, map(task_line, rows)),
            "",
            "## What refusals say",
            "",
            *(each for row in rows for each in task_reasons(row)),
            "",
            *untried(missing),
        ]
    )
