"""The same training in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lm_eval_aft import SteeringVector, load_vector

# On a machine without GPUs this starts two processes that compute on the CPU.
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def by_one_and_by_two(
    arguments: Sequence[str], folder: Path, exactly: bool = True
) -> tuple[SteeringVector, SteeringVector]:
    """The vectors of ``train-vector ARGUMENTS``: in ``folder/one`` by one process, ``folder/two`` by two.

    Args:
        exactly: both are to be the same to the last bit.
    """
    for name, launcher in (("one", [sys.executable]), ("two", LAUNCH)):
        done = subprocess.run(
            [*launcher, "-m", "lm_eval_aft.cli.train", *arguments, "--output", str(folder / name)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_vector(folder / name) for name in ("one", "two"))
    assert (one.metadata["processes"], two.metadata["processes"]) == (1, 2)
    assert not exactly or two.digest() == one.digest()
    return one, two
