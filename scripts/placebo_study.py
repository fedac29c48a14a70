"""Why a placebo may gain: random directions on the demo, by layer and norm.

    OMP_NUM_THREADS=1 python scripts/placebo_study.py

scores pairs of opposite random directions, and the trained vector cut to the same norm, at every layer on
the 500 selection documents of the multiple-choice task's training split; the evaluation split is not read.
To first order opposite directions cancel: what a pair gains on average is of second order, no direction's
own doing. Some five minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
import torch
from method_study import interval
from torch import Tensor

from lm_eval_aft import train_vector
from lm_eval_aft._util.process import quiet_libraries
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.harness.examples import encode
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Engine, Recipe
from lm_eval_aft.training.recipe import TrainingPlan
from lm_eval_aft.training.setup import Prepared, prepare
from lm_eval_aft.training.trainer import make_engine, residual_norms

TASK = "aft_demo_choice"
SIZES = {"train_docs": 300, "selection_docs": 500}
BLOCK = 20  # documents scored together: the unit in which documents vary
RECIPE = {"protocol": "maximum", "lr": 1e-2, "l2": 0.0, "epochs": 4, "batch_size": 4, "seeds": 1}


def differences(
    engine: Engine, layer: int, vectors: Sequence[Tensor], blocks: Sequence[Sequence[TokenizedDocument]]
) -> list[list[float]]:
    """Per vector, each block's accuracy minus the baseline's."""
    quiet: Callable[[int], None] = lambda _: None  # noqa: E731
    group = [
        Candidate(layer, 0, Recipe(), Intervention.static(layer, vector), "placebo") for vector in vectors
    ]
    columns = []
    for block in blocks:
        before = engine.baseline(block, quiet).accuracy
        columns.append([score.accuracy - before for score in engine.evaluate(group, block, quiet)])
    return [list(row) for row in zip(*columns, strict=True)]


def pairs_of(count: int, width: int) -> list[Tensor]:
    """Random unit vectors, each followed by its opposite."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, width, generator=generator)
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    return [signed for one in drawn for signed in (one, -one)]


def report(
    prepared: Prepared, engine: Engine, layer: int, norms: Sequence[float], units: Sequence[Tensor]
) -> None:
    """Print one line per norm: opposite pairs, single draws, the trained direction."""
    prepared.lm.steer(None)
    found = train_vector(prepared.lm, TASK, progress=False, layers=str(layer), **SIZES, **RECIPE)
    trained = found.vector.layers[layer]
    selection = encode(prepared.splits.selection, prepared.lm)
    blocks = [selection[start : start + BLOCK] for start in range(0, len(selection), BLOCK)]
    size = residual_norms(prepared.lm.model, prepared.backbone, [layer], selection)[layer]
    click.echo(f"\nlayer {layer}: median residual norm {size:.1f}, trained vector {trained.norm():.2f}")
    for norm in norms:
        vectors = [norm * unit for unit in units] + [norm * trained / trained.norm()]
        *rows, gain = differences(engine, layer, vectors, blocks)
        singles = [100 * sum(row) / len(row) for row in rows]
        even = [
            [(a + b) / 2 for a, b in zip(*pair, strict=True)]
            for pair in zip(rows[::2], rows[1::2], strict=True)
        ]
        mean, low, high = interval(even)
        _, lowest, highest = interval(even, documents=True)
        click.echo(
            f"  norm {norm:4.1f}: trained {100 * sum(gain) / len(gain):+6.1f}  pairs {mean:+5.2f} "
            f"[{low:+5.2f}, {high:+5.2f}], over documents too [{lowest:+5.2f}, {highest:+5.2f}]  "
            f"single directions {min(singles):+.1f} to {max(singles):+.1f}"
        )


@click.command()
@click.option("--norms", default="1,1.5,2.3,3", show_default=True)
@click.option("--pairs", default=20, show_default=True, help="Random directions, each with its opposite.")
def main(norms: str, pairs: int) -> None:
    """Score random directions and trained ones at every layer of the demo, at several norms."""
    quiet_libraries()
    lm = AFTLM("demo", device="cpu", batch_size=32)
    prepared = prepare(lm, TrainingPlan.of(TASK, **SIZES))
    engine, _ = make_engine(
        lm.model, prepared.backbone, prepared.objective, encode(prepared.splits.selection, lm)
    )
    units = pairs_of(pairs, prepared.backbone.hidden_size)
    for layer in prepared.layers:
        report(prepared, engine, layer, [float(norm) for norm in norms.split(",")], units)


if __name__ == "__main__":
    main()
