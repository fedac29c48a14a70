"""What a study's cells will cost, on paper: the plan of each training, and the documents it is scored on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lm_eval_aft.bench.matrix import Cell
from lm_eval_aft.bench.shapes import SIZES, UNKNOWN_SIZES, Shape, lengths_known, typical
from lm_eval_aft.training.plan_cost import PlanCost, plan_cost
from lm_eval_aft.training.protocols import Protocol
from lm_eval_aft.training.rates import Spent
from lm_eval_aft.training.roofline import Device
from lm_eval_aft.training.trajectory import DEFAULT_TOKEN_BUDGET, TOKEN_BUDGET

LEAST_BUDGET = 512  # tokens; less than that is one document a pass


@dataclass(frozen=True)
class Cost:
    """What a cell costs.

    Attributes:
        candidates: candidates trained, over all stages.
        steps: optimiser steps of all candidates together.
        training, scoring: the baseline's scoring is not counted here.
        parameters, weight_bytes: the model's.
        peak_bytes: memory above the weights, at the longest documents.
    """

    candidates: int
    steps: int
    training: Spent
    scoring: Spent
    parameters: int
    weight_bytes: int
    peak_bytes: int

    @property
    def whole(self) -> Spent:
        """Training and scoring."""
        return self.training + self.scoring


class Paper:
    """Costs of one model's cells on some device."""

    def __init__(self, shape: Shape, device: Device, budget: int | None = None) -> None:
        self.shape, self.device = shape, device
        self.budget = budget or TOKEN_BUDGET.get(device.kind, DEFAULT_TOKEN_BUDGET)
        self._plans: dict[tuple[str, int, str, Protocol], PlanCost] = {}

    def cost(self, cell: Cell, shots: int) -> Cost:
        """One cell's."""
        plan = self._plan(cell, shots)
        return Cost(
            sum(stage.candidates for stage in plan.stages),
            plan.steps,
            Spent(plan.estimate.seconds, plan.estimate.flops),
            self.baseline(cell, shots) * (1 + cell.placebos),
            plan.parameters,
            plan.weight_bytes,
            plan.estimate.peak_bytes,
        )

    def baseline(self, cell: Cell, shots: int) -> Spent:
        """Scoring a cell's baseline, or one vector."""
        _, available = SIZES.get(cell.task.task, UNKNOWN_SIZES)
        return self._plan(cell, shots).scored * min(cell.task.limit or available, available)

    @staticmethod
    def assumed(cell: Cell) -> bool:
        """Whether the lengths of its task's documents are only guessed."""
        return not lengths_known(cell.task.task)

    def fitting_budget(self, cell: Cell, shots: int) -> int | None:
        """Tokens a pass may have for a cell to fit the device, halved as training does; ``None`` for none."""
        plan, budget = self._plan(cell, shots), self.budget
        if plan.fits:
            return budget
        # Memory grows with the tokens at most in proportion: what is left of it says where to begin.
        share = max(0.0, self.device.memory - plan.weight_bytes) / plan.estimate.peak_bytes
        while budget >= LEAST_BUDGET and share < 1:
            budget, share = budget // 2, share * 2
        while budget >= LEAST_BUDGET:
            if Paper(self.shape, self.device, budget)._plan(cell, shots).fits:
                return budget
            budget //= 2
        return None

    def _plan(self, cell: Cell, shots: int) -> PlanCost:
        wanted, task = cell.plan, cell.task.task
        available, _ = SIZES.get(task, UNKNOWN_SIZES)
        selection = wanted.selection_docs or min(wanted.protocol.selection_docs, available // 2)
        train = wanted.train_docs or min(wanted.protocol.train_docs, available - selection)
        protocol = replace(wanted.protocol, train_docs=train, selection_docs=selection)
        key = (task, shots, wanted.method, protocol)
        if key not in self._plans:
            documents = typical(task, shots, protocol.share_fewshot)
            chosen_from = max(len(document.pairs) for document in documents)
            self._plans[key] = plan_cost(
                self.shape.config,
                protocol,
                documents,
                device=self.device,
                dtype=self.shape.dtype,
                objective="choice" if chosen_from > 1 else "lm",
                method=wanted.method,
                budget=self.budget,
            )
        return self._plans[key]
