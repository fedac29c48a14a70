"""One family through everything, against code that shares nothing with the package but the model.

What a family cannot do is one `AFTError`, which goes into its row; a wrong number is an AssertionError and
anything else is a fault of the package: both leave the trial as they are.
"""

from __future__ import annotations

import copy
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lm_eval_aft import AFTError, SteeringVector, attach, load_vector
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.engine.checks import packing_problem
from lm_eval_aft.export.formats import export_vector
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.fingerprint import fingerprint
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.objectives import Choice
from lm_eval_aft.training.trainer import make_engine
from tests.support.families import WORDS, tiny_tokenizer

LAYER = 1
EXPORTS = {"merged": "merged", "peft": "adapter", "gguf": "v.gguf", "steered": "v.pt"}
Pair = tuple[str, str]


@dataclass
class Row:
    """A line of the table: what each part came to, and why where it is not the fast way."""

    name: str
    kind: str
    training: str = "-"
    scoring: str = "-"
    generation: str = "-"
    exports: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """passed, fallback (right by a slower way) or refused."""
        if self.training == "refused":
            return "refused"
        fast = self.training == "packed" and self.scoring in ("packed", "prefixed")
        return "passed" if fast else "fallback"

    def refuse(self, part: str, error: AFTError) -> str:
        """Note a refusal; it must say what to do."""
        assert error.hint, f"{self.name}: {error.what!r} says not what to do"
        self.why[part] = _steady(error.what)
        return "refused"


def documents(n: int = 6, seed: int = 0) -> list[TokenizedDocument]:
    """Random token documents of two to four options over one context."""
    draw = random.Random(seed)

    def ids(k: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 44) for _ in range(k))

    made = []
    for i in range(n):
        context = ids(draw.randint(3, 9))
        count = (4, 2, 3)[i % 3]
        tails = [ids(draw.randint(1, 4)) for _ in range(count)]
        made.append(
            TokenizedDocument(
                tuple((context, tail) for tail in tails), (draw.randrange(count),), (1.0,) * count
            )
        )
    return made


def words(draw: random.Random, n: int) -> str:
    return " ".join(draw.choice(WORDS[:40]) for _ in range(n))


def questions() -> list[Pair]:
    """Questions that share their first 20 words, with two or three options each."""
    draw = random.Random(1)
    prefix = words(draw, 20) + " "
    pairs = []
    for i in range(8):
        context = prefix + words(draw, draw.randint(1, 10))
        pairs += [(context, " " + words(draw, draw.randint(1, 4))) for _ in range(2 + i % 2)]
    return pairs


def prompts() -> list[tuple[str, dict[str, Any]]]:
    """Prompts of different lengths for greedy generation."""
    draw = random.Random(2)
    settings: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    return [(words(draw, n), settings) for n in (3, 9, 14)]


def instances(pairs: Sequence[tuple[Any, ...]], kind: str) -> list[Instance]:
    return [Instance(kind, {}, pair, i, ("toy", i, 1)) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]


# The naive side: a plain hook, plain passes, plain Adam.


@contextmanager
def plain_hook(block: Any, vector: Tensor | None) -> Iterator[None]:
    """Add ``vector`` to what ``block`` returns."""
    if vector is None:
        yield
        return

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)([output[0] + vector.to(output[0].dtype), *output[1:]])
        return output + vector.to(output.dtype)

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def plain_gradient(model: Any, block: Any, docs: Sequence[TokenizedDocument], vector: Tensor) -> Tensor:
    """The gradient at ``vector`` of the mean cross-entropy over options."""
    leaf = vector.clone().requires_grad_()
    for document in docs:
        scores = []
        for context, tail in document.pairs:
            with plain_hook(block, leaf):
                logits = model(input_ids=torch.tensor([context + tail]), use_cache=False).logits[0]
            steps = logits[len(context) - 1 : -1].to(vector.dtype).log_softmax(-1)
            scores.append(steps[range(len(tail)), list(tail)].sum())
        (-torch.stack(scores).log_softmax(0)[document.gold[0]] / len(docs)).backward()
    assert leaf.grad is not None
    return leaf.grad


