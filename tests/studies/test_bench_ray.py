"""The same study on Ray workers: the same vectors, whoever dies and wherever the disks are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_eval_aft.studies.config import read_bench_study
from lm_eval_aft.studies.jobs import Session, Store
from lm_eval_aft.studies.ray import Ray, RayOptions
from lm_eval_aft.studies.runner import Local, run_study

# Ray is an extra, and gives its own processes 30 seconds to start, which a busy machine may not keep.
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
SETTINGS: dict[str, Any] = {"device": "cpu", "batch_size": "8", "data": None}
RECIPE = {
    "protocol": "maximum", "layers": "1", "train_docs": 8, "selection_docs": 12, "epochs": 2,
    "lr": 1e-2, "l2": 0, "batch_size": 4, "retries": 0, "regression": False,
}  # fmt: skip
# A worker that loads the task's documents for the first time dies of it.
DYING = """
import os, signal
from pathlib import Path
flag = Path({flag!r})
def documents(found):
    if flag.exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return found
"""


@pytest.fixture
def study(tmp_path: Path, toy_tasks: Callable[..., str]) -> Path:
    pytest.importorskip("ray")
    folder = Path(toy_tasks())
    (folder / "utils.py").write_text(DYING.format(flag=str(tmp_path / "die")))
    task = folder / "toy_choice.yaml"
    task.write_text(task.read_text() + "process_docs: !function utils.documents\n")
    path = tmp_path / "study.yaml"
    content = {"models": ["demo"], "tasks": ["toy_choice", "toy_generate"], "methods": ["static"], "seeds": 2}
    evaluation = {"limit": 8, "batch_size": 8}
    path.write_text(
        yaml.safe_dump({**content, "recipe": RECIPE, "evaluation": evaluation, "include_path": str(folder)})
    )
    return path


def lines(store: Store, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (store.root / "ledger.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


def test_two_workers_one_of_which_dies_and_two_nodes_give_the_vectors_of_one_process(
    study: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    plan = read_bench_study(study)
    alone, two, nodes = (Store(tmp_path / name) for name in ("alone", "two", "nodes"))
    run_study(plan, study, alone, Local(Session(alone, **SETTINGS)))
    whole = (alone.root / "report.csv").read_bytes()

    (tmp_path / "die").touch()
    run_study(plan, study, two, Ray(two, SETTINGS, RayOptions(workers=2)))
    assert not (tmp_path / "die").exists()  # somebody died
    assert (two.root / "report.csv").read_bytes() == whole
    assert len(lines(two, "cell")) == 4
    assert not lines(two, "failed")
    assert len({line["worker"] for line in (*lines(two, "cell"), *lines(two, "baseline"))}) >= 2

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        apart = RayOptions(address=cluster.address, shared=False)  # as if each node had its own disk
        run_study(plan, study, nodes, Ray(nodes, SETTINGS, apart))
    finally:
        cluster.shutdown()
    assert (nodes.root / "report.csv").read_bytes() == whole
    assert len({line["worker"] for line in (*lines(nodes, "cell"), *lines(nodes, "baseline"))}) == 2
    for cell in lines(alone, "cell"):
        name = "vector.safetensors"
        folders = {path.parent.name for path in (nodes.root / "vectors").rglob(name)}
        assert folders == {path.parent.name for path in (alone.root / "vectors").rglob(name)}, cell["name"]
    run_study(plan, study, nodes, Ray(nodes, SETTINGS, RayOptions()), resume=True)  # nothing is left
    assert len(lines(nodes, "cell")) == 4
