"""``aft vectors``: keep, find and check the vectors of a library."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.vector_listing import as_json_text, cells, print_columns, result_text
from lm_eval_aft.cli.vectors_share import compose, library_option, pull, push
from lm_eval_aft.cli.vectors_train import train_set
from lm_eval_aft.errors import AFTError
from lm_eval_aft.library.names import printable
from lm_eval_aft.quiet import quiet_libraries

if TYPE_CHECKING:
    from lm_eval_aft.library.entry import Entry
    from lm_eval_aft.library.store import Library

_SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group("vectors", context_settings=_SETTINGS)
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


@vectors.command("list", context_settings=_SETTINGS)
@library_option
@click.option("--base-model", help="Only vectors for this model; * and ? allowed, as in 'pythia-*'.")
@click.option("--task", help="Only vectors trained on this task; * and ? allowed.")
@click.option("--category", help="Only this category; * and ? allowed.")
@click.option("--fits", "model", help="Only vectors that fit this model: reads its config and tokenizer.")
@click.option("--weights", is_flag=True, help="With --fits: load the model and compare the weights too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every field.")
def list_vectors(
    library: Path | None,
    base_model: str | None,
    task: str | None,
    category: str | None,
    model: str | None,
    weights: bool,
    as_json: bool,
) -> None:
    """List the library's vectors.

    `selection` is the change against the baseline on the selection split, cross-entropy in nats,
    which is what the vector was chosen by: it is not a result. `evaluation` holds the results of the
    vector's card, in percentage points with their 95 % interval (`aft report --card` fills the card).

    \b
    Examples:
      aft vectors list --task 'arc*'
      aft vectors list --fits EleutherAI/pythia-160m --json
    """
    from lm_eval_aft.library.store import Library

    if weights and not model:
        raise AFTError("--weights compares with a model.", "Name it with --fits MODEL.")
    shelf = Library(library)
    everything = shelf.entries()
    found = [entry for entry in everything if entry.matches(base_model, task, category)]
    if model:
        found = _fitting(shelf, found, model, weights)
    if as_json:
        click.echo(as_json_text([entry.to_dict() for entry in found]))
        return
    if not found:
        what = "is empty" if not everything else f"has {len(everything)} vectors, none of that kind"
        click.echo(f"The library {shelf.root} {what}.")
        return
    columns = ("name", "width", "layers", "task", "base model", "selection", "evaluation", "made")
    print_columns(columns, [cells(entry) for entry in found])
    click.echo(f"{len(found)} {'vector' if len(found) == 1 else 'vectors'} in {shelf.root}")


@vectors.command("show", context_settings=_SETTINGS)
@library_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the fields and the whole header.")
@click.argument("name")
def show(library: Path | None, as_json: bool, name: str) -> None:
    """Show one vector, NAME as `aft vectors list` prints it.

    \b
    Example:
      aft vectors show math/word_problems
    """
    from lm_eval_aft.library.files import SOURCE
    from lm_eval_aft.library.header import FILE_NAME, read_header
    from lm_eval_aft.library.store import Library

    shelf = Library(library)
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
        elif isinstance(value, dict):
            value = ", ".join(
                f"{k} {v:+.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
            )
        elif isinstance(value, tuple):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            click.echo(f"{key.replace('_', ' '):>18}  {printable(str(value))}")


@vectors.command("add", context_settings=_SETTINGS)
@library_option
@click.option("--name", required=True, help="What to call it: CATEGORY/NAME, as in math/word_problems.")
@click.option("--replace", is_flag=True, help="Replace a vector of that name.")
@click.argument("vector", type=click.Path(path_type=Path))
def add(library: Path | None, name: str, replace: bool, vector: Path) -> None:
    """Copy a vector into the library.

    VECTOR is a vector folder or a .safetensors file. It is checked first, and appears whole or not
    at all; several processes may add at once.

    \b
    Examples:
      aft vectors add runs/gsm8k --name math/word_problems
      aft vectors add v.safetensors --library ./shared --name math/v2 --replace
    """
    from lm_eval_aft.library.store import Library

    folder = Library(library).add(vector, name, replace=replace)
    click.echo(f"Added: {folder}")


@vectors.command("remove", context_settings=_SETTINGS)
@library_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.argument("names", nargs=-1, required=True)
def remove(library: Path | None, yes: bool, names: tuple[str, ...]) -> None:
    """Delete vectors from the library, files and all.

    \b
    Example:
      aft vectors remove math/old math/older --yes
    """
    from lm_eval_aft.library.store import Library

    shelf = Library(library)
    folders = [shelf.path(name) for name in names]  # all must be there before the first goes
    if not yes:
        click.confirm(f"Delete {', '.join(map(str, folders))}?", abort=True)
    for name in names:
        shelf.remove(name)
        click.echo(f"Removed: {name}")


@vectors.command("verify", context_settings=_SETTINGS)
@library_option
@click.argument("names", nargs=-1)
def verify(library: Path | None, names: tuple[str, ...]) -> None:
    """Check every file of vectors.

    Of the named vectors, or of all: readable, finite numbers, and as they were pulled. Exits with 1
    if one is damaged.

    \b
    Example:
      aft vectors verify math/word_problems
    """
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.library.verify import damage

    shelf = Library(library)
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


@vectors.command("routes", context_settings=_SETTINGS)
@click.argument("table", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--text", help="Say where this request would go.")
def routes(table: Path | None, text: str | None) -> None:
    """Print or check a keyword table.

    Without TABLE prints the one that comes with the package; TABLE, your own, is checked.

    \b
    Examples:
      aft vectors routes > mine.yaml
      aft vectors routes mine.yaml --text "How many apples are left?"
    """
    from lm_eval_aft.library.route import default_table, parse_keyword_table, read_table

    content = read_table(table) if table else default_table()
    router = parse_keyword_table(content)
    if text is not None:
        click.echo(router.route(text) or "none")
    elif table:
        click.echo(f"{len(router.rules)} rules; vectors or categories: {', '.join(router.targets())}")
    else:
        click.echo(content, nl=False)


for _command in (push, pull, compose, train_set):
    vectors.add_command(_command)


def _fitting(shelf: Library, entries: Sequence[Entry], model: str, weights: bool) -> list[Entry]:
    quiet_libraries()
    from lm_eval_aft.demo import resolve_pretrained
    from lm_eval_aft.library.fits import identify, misfits
    from lm_eval_aft.library.header import FILE_NAME, read_header

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
            "Config and tokenizer compared, weights not: --weights tells fine-tuned copies apart.", err=True
        )
    return found