def plain_training(
    model: Any, block: Any, steps: Sequence[Sequence[TokenizedDocument]], lr: float, size: int
) -> Tensor:
    """The vector after one epoch of Adam, gradients clipped to 1."""
    vector = torch.zeros(size)
    adam = torch.optim.Adam([vector], lr=lr)
    for step in steps:
        vector.grad = plain_gradient(model, block, step, vector)
        torch.nn.utils.clip_grad_norm_([vector], 1.0)
        adam.step()
    return vector


@dataclass
class Subject:
    """A loaded model and how its numbers are to be judged.

    Attributes:
        exact: the same weights in float32, for 16-bit models: errors are measured against it.
        folder: the checkpoint, for exports; None where there is none.
    """

    lm: AFTLM
    folder: Path | None = None
    exact: AFTLM | None = None

    @property
    def backbone(self) -> Backbone:
        return find_backbone(self.lm.model)


def run(row: Row, load: Callable[[], Subject], work: Path) -> Row:
    """Everything: train, save, load, attach, score, generate, export."""
    try:
        subject = load()
        backbone = subject.backbone
        vector = _train(row, subject, backbone)
    except AFTError as error:
        row.training = row.scoring = row.generation = row.refuse("all", error)
        return row
    vector.metadata["fingerprint"] = fingerprint(subject.lm.model, subject.lm.tokenizer)
    vector.metadata["base_model"] = {"name": row.name}
    vector.save(work / "vector")
    vector = load_vector(str(work / "vector"))
    _attach(subject, backbone, vector)
    _score(row, subject, backbone, vector)
    _generate(row, subject, backbone, vector)
    if subject.folder is not None:
        _export(row, subject.folder, vector, work)
    return row


def _train(row: Row, subject: Subject, backbone: Backbone) -> SteeringVector:
    model, docs, lr = subject.lm.model, documents(), 0.1
    with messages("lm_eval_aft.training.trainer") as said:
        engine, row.training = make_engine(model, backbone, Choice("acc"), docs)
    if row.training != "packed":
        reason = packing_problem(model, docs)
        row.why["training"] = _steady(
            said[-1].rpartition("slow: ")[2] if row.training == "reference" else reason
        )
    block, zero = backbone.blocks[LAYER], torch.zeros(backbone.hidden_size)
    ours = Candidate(LAYER, 0, Recipe(lr=lr, clip=1.0), Intervention.static(LAYER, zero.clone()))
    probe = Candidate(LAYER, 0, Recipe(lr=lr), Intervention.static(LAYER, zero.clone()))
    seen: list[Tensor] = []
    probe.step = lambda: seen.append(probe.vector.grad.clone())  # type: ignore[method-assign, union-attr]
    engine.train([probe], [docs], lambda _: None)
    gradient = plain_gradient(model, block, docs, zero)
    off = _apart(seen[0], gradient)
    if subject.exact is not None:
        assert off <= 0.5, f"gradient off by {off}"
    elif off > 1e-5:  # no more than float32 itself makes of the plain passes
        wide = copy.deepcopy(model).double()
        true = plain_gradient(wide, find_backbone(wide).blocks[LAYER], docs, zero.double()).float()
        noise = _apart(gradient, true)
        assert _apart(seen[0], true) <= max(1e-5, 3 * noise), f"gradient off by {off}, noise {noise}"
    steps = [docs[:3], docs[3:]]
    engine.train([ours], steps, lambda _: None)
    found = ours.vector.detach()
    off = _apart(found, plain_training(model, block, steps, lr, backbone.hidden_size))
    # Adam divides by each entry's size, which makes much of rounding where that is near 0.
    assert off <= (1e-2 if subject.exact is None else 1.0), f"vector off by {off}"
    return SteeringVector({LAYER: found * 3})


def _attach(subject: Subject, backbone: Backbone, vector: SteeringVector) -> None:
    model = subject.lm.model
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with plain_hook(backbone.blocks[LAYER], vector.layers[LAYER]):
            wanted = model(input_ids=ids, use_cache=False).logits
        handle = attach(model, vector)
        found = model(input_ids=ids, use_cache=False).logits
        handle.remove()
        after = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert torch.equal(before, after)
    assert not torch.equal(before, wanted)


