"""``aft doctor``."""

from __future__ import annotations

import json
import time

import click

from lm_eval_aft.errors import AFTError
from lm_eval_aft.quiet import quiet_libraries


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--family", "families", multiple=True, help="Only this family; may repeat. Default: all.")
@click.option("--device", default="cpu", show_default=True, help="Where the tiny models run, e.g. cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of text.")
@click.pass_context
def doctor(context: click.Context, families: tuple[str, ...], device: str, as_json: bool) -> None:
    """Say what is installed, and whether steering gives the right answers with it.

    Prints versions, devices, how lm-eval comes to know `--model aft`, and which private names of other
    libraries are not as this version needs them. Then a tiny random model of each common family is scored and
    generates, plain and steered, and every answer is compared with passes that use no cache. Nothing is
    downloaded; it takes about a minute on one core.

    \b
    fast ways  how questions were scored: prefixed and packed read a context once, trimmed computes
               logits where they are needed, resumed starts at the vector's layer
    right      the same answers as the plain passes
    slower     a fast way was not taken, and why
    refused    an error says that it cannot be done
    WRONG      another answer: do not trust scores or texts of this kind with these versions

    The exit code is 1 where an answer is wrong (or a part broke down), else 0: a slower way is no fault.
    Paste the output into a bug report.

    \b
    Examples:
      aft doctor
      aft doctor --family llama --device cuda
      aft doctor --json > doctor.json
    """
    quiet_libraries()
    from lm_eval_aft.doctor.facts import devices
    from lm_eval_aft.doctor.families import FAMILIES
    from lm_eval_aft.doctor.report import examine

    for family in families:
        if family not in FAMILIES:
            raise AFTError(f"--family {family!r} is not known.", f"Use one of: {', '.join(FAMILIES)}.")
    if device.partition(":")[0] not in devices():
        raise AFTError(f"There is no device {device!r} here.", f"Use one of: {', '.join(devices())}.")
    began = time.monotonic()

    def progress(what: str) -> None:
        click.echo(f"{time.monotonic() - began:5.1f} s  {what}", err=True)

    report = examine(families, device, progress)
    progress("done")
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    context.exit(1 if report.bad else 0)
