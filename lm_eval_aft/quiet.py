"""Other libraries' notices, kept out of our output."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Keep other libraries' notices and progress bars out of our output; call before heavy imports."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("lm_eval", "datasets", "transformers", "accelerate", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lm_eval_aft").setLevel(logging.INFO)
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