def _score(row: Row, subject: Subject, backbone: Backbone, vector: SteeringVector) -> None:
    lm, pairs = subject.lm, questions()
    stock = _stock(subject.lm)
    paths = []
    with messages("lm_eval_aft.engine") as said:
        for steered in (None, vector):
            shift = None if steered is None else steered.layers[LAYER]
            with plain_hook(backbone.blocks[LAYER], shift):
                wanted = _loglikelihoods(stock, pairs)
            lm.steer(steered)
            lm.fast = False
            assert _loglikelihoods(lm, pairs) == wanted, "the slow path is not stock's, bit for bit"
            lm.fast = True
            found = _loglikelihoods(lm, pairs)
            paths.append(str(lm.get_model_info()["aft"]["scoring_path"]))
            if subject.exact is None:
                _same(found, wanted)
            else:
                with plain_hook(find_backbone(subject.exact.model).blocks[LAYER], shift):
                    _no_worse(found, wanted, _loglikelihoods(_stock(subject.exact), pairs))
    lm.steer(None)
    assert paths[0] == paths[1], paths
    row.scoring = re.sub(r" \(100.0% of \d+\)", "", paths[0])
    if said and not row.scoring.endswith(("packed", "prefixed")):
        row.why["scoring"] = _steady(said[-1].partition(": ")[2])


def _generate(row: Row, subject: Subject, backbone: Backbone, vector: SteeringVector) -> None:
    lm, asked = subject.lm, instances(prompts(), "generate_until")
    with messages("lm_eval_aft.engine") as said:
        for steered in (None, vector):
            shift = None if steered is None else steered.layers[LAYER]
            with plain_hook(backbone.blocks[LAYER], shift):
                # One by one: padding on the left is for stock's conscience.
                wanted = [_stock(lm, 1).generate_until([each], disable_tqdm=True)[0] for each in asked]
            lm.steer(steered)
            lm.batch_size_per_gpu = 1
            found = lm.generate_until(asked, disable_tqdm=True)
            lm.batch_size_per_gpu = 4
            assert found == wanted, f"texts differ: {found} {wanted}"
            taken = lm.paths_taken()
    lm.steer(None)
    row.generation = "shared" if taken["generated in shared batches"] else "stock"
    if row.generation == "stock":
        reason = lm._fast()[1].refusal() or (said[-1].partition(": ")[2] if said else "")
        row.why |= {"generation": _steady(reason)} if reason else {}


def _export(row: Row, folder: Path, vector: SteeringVector, work: Path) -> None:
    for kind, name in EXPORTS.items():
        try:
            made = export_vector(vector, kind, work / name, model=str(folder))  # type: ignore[arg-type]
        except AFTError as error:
            row.exports[kind] = row.refuse(kind, error)
            assert not (work / name).exists()
        else:
            assert kind == "gguf" or made.agreement is not None
            row.exports[kind] = "yes"


def _stock(lm: AFTLM, batch: int = 4) -> HFLM:
    """lm-eval's own `hf` over the same model object."""
    options: dict[str, Any] = {"device": "cpu", "batch_size": batch, "softmax_dtype": lm.softmax_dtype}
    stock = HFLM(lm.model, tokenizer=tiny_tokenizer(), **options)
    stock._device = lm.device  # which is where the weights are, for stock: not where disk keeps them
    return stock


def _loglikelihoods(lm: HFLM, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances(pairs, "loglikelihood"), disable_tqdm=True)


def _same(found: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]]) -> None:
    for (value, greedy), (expected, expected_greedy) in zip(found, wanted, strict=True):
        assert abs(value - expected) <= max(1e-4, 1e-6 * abs(expected)), (value, expected)
        assert greedy == expected_greedy


def _no_worse(found: Any, wanted: Any, exact: Any) -> None:
    """Errors in 16 bits no larger than stock's own, with room for chance."""
    mine, theirs = (
        torch.tensor([abs(value - true) for (value, _), (true, _) in zip(each, exact, strict=True)])
        for each in (found, wanted)
    )
    assert float(mine.mean()) <= 1.2 * float(theirs.mean()), (float(mine.mean()), float(theirs.mean()))
    assert float(mine.max()) <= 1.5 * float(theirs.max())


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _steady(text: str) -> str:
    """A message without what differs from machine to machine: amounts, folders, long tails."""
    text = re.sub(r"/\S*/(\w[\w.-]*)", r"\1", " ".join(text.split()))
    text = re.sub(r"by (at most )?\d[\d.]*(e[+-]?\d+)?( nats)?", "", text)
    return text[:240].rstrip(" .:;")


@contextmanager
def messages(name: str) -> Iterator[list[str]]:
    """What a logger says, at any level."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
