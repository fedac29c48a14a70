"""``aft vectors push``, ``pull`` and ``compose``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from lm_eval_aft.cli.options import print_table
from lm_eval_aft.errors import AFTError
from lm_eval_aft.library.names import check_name, is_name, printable
from lm_eval_aft.quiet import quiet_libraries

if TYPE_CHECKING:
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.vector import SteeringVector

_SETTINGS = {"help_option_names": ["-h", "--help"]}
library_option = click.option(
    "--library",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the library.  [default: $AFT_LIBRARY, or a folder among your user data]",
)


@click.command("push", context_settings=_SETTINGS)
@library_option
@click.option("--repo", required=True, help="Repository on the Hub: OWNER/NAME.")
@click.option(
    "--as-library", is_flag=True, help="Put a single vector in a folder too, as in a repository of many."
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--revision", help="Branch to push to; made if it is not there.  [default: main]")
@click.option("--message", help="Commit message.")
@click.option("--dry-run", is_flag=True, help="Print what would be uploaded, and ask nobody.")
@click.argument("vectors", nargs=-1, required=True)
def push(
    library: Path | None,
    repo: str,
    as_library: bool,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    vectors: tuple[str, ...],
) -> None:
    """Upload vectors to the Hugging Face Hub.

    VECTORS go there with their model cards, in one commit. One vector becomes the repository
    itself; several become a library, each in its folder CATEGORY/NAME. The training ledger goes
    along: look at the dry run first. The token is that of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      aft vectors push math/word_problems --repo me/pythia-160m-gsm8k --dry-run
      aft vectors push math/word_problems logic/analogy --repo me/vectors --private
    """
    _quiet()
    from lm_eval_aft.library import holds_vector
    from lm_eval_aft.library.files import CARD, copy_vector
    from lm_eval_aft.library.hub import plan_push
    from lm_eval_aft.library.hub import push as upload
    from lm_eval_aft.library.store import Library
    from lm_eval_aft.training.card import write_card
    from lm_eval_aft.vector import SteeringVector

    shelf = Library(library)
    several = as_library or len(vectors) > 1
    with ExitStack() as stack:
        planned = []
        for name in vectors:
            given = Path(name)
            # A folder that holds no vector hides no library name.
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


@click.command("pull", context_settings=_SETTINGS)
@library_option
@click.option("--name", help="Library name for a single vector.  [default: OWNER/NAME or its folder]")
@click.option(
    "--vector", "wanted", multiple=True, help="Only this vector of a library repository; may repeat."
)
@click.option("--revision", help="Branch, tag or commit; the commit it stands for is recorded.")
@click.option("--replace", is_flag=True, help="Replace vectors of these names.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched.")
@click.argument("repo")
def pull(
    library: Path | None,
    name: str | None,
    wanted: tuple[str, ...],
    revision: str | None,
    replace: bool,
    dry_run: bool,
    repo: str,
) -> None:
    """Fetch vectors from the Hugging Face Hub.

    The vectors of REPO, OWNER/NAME, go into the library. Only vectors, cards, ledgers and sweep
    pictures are fetched; everything is checked before it is put in its place, and nothing from the
    repository is ever run. With HF_HUB_OFFLINE=1 what was fetched before is taken from the Hub's
    local cache.

    \b
    Examples:
      aft vectors pull someone/pythia-160m-gsm8k --name math/word_problems
      aft vectors pull someone/vectors --vector math/algebra --revision v1.0
    """
    _quiet()
    from lm_eval_aft.library.hub import pull as download
    from lm_eval_aft.library.remote import choose, look
    from lm_eval_aft.library.store import Library

    remote = look(repo, revision)
    if dry_run:
        rows = [
            (f"{place}/{file}".lstrip("/"), f"{size:,}")
            for place in choose(remote, wanted)
            for file, size in remote.vectors[place].items()
        ]
        print_table(f"Would fetch from {repo} at {remote.commit[:12]}", ("file", "bytes"), rows)
    else:
        pulled = download(
            remote, Library(library), vectors=wanted, name=name, revision=revision, replace=replace
        )
        for each in pulled:
            click.echo(f"Pulled: {each.name} at {each.commit[:12]} in {each.folder}")
    if remote.left_out:
        shown = printable(", ".join(sorted(remote.left_out)[:5]))
        more = f" and {len(remote.left_out) - 5} more" if len(remote.left_out) > 5 else ""
        click.echo(f"Left out, as no vector folder holds such files: {shown}{more}")


@click.command("compose", context_settings=_SETTINGS)
@library_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the new vector.")
@click.option("--name", help="Put the new vector into the library under this name.")
@click.option("--report", is_flag=True, help="Print how far the vectors pull the same way at each layer.")
@click.argument("expression")
def compose(
    library: Path | None, output: Path | None, name: str | None, report: bool, expression: str
) -> None:
    """Add vectors to each other.

    EXPRESSION names them, with their weights. Vectors at one layer are added there, others stay at
    their own layers. Only vectors of one base model can be added. A minus needs a space before it.
    The recipe is kept in the new vector.

    \b
    Examples:
      aft vectors compose "math/algebra*0.7 + logic/analogy*0.3" -o both
      aft vectors compose "style/careful - style/careless" --report
    """
    from lm_eval_aft.library import load_vector
    from lm_eval_aft.library.compose import Operand, combine, conflicts
    from lm_eval_aft.library.expression import parse_expression
    from lm_eval_aft.library.store import Library

    if not (output or name or report):
        raise AFTError("Nothing to do with the sum.", "Give -o FOLDER, --name CATEGORY/NAME or --report.")
    shelf = Library(library)
    _check_places(output, shelf, name)  # both, before either is written
    operands = [Operand(n, w, load_vector(n, shelf)) for n, w in parse_expression(expression).items()]
    vector = combine(operands, expression)
    if report:
        _print_conflicts(conflicts(operands))
    with ExitStack() as stack:
        if name is not None:  # enters the library as the block ends, if the other place could be written
            _write(stack.enter_context(shelf.adding(name)), vector)
        if output is not None:
            _write_whole(output, vector)
    if output is not None:
        click.echo(f"Written: {output}")
    if name is not None:
        click.echo(f"Added: {shelf.root / name}")


def _quiet() -> None:
    quiet_libraries()
    # Its client tells every attempt; we tell how it ended.
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
            ", ".join(f"{norm:.4g}" for norm in row["norms"]),
        )
        for row in found
    ]
    if rows:
        print_table("Pulling together (+1) or apart (-1)", ("layer", "vectors", "cosine", "norms"), rows)
    else:
        click.echo("No two of the vectors share a layer.")


def _check_places(output: Path | None, shelf: Library, name: str | None) -> None:
    if name is not None and os.path.lexists(shelf.root / check_name(name)):
        raise AFTError(f"The library {shelf.root} already has {name!r}.", "Choose another name.")
    if output is None:
        return
    if output.suffix == ".safetensors":
        raise AFTError(f"{output} would be a folder, named like a file.", "Give a name without .safetensors.")
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise AFTError(f"{output} is there already.", "Choose another folder.")


def _write_whole(output: Path, vector: SteeringVector) -> None:
    """Write a vector into a new or an empty folder, whole or not at all."""
    target = output.resolve()
    beside = target if target.is_dir() else target.parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".aft-compose-", dir=beside) as place:
            folder = Path(place) / "vector"
            _write(folder, vector)
            if beside == target:  # may be somebody's working directory: it stays the one it is
                for each in sorted(folder.iterdir()):  # the vector last: a folder that has one is finished
                    each.rename(target / each.name)
            else:
                folder.rename(target)
    except OSError as error:
        raise AFTError(f"Cannot write {output}: {error.strerror}.", "Choose another folder.") from error


def _write(folder: Path, vector: SteeringVector) -> None:
    from lm_eval_aft.training.card import write_card

    folder.mkdir(parents=True, exist_ok=True)
    write_card(folder, vector)
    vector.save(folder)  # last: a folder that has one is finished
