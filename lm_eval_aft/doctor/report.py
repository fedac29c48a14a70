"""What the doctor found, as text for a bug report and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lm_eval_aft.doctor.facts import machine, registration, versions
from lm_eval_aft.doctor.families import FAMILIES
from lm_eval_aft.doctor.trials import BROKEN, FAST, REFUSED, RIGHT, SLOWER, WRONG, Outcome, Trial, try_family
from lm_eval_aft.private_names import NAMES, version

# Columns of the table, and the parts that each sums up.
_COLUMNS = {
    "log-likelihoods": ("log-likelihoods", "resumed"),
    "generation": ("generation",),
    "stock": ("stock",),
    "by hand": ("by hand",),
}
_MEANING = (
    "Each family is a tiny random model. Its log-likelihoods and greedy texts (generation: by --model aft;",
    "stock: with fast=false; by hand: by the model's own generate under attach), without a vector and",
    "steered at all, prompt, last and generated positions, are compared with whole passes that use no",
    "cache and are told which tokens to steer.",
)


@dataclass
class Report:
    """All that was looked at.

    Attributes:
        names: listed private names that are not as this package needs them: key -> what is wrong.
        checked: how many names were looked at.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    registration: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    device: str = "cpu"
    trials: list[Trial] = field(default_factory=list)

    @property
    def bad(self) -> list[tuple[str, Outcome]]:
        """Wrong answers and broken trials, with their families."""
        return [(trial.family, each) for trial in self.trials for each in trial.outcomes if each.bad]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"wrong": len(self.bad), **asdict(self)}

    def __str__(self) -> str:
        lines: list[str] = []
        for title in ("versions", "machine", "registration"):
            lines += [title, *_aligned(getattr(self, title)), ""]
        lines += [
            f"private names of other libraries: {self.checked - len(self.names)} of {self.checked} as needed"
        ]
        for key, reason in self.names.items():
            lines += [f"  {key}", f"    {reason}", f"    without it: {NAMES[key].when_gone}"]
        lines += ["", f"answers on {self.device}, float32", *_table(self.trials)]
        lines += self._reasons(SLOWER, "slower, and right unless said otherwise below")
        lines += self._reasons(REFUSED, "refused")
        lines += self._wrong()
        return "\n".join([*lines, "", self.verdict])

    @property
    def verdict(self) -> str:
        """The last line."""
        ran = [trial for trial in self.trials if not trial.absent]
        if not self.bad:
            return f"Every answer of {len(ran)} families is right."
        families = list(dict.fromkeys(family for family, _ in self.bad))
        return (
            f"{len(self.bad)} answers are wrong, in {len(families)} of {len(ran)} families: do not trust "
            "scores and texts of these kinds with these versions. Please report this output."
        )

    def _reasons(self, verdict: str, title: str) -> list[str]:
        """Reasons, each once, with the families and parts they hold for."""
        reasons: dict[str, dict[str, list[Outcome]]] = {}
        for trial in self.trials:
            for each in trial.outcomes:
                if each.verdict == verdict:
                    reasons.setdefault(each.why, {}).setdefault(trial.family, []).append(each)
        lines = []
        for reason, families in reasons.items():
            told = "; ".join(f"{family} ({_places(found)})" for family, found in families.items())
            lines += [f"  {told}", f"    {reason}"]
        return ["", title, *lines] if lines else []

    def _wrong(self) -> list[str]:
        """Family by family what is wrong, with one answer to show for it."""
        lines = []
        for trial in self.trials:
            if found := [each for each in trial.outcomes if each.bad]:
                first = found[0]
                lines += [
                    f"  {trial.family}: {_places(found)}",
                    f"    {first.part} {first.positions}: {first.why}".replace(" :", ":"),
                ]
        return ["", f"{WRONG} ({BROKEN}: an error that no user should meet)", *lines] if lines else []


def examine(
    families: Sequence[str] = (), device: str = "cpu", progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Look at everything; ``progress`` is told what comes next."""
    progress("versions and devices")
    report = Report(versions(), machine(), registration(), device=device)
    progress("private names of other libraries")
    for key, entry in NAMES.items():
        if entry.optional and version(entry.library) == "not installed":
            continue
        report.checked += 1
        if reason := entry.problem():
            report.names[key] = reason
    chosen = families or tuple(FAMILIES)
    for place, family in enumerate(chosen, 1):
        progress(f"{family} ({place} of {len(chosen)})")
        report.trials.append(try_family(family, device))
    return report


def _places(outcomes: Sequence[Outcome]) -> str:
    """Parts with the positions they are about."""
    parts: dict[str, list[str]] = {}
    for each in outcomes:
        parts.setdefault(each.part, []).append(each.positions or "unsteered")
    whole = {part for part, found in parts.items() if found == ["unsteered"]}
    return ", ".join(p if p in whole else f"{p} ({' '.join(found)})" for p, found in parts.items())


def _aligned(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {key:<{width}}  {value}" for key, value in entries.items()]


def _table(trials: Sequence[Trial]) -> list[str]:
    rows = [("family", "fast ways", *_COLUMNS)]
    for trial in trials:
        if trial.absent:
            rows.append((trial.family, "-", *(["-"] * len(_COLUMNS))))
            continue
        taken = [o.part for o in trial.outcomes if o.part in (*FAST, "resumed") and o.verdict == RIGHT]
        verdicts = [_worst(trial.outcomes, parts) for parts in _COLUMNS.values()]
        rows.append((trial.family, " ".join(dict.fromkeys(taken)) or "none", *verdicts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    absent = [f"  {trial.family}: not tried, {trial.absent}" for trial in trials if trial.absent]
    return [*(f"  {line}" for line in _MEANING), "", *table, *absent]


def _worst(outcomes: Sequence[Outcome], parts: Sequence[str]) -> str:
    """A cell: the gravest verdict on any of these parts."""
    mine = {each.verdict for each in outcomes if each.part in parts}
    return next(
        (verdict for verdict in (WRONG, BROKEN, REFUSED, SLOWER) if verdict in mine), RIGHT if mine else "-"
    )
