"""Build the embedded demo: generate the corpus, train tokenizer and model, write weights and task data.

    python scripts/build_demo_model.py

writes ``lm_eval_aft/demo/model`` and the data files of ``tasks/aft_demo``. See ``--help`` for the dials and
``demo_corpus.py`` for the world.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from demo_corpus import World, documents, task_docs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
RESIDUAL_SCALE = 1 / 8
END = "<|endoftext|>"
TASKS = ("aft_demo_choice", "aft_demo_math")
SPLITS = {"train": 2600, "test": 1100}
# A digit, a word or a run of marks, each with the space before it; every digit is a token of its own.
PIECES = r" ?[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\n+|\s+"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``texts``: any text round-trips, and the words of the world are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def new_model(vocab_size: int, hidden: int, blocks: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the demo's shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(encoded: list[list[int]], size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ``(input_ids, labels)`` of ``size`` documents of like length, in shuffled order.

    One document per row: a prompt in a task also stands alone at position 0. Padding is to the right,
    where a causal model never looks back from, so no attention mask is needed.
    """
    rng = random.Random(f"batches {seed}")
    while True:
        order = rng.sample(range(len(encoded)), len(encoded))
        groups = []
        for start in range(0, len(order), 64 * size):
            pool = sorted(order[start : start + 64 * size], key=lambda i: len(encoded[i]))
            groups += [pool[k : k + size] for k in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(encoded[i]) for i in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            labels = torch.full((len(group), width), -100)
            for row, i in enumerate(group):
                ids[row, : len(encoded[i])] = labels[row, : len(encoded[i])] = torch.tensor(encoded[i])
            yield ids, labels


def train(
    model: LlamaForCausalLM, encoded: list[list[int]], steps: int, size: int, peak: float, seed: int
) -> float:
    """AdamW with warm-up and cosine decay for a fixed number of ``steps``; returns the final loss."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup, smooth = max(1, steps // 25), math.nan
    model.train()
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for step, (ids, labels) in zip(range(steps), batches(encoded, size, seed), strict=False):
            rate = (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, rate)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{smooth:.3f}")
    model.eval()
    return smooth


def shrink_residual(model: LlamaForCausalLM, scale: float = RESIDUAL_SCALE) -> None:
    """Multiply the residual stream by ``scale`` (a power of two), which changes no output of the model.

    Every reader normalises first, so all writers may shrink together while the final norm makes up for the
    tied head. Trained this fast, the stream grows to entries of 2 to 4; a vector that matters would have
    to be as long, hundreds of steps at an ordinary learning rate. Entries of about 0.3 are common in
    larger models.
    """
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(scale)
            block.mlp.down_proj.weight.mul_(scale)
        model.model.norm.weight.div_(scale)
    model.config.rms_norm_eps *= scale**2
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save bf16 weights under a config that says float32, so that every loader computes in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tasks(world: World, seed: int, folder: Path) -> None:
    """One JSON Lines file per task and split."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for split, count in SPLITS.items():
            rows = task_docs(world, task, split, count, seed)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{task}_{split}.jsonl").write_text(lines)


def replace_files(source: Path, target: Path) -> None:
    """Move every file of ``source`` into ``target``; a broken build thus never leaves half a demo."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        copy = Path(shutil.copyfile(file, target / f".{file.name}.new"))
        copy.chmod(0o644)  # safetensors writes for its owner only
    for file in sorted(source.iterdir()):
        (target / f".{file.name}.new").rename(target / file.name)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--seed", default=0, help="Draws the world, the corpus, the task data and the initial weights.")
@click.option("--documents", "count", default=100_000, help="Corpus size in documents (70 tokens each).")
@click.option(
    "--steps", default=3_200, help="Optimizer steps; a number, not a time, so that slow machines agree."
)
@click.option("--batch", default=32, help="Documents per step.")
@click.option("--lr", default=3e-3, help="Peak learning rate (warm-up 4 %, cosine to zero).")
@click.option("--hidden", default=128, help="Hidden size; the number of entries of a steering vector.")
@click.option("--blocks", default=4, help="Decoder blocks.")
@click.option("--vocab", default=1024, help="Vocabulary size.")
@click.option("--threads", default=1, help="torch threads; more are faster, but sum in another order.")
@click.option("--model-dir", type=click.Path(path_type=Path), default=ROOT / "lm_eval_aft" / "demo" / "model")
@click.option("--tasks-dir", type=click.Path(path_type=Path), default=ROOT / "tasks" / "aft_demo")
@click.option("--data-only", is_flag=True, help="Write the task data and stop: seconds instead of minutes.")
def main(
    seed: int,
    count: int,
    steps: int,
    batch: int,
    lr: float,
    hidden: int,
    blocks: int,
    vocab: int,
    threads: int,
    model_dir: Path,
    tasks_dir: Path,
    data_only: bool,
) -> None:
    """Rebuild the embedded demo model and the data of its tasks from a seed.

    The corpus is made up here, sentence by sentence; nothing is downloaded. Two runs with one seed on one
    machine give the same files; another machine or thread count gives a model of the same abilities.

    \b
    Try the recipe in two minutes, without touching the shipped files:
      python scripts/build_demo_model.py --steps 500 --model-dir /tmp/m --tasks-dir /tmp/t
    """
    torch.set_num_threads(threads)
    world = World(seed)
    with tempfile.TemporaryDirectory() as scratch:
        write_tasks(world, seed, Path(scratch, "tasks"))
        replace_files(Path(scratch, "tasks"), tasks_dir)
        click.echo(f"task data: {tasks_dir}")
        if data_only:
            return
        texts = [text for text, _ in documents(world, count, seed)]
        tokenizer = train_tokenizer(texts[:20_000], vocab)
        encoded = [[*ids, 0] for ids in tokenizer(texts)["input_ids"]]
        model = new_model(len(tokenizer), hidden, blocks, seed)
        size = sum(p.numel() for p in model.parameters())
        click.echo(f"{len(texts):,} documents, {sum(map(len, encoded)):,} tokens; {size:,} parameters")
        loss = train(model, encoded, steps, batch, lr, seed)
        shrink_residual(model)
        write_model(model, tokenizer, Path(scratch, "model"))
        replace_files(Path(scratch, "model"), model_dir)
    click.echo(f"model: {model_dir} (loss {loss:.3f} nats per token)")


if __name__ == "__main__":
    main()
