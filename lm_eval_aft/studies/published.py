"""Figures of the earlier study, as it published them, to stand beside ours.

Differences are in percentage points against its own baselines. Its vectors were chosen on documents it
reported, so its figures are no results by the rules of this package; they are quoted for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quoted:
    """One published figure.

    Attributes:
        model: Hub id; our reading of the study's short name. ``""`` for figures over models.
        task: harness task; ``""`` for figures over tasks.
        method: our name of its method.
        points: steered minus baseline, in percentage points.
        n: documents, as stated or implied; ``None``: not told.
        note: what the study said besides.
    """

    model: str
    task: str
    method: str
    points: float
    n: int | None
    note: str = ""


def _rapid(model: str, *points: float) -> list[Quoted]:
    tasks = ("hellaswag", "arc_challenge", "gsm8k")
    return [Quoted(model, task, "static", each, 50) for task, each in zip(tasks, points, strict=True)]


_QWEN = "Qwen/Qwen1.5-0.5B"
TABLES: dict[str, tuple[Quoted, ...]] = {
    "rapid": (
        *_rapid(_QWEN, 8, 0, 0),
        *_rapid("Qwen/Qwen1.5-0.5B-Chat", -2, 8, 20),
        *_rapid("EleutherAI/pythia-410m", 6, 4, 2),
        *_rapid("microsoft/phi-1_5", 0, 2, 4),
        *_rapid("stabilityai/stablelm-2-1_6b", 10, -2, 0),
        *_rapid("Qwen/Qwen1.5-1.8B", 10, -2, 4),
        *_rapid("Qwen/Qwen1.5-1.8B-Chat", 10, 4, -4),
    ),
    "maximum": (
        Quoted("EleutherAI/pythia-410m", "hellaswag", "static", 2, 100, "30 to 32, layer 11"),
        Quoted("EleutherAI/pythia-410m", "arc_challenge", "static", 9, 100, "23 to 32, layer 6"),
        Quoted(_QWEN, "hellaswag", "static", 17, 100, "30 to 47, layer 2"),
    ),
    "methods": (
        Quoted("", "", "static", 17, None, "best result, 1,024 parameters"),
        Quoted("", "", "drab", -1, None, "best result, 2,049 parameters"),
        Quoted("", "", "drab-strong", 0, None, "best result, 74,312 parameters"),
        Quoted("", "", "mlp", -10, None, "best result, 263,296 parameters"),
    ),
}
NOTES = {
    "rapid": "n = 50 is implied by the table's 2-point grid, not stated. Its text counts 14 positive, 2 zero "
    "and 5 negative; the table has 13, 4 and 4.",
    "maximum": "Final scores on 100 documents, the layer chosen on 30, the best epoch on the reported ones. "
    "Its steered 47 for Qwen1.5-0.5B on HellaSwag is below that model's published unsteered 49.05.",
    "methods": "Best result of each approach, over whatever was tried; n is not told for these.",
}
