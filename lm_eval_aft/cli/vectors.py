"""``aft vectors``: list, show, add, remove, verify, share, compose and train the vectors of a library."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing, exclusive_dir
from lm_eval_aft._util.process import Terminated, quiet_libraries, terminable
from lm_eval_aft.cli.options import ended, offline_option, parse_model_args, print_table
from lm_eval_aft.library.files import is_name, printable
from lm_eval_aft.steering.vector_file import norm_text

if TYPE_CHECKING:
    from lm_eval_aft.library.entry import Entry
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.studies.train_set import TrainSet


def _library(_context: click.Context, _parameter: click.Parameter, folder: Path | None) -> Library:
    from lm_eval_aft.library.store import Library

    return Library(folder)


library_option = click.option(
    "--library",
    "shelf",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_library,
    help="Folder of the library.  [default: $AFT_LIBRARY, or a folder among your user data]",
)


@click.group("vectors")
def vectors() -> None:
    """A library of vectors: keep, find, check, share and add them.

    A library is a folder of vector folders, CATEGORY/NAME. Every command that takes a vector takes a
    name from the library, a path, a Hub id, or an expression.

    \b
    Examples:
      aft vectors add runs/gsm8k --name math/word_problems
      aft vectors list --category math
      aft vectors compose "math/word_problems*0.7 + logic/analogy*0.3" -o both
      aft vectors train-set scripts/studies/library.yaml --model M --dry-run
      aft eval --model M --vector math/word_problems --tasks gsm8k --output results
    """


@vectors.command("push")
@library_option
@click.option("--repo", required=True, help="Repository on the Hub: OWNER/NAME.")
@click.option(
    "--as-library", is_flag=True, help="Put even a single vector into a folder, as in a repository of many."
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--revision", help="Branch to push to, created if necessary.  [default: main]")
@click.option("--message", help="Commit message.")
@click.option("--dry-run", is_flag=True, help="Print what would be uploaded; no network.")
@click.argument("vectors", nargs=-1, required=True)
def push(
    shelf: Library,
    repo: str,
    as_library: bool,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    vectors: tuple[str, ...],
) -> None:
    """Upload vectors to the Hugging Face Hub.

    VECTORS are uploaded with their model cards in one commit. One vector becomes the repository
    itself; several become a library, each in its folder CATEGORY/NAME. The training ledger is
    included: look at the dry run first. The token is that of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      aft vectors push math/word_problems --repo me/pythia-160m-gsm8k --dry-run
      aft vectors push math/word_problems logic/analogy --repo me/vectors --private
    """
    _quiet()
    from lm_eval_aft.library.files import CARD, copy_vector
    from lm_eval_aft.library.hub import plan_push
    from lm_eval_aft.library.hub import push as upload
    from lm_eval_aft.library.load import holds_vector
    from lm_eval_aft.steering.vector import SteeringVector
    from lm_eval_aft.training.artifacts import write_card

    several = as_library or len(vectors) > 1
    with ExitStack() as stack:
        planned = []
        for name in vectors:
            given = Path(name)
            # A folder without a vector does not hide a library name.
            is_path = holds_vector(given) or (given.exists() and not is_name(name))
            folder = given if is_path else shelf.path(name)
            place = _place(name, folder) if several else ""
            # A copy, so that what was checked is what is sent.
            copy = Path(stack.enter_context(TemporaryDirectory(prefix="aft-push-")))
            copy_vector(folder, copy)
            if not (copy / CARD).exists():
                write_card(copy, SteeringVector.load(copy))
            planned.append((copy, place))
        places = [place for _, place in planned]
        if several and (len(set(places)) < len(places) or not all(is_name(place) for place in places)):
            raise AFTError(
                f"The folders in the repository would be {', '.join(places)}.",
                "Add the vectors to a library first: their names there are the folders' names.",
            )
        uploads = plan_push(planned, repo)
        rows = [(each.path, f"{each.size:,}") for each in uploads]
        if dry_run:
            total = sum(each.size for each in uploads)
            visible = "private" if private else "public"
            title = f"Would upload to {repo} ({visible} if new), branch {revision or 'main'}: {total:,} bytes"
            print_table(title, ("file", "bytes"), rows)
            return
        address = upload(uploads, repo, private=private, revision=revision, message=message)
    click.echo(f"Pushed {len(uploads)} files: {address}")


@vectors.command("pull")
@library_option
@click.option("--name", help="Library name for a single vector.  [default: OWNER/NAME or its folder]")
@click.option(
    "--vector", "wanted", multiple=True, help="Only this vector of a library repository; may repeat."
)
@click.option("--revision", help="Branch, tag or commit; its commit is recorded.")
@click.option("--replace", is_flag=True, help="Replace vectors of these names.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched.")
@click.argument("repo")
def pull(
    shelf: Library,
    name: str | None,
    wanted: tuple[str, ...],
    revision: str | None,
    replace: bool,
    dry_run: bool,
    repo: str,
) -> None:
    """Fetch vectors from the Hugging Face Hub.

    The vectors of REPO, OWNER/NAME, go into the library. Only vectors, cards, ledgers and sweep
    plots are fetched; everything is checked before it is added, and nothing from the repository is
    ever run. With HF_HUB_OFFLINE=1, earlier downloads are taken from the Hub's local cache.

    \b
    Examples:
      aft vectors pull someone/pythia-160m-gsm8k --name math/word_problems
      aft vectors pull someone/vectors --vector math/algebra --revision v1.0
    """
    _quiet()
    from lm_eval_aft.library.hub import choose, look
    from lm_eval_aft.library.hub import pull as download

    remote = look(repo, revision)
    if dry_run:
        rows = [
            (f"{place}/{file}".lstrip("/"), f"{size:,}")
            for place in choose(remote, wanted)
            for file, size in remote.vectors[place].items()
        ]
        print_table(f"Would fetch from {repo} at {remote.commit[:12]}", ("file", "bytes"), rows)
    else:
        pulled = download(remote, shelf, vectors=wanted, name=name, revision=revision, replace=replace)
        for each in pulled:
            click.echo(f"Pulled: {each.name} at {each.commit[:12]} in {each.folder}")
    if remote.left_out:
        shown = printable(", ".join(sorted(remote.left_out)[:5]))
        more = f" and {len(remote.left_out) - 5} more" if len(remote.left_out) > 5 else ""
        click.echo(f"Left out, as no vector folder holds such files: {shown}{more}")


@vectors.command("compose")
@library_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the new vector.")
@click.option("--name", help="Put the new vector into the library under this name.")
@click.option("--report", is_flag=True, help="Print the cosine similarity of the vectors at each layer.")
@click.argument("expression")
def compose(shelf: Library, output: Path | None, name: str | None, report: bool, expression: str) -> None:
    """Add vectors to each other.

    EXPRESSION names them with their weights. They are added layer by layer. Only vectors of one base
    model can be added. A minus needs a space before it. The new vector records the expression.

    \b
    Examples:
      aft vectors compose "math/algebra*0.7 + logic/analogy*0.3" -o both
      aft vectors compose "style/careful - style/careless" --report
    """
    from lm_eval_aft.library.compose import Operand, combine, conflicts
    from lm_eval_aft.library.load import load_vector, parse_expression

    if not (output or name or report):
        raise AFTError("Nothing to do with the sum.", "Give -o FOLDER, --name CATEGORY/NAME or --report.")
    operands = [Operand(n, w, load_vector(n, shelf)) for n, w in parse_expression(expression).items()]
    vector = combine(operands, expression)
    if report:
        _print_conflicts(conflicts(operands))
    with ExitStack() as stack:
        if name is not None:  # added to the library at the end of the block, once -o could be written
            _write(stack.enter_context(shelf.adding(name)), vector)
        if output is not None:
            _write_whole(output, vector)
    if output is not None:
        click.echo(f"Written: {output}")
    if name is not None:
        click.echo(f"Added: {shelf.root / name}")


def _quiet() -> None:
    quiet_libraries()
    # Its client logs every attempt; we report the outcome.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _place(name: str, folder: Path) -> str:
    """Where a vector goes in a repository of many: by its library name, or by its last two folders."""
    own = folder.stem if folder.suffix == ".safetensors" else folder.resolve().name
    return name if is_name(name) else f"{folder.resolve().parent.name}/{own}"


def _print_conflicts(found: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            str(row["layer"]),
            f"{row['one']} with {row['other']}",
            "–" if row["cosine"] is None else f"{row['cosine']:+.4f}",
            ", ".join(map(norm_text, row["norms"], row["shares"])),
        )
        for row in found
    ]
    if rows:
        print_table("Pulling together (+1) or apart (-1)", ("layer", "vectors", "cosine", "norms"), rows)
    else:
        click.echo("No two of the vectors share a layer.")


def _write_whole(output: Path, vector: SteeringVector) -> None:
    """Write a vector into a new or an empty folder, whole or not at all."""
    if output.suffix == ".safetensors":
        raise AFTError(f"{output} names a file; a folder is written.", "Give a name without .safetensors.")
    target = output.resolve()
    empty = target.is_dir() and not any(
        target.iterdir()
    )  # perhaps somebody's working directory: it is not replaced
    with appearing(target / ".aft-compose" if empty else target) as folder:
        _write(folder, vector)
    if empty:
        for each in sorted((target / ".aft-compose").iterdir()):  # the vector last: then it is complete
            each.rename(target / each.name)
        (target / ".aft-compose").rmdir()


def _write(folder: Path, vector: SteeringVector) -> None:
    from lm_eval_aft.training.artifacts import write_card

    folder.mkdir(parents=True, exist_ok=True)
    write_card(folder, vector)
    vector.save(folder)  # last: a folder that has one is complete


@vectors.command("train-set")
@offline_option
@click.argument("study", type=click.Path(path_type=Path, dir_okay=False))
@library_option
@click.option("--model", help="Hub name or local folder of the base model.  [default: the study's]")
@click.option("--resume", is_flag=True, help="Continue an earlier run.")
@click.option("--dry-run", is_flag=True, help="Print the plan; train nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents per task in the cross-scores.")
@click.option("--no-scores", is_flag=True, help="Train only; no cross-scores.")
@click.option(
    "--batch-size", default="16", show_default=True, help="Of the cross-scores, as lm-eval takes it."
)
@click.option("--device", help="cuda, cuda:1, cpu, ...  [default: cuda where there is one]")
@click.option("--dtype", help="float32, bfloat16, float16.  [default: as `aft train` and `aft eval`]")
@click.option("--model-args", help="Further arguments of lm-eval's hf model: revision=...")
def train_set(
    study: Path,
    shelf: Library,
    model: str | None,
    resume: bool,
    dry_run: bool,
    limit: int | None,
    no_scores: bool,
    batch_size: str,
    device: str | None,
    dtype: str | None,
    model_args: str | None,
) -> None:
    """Train every vector of a study file into a library, then score each on each task.

    STUDY is a YAML file: `vectors` maps CATEGORY/NAME to a task, or to a mapping with the task and any
    setting of `aft train` (protocol, seeds, train_docs, ...; limit for its scores); `defaults` holds
    for all; `unavailable` says what is missing for others. A vector is trained on its task's training
    split and scored on the evaluation splits; scores are written to the library as cross-scores.md
    and .json. After Ctrl-C or a crash, --resume continues.

    \b
    Examples:
      aft vectors train-set scripts/studies/library.yaml --model EleutherAI/pythia-160m \\
          --library lib --dry-run
      aft vectors train-set mine.yaml --model demo --library lib --limit 200
      aft vectors train-set mine.yaml --model demo --library lib --limit 200 --resume

    \b
    A study:
      defaults: {protocol: rapid, train_docs: 50}
      vectors:
        math/word_problems: gsm8k
        logic/analogy: {task: arc_challenge, protocol: adaptive, seeds: 3}
      scores: {limit: 200}
    """
    quiet_libraries()
    from lm_eval_aft.studies.config import read_library_study
    from lm_eval_aft.studies.train_set import TrainSet

    plan = read_library_study(study)
    base = model or plan.model
    if base is None:
        raise AFTError(f"The study {study} names no model.", "Give one with --model.")
    arguments = parse_model_args(model_args, device=device, dtype=dtype)
    job = TrainSet(plan, shelf, base, arguments)
    if dry_run:
        _print_plan(job)
        return
    if not resume:
        job.check_fresh()
    try:
        with terminable(), exclusive_dir(job.folder):
            failed = job.train(say=click.echo)
            for name, needs in plan.unavailable.items():
                click.echo(f"{name}: not trainable. {needs}")
            if not no_scores and len(failed) < len(plan.entries):
                _score(job, limit, arguments, batch_size)
    except (KeyboardInterrupt, Terminated) as end:
        ended(end)
    if failed:
        raise AFTError(
            f"{len(failed)} of {len(plan.entries)} vectors were not trained: {', '.join(failed)}.",
            "The reasons are above; fix them and continue with --resume.",
        )


def _score(job: TrainSet, limit: int | None, arguments: dict[str, Any], batch_size: str) -> None:
    """Score every vector on every task, and print and write the table."""
    from lm_eval_aft.studies.train_set import CROSS_SCORES, CROSS_SCORES_NOTE, cross_score, cross_score_table

    flags = ["--batch_size", batch_size]
    rows = cross_score(
        job.study, job.library, job.model, limit=limit, model_args=arguments, flags=flags, say=click.echo
    )
    columns, lines = cross_score_table(rows)
    print_table("Cross-scores", columns, lines)
    click.echo(f"{CROSS_SCORES_NOTE}\nWritten: {job.library.root / CROSS_SCORES}.md and .json")


def _print_plan(job: TrainSet) -> None:
    rows = []
    for standing in job.statuses():
        entry, plan = standing.entry, standing.entry.plan()
        changed = {
            k: v for k, v in entry.settings.items() if k not in ("protocol", "include_path", "prompts")
        }
        settings = ", ".join(f"{key}={value}" for key, value in changed.items()) or "–"
        rows.append((entry.name, entry.task, plan.protocol.name, settings, standing.state))
    columns = ("vector", "task", "protocol", "settings", "state")
    print_table(f"Plan for {job.model} (nothing was trained)", columns, rows)
    for name, needs in job.study.unavailable.items():
        click.echo(f"{name}: not trainable. {needs}")


@vectors.command("list")
@library_option
@click.option("--base-model", help="Only vectors for this model; * and ? allowed, as in 'pythia-*'.")
@click.option("--task", help="Only vectors trained on this task; * and ? allowed.")
@click.option("--category", help="Only this category; * and ? allowed.")
@click.option("--fits", "model", help="Only vectors that fit this model; reads its config and tokenizer.")
@click.option("--weights", is_flag=True, help="With --fits: load the model and compare the weights too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every field.")
def list_vectors(
    shelf: Library,
    base_model: str | None,
    task: str | None,
    category: str | None,
    model: str | None,
    weights: bool,
    as_json: bool,
) -> None:
    """List the library's vectors.

    `norm` is the vector's, as a share of the median norm of the hidden states at its layer.
    `selection` is the change against the baseline on the selection split, cross-entropy in nats,
    which the vector was chosen by: it is not a result. `evaluation` holds the results of the
    vector's card, in percentage points with their 95 % interval (`aft report --card` fills the card).

    \b
    Examples:
      aft vectors list --task 'arc*'
      aft vectors list --fits EleutherAI/pythia-160m --json
    """

    if weights and not model:
        raise AFTError("--weights compares with a model.", "Name it with --fits MODEL.")
    everything = shelf.entries()
    found = [entry for entry in everything if entry.matches(base_model, task, category)]
    if model:
        found = _fitting(shelf, found, model, weights)
    if as_json:
        click.echo(as_json_text([entry.to_dict() for entry in found]))
        return
    if not found:
        what = "is empty" if not everything else f"has {len(everything)} vectors, none of which match"
        click.echo(f"The library {shelf.root} {what}.")
        return
    columns = ("name", "width", "layers", "norm", "task", "base model", "selection", "evaluation", "made")
    print_columns(columns, [cells(entry) for entry in found])
    click.echo(f"{len(found)} {'vector' if len(found) == 1 else 'vectors'} in {shelf.root}")


@vectors.command("show")
@library_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the fields and the whole header.")
@click.argument("name")
def show(shelf: Library, as_json: bool, name: str) -> None:
    """Show one vector, NAME as `aft vectors list` prints it.

    \b
    Example:
      aft vectors show math/word_problems
    """
    from lm_eval_aft.library.files import SOURCE
    from lm_eval_aft.steering.vector_file import FILE_NAME, read_header

    folder, entry = shelf.path(name), shelf.entry(name)
    if entry.error:
        raise AFTError(entry.error, "`aft vectors remove` deletes it.")
    source = folder / SOURCE
    fields: dict[str, Any] = {"folder": str(folder), **entry.to_dict()}
    if source.is_file() and not source.is_symlink():
        try:
            record = json.loads(source.read_text(encoding="utf-8"))
            fields["source"] = {k: record[k] for k in ("repo", "vector", "commit", "pulled")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            fields["source"] = "damaged"
    if as_json:
        fields["metadata"] = read_header(folder / FILE_NAME).metadata
        click.echo(as_json_text(fields))
        return
    for key, value in fields.items():
        if key == "results":
            value = "; ".join(f"{result_text(r)} (n = {r['n']}, {r['verdict']})" for r in entry.results)
        elif key == "share" and value is not None:
            key, value = "norm", f"{100 * value:.3g} % of the median residual norm"
        elif isinstance(value, dict):
            value = ", ".join(
                f"{k} {v:+.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
            )
        elif isinstance(value, tuple):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            click.echo(f"{key.replace('_', ' '):>18}  {printable(str(value))}")


@vectors.command("add")
@library_option
@click.option("--name", required=True, help="What to call it: CATEGORY/NAME, as in math/word_problems.")
@click.option("--replace", is_flag=True, help="Replace a vector of that name.")
@click.argument("vector", type=click.Path(path_type=Path))
def add(shelf: Library, name: str, replace: bool, vector: Path) -> None:
    """Copy a vector into the library.

    VECTOR is a vector folder or a .safetensors file. It is checked first and added as a whole or not
    at all; several processes may add at once.

    \b
    Examples:
      aft vectors add runs/gsm8k --name math/word_problems
      aft vectors add v.safetensors --library ./shared --name math/v2 --replace
    """

    folder = shelf.add(vector, name, replace=replace)
    click.echo(f"Added: {folder}")


@vectors.command("remove")
@library_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("names", nargs=-1, required=True)
def remove(shelf: Library, yes: bool, names: tuple[str, ...]) -> None:
    """Delete vectors from the library, files and all.

    \b
    Example:
      aft vectors remove math/old math/older --yes
    """

    folders = [shelf.path(name) for name in names]  # all must exist before the first is deleted
    if not yes:
        click.confirm(f"Delete {', '.join(map(str, folders))}?", abort=True)
    for name in names:
        shelf.remove(name)
        click.echo(f"Removed: {name}")


@vectors.command("verify")
@library_option
@click.argument("names", nargs=-1)
def verify(shelf: Library, names: tuple[str, ...]) -> None:
    """Check every file of the named vectors, or of all.

    Files must be readable and unchanged since they were pulled, numbers finite. Exits with 1 if a
    vector is damaged.

    \b
    Example:
      aft vectors verify math/word_problems
    """
    from lm_eval_aft.library.files import damage

    if not shelf.root.is_dir():
        raise AFTError(f"There is no library {shelf.root}.", "Name one with --library or AFT_LIBRARY.")
    checked = list(names) or shelf.names()
    bad = 0
    for name in checked:
        found = damage(shelf.path(name))
        bad += bool(found)
        for each in found:
            click.echo(f"{name}: {printable(each)}")
    if bad:
        raise AFTError(f"{bad} of {len(checked)} vectors are damaged.", "Add or pull them again.")
    click.echo(f"{len(checked)} vectors, all sound.")


@vectors.command("routes")
@click.argument("table", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--text", help="Print the vector that this request would get.")
def routes(table: Path | None, text: str | None) -> None:
    """Print or check a keyword table.

    A router looks at a document's own question: few-shot examples and instructions do not count.
    Without TABLE, prints the one that comes with the package; your own TABLE is checked.

    \b
    Examples:
      aft vectors routes > mine.yaml
      aft vectors routes mine.yaml --text "How many apples are left?"
    """
    from lm_eval_aft.library.routers import default_table, parse_keyword_table, read_table

    content = read_table(table) if table else default_table()
    router = parse_keyword_table(content)
    if text is not None:
        click.echo(router.route(text) or "none")
    elif table:
        click.echo(f"{len(router.rules)} rules; vectors or categories: {', '.join(router.targets())}")
    else:
        click.echo(content, nl=False)


def _fitting(shelf: Library, entries: Sequence[Entry], model: str, weights: bool) -> list[Entry]:
    quiet_libraries()
    from lm_eval_aft.demo import resolve_pretrained
    from lm_eval_aft.library.entry import identify, misfits
    from lm_eval_aft.steering.vector_file import FILE_NAME, read_header

    identity = identify(resolve_pretrained(model), weights=weights)
    found, reasons = [], Counter[str]()
    for entry in entries:
        if entry.error:
            differing = ["damaged"]
        elif entry.hidden_size != identity.hidden_size:
            differing = ["hidden size"]
        else:
            differing = misfits(read_header(shelf.path(entry.name) / FILE_NAME), identity)
        if differing:
            reasons[differing[0]] += 1
        else:
            found.append(entry)
    if reasons:
        told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        click.echo(f"Do not fit: {told}.", err=True)
    if not identity.weights:
        click.echo(
            "Only config and tokenizer were compared; --weights tells fine-tuned copies apart.", err=True
        )
    return found


def cells(entry: Entry) -> list[str]:
    """The columns of one row of `aft vectors list`."""
    if entry.error:
        return [entry.name, "damaged", *["–"] * 7]
    change = entry.selection.get("score")
    model = (entry.base_model or "–").rstrip("/").rpartition("/")[2]
    task = ", ".join(entry.tasks) or "–"
    made = (entry.created or "–")[:10]
    version = entry.versions.get("lm-eval-aft")
    return [
        entry.name,
        str(entry.hidden_size),
        ", ".join(map(str, entry.layers)),
        "–" if entry.share is None else f"{100 * entry.share:.3g} %",
        f"{task} (placebo: {entry.control})" if entry.control else task,
        model,
        "–" if change is None else f"{change:+.4f}",
        "; ".join(result_text(row) for row in entry.results[:3]) or "–",
        f"{made}, {version}" if version else made,
    ]


def print_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain columns: a rich table of a thousand rows takes longer than reading the library."""
    lines = [columns, *(list(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def as_json_text(value: Any) -> str:
    """JSON that is safe for a terminal: everything unprintable but the line breaks is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def result_text(row: dict[str, str]) -> str:
    """A row of a card's results table in one line."""
    return f"{row['task']} {row['metric']} {row['difference']} {row['95 % interval']}"
