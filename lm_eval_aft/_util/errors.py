"""The one error class users meet."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

import click


class AFTError(click.ClickException):
    """Bad input, reported in one message: what happened, why, and what to do.

    Click commands print it without a traceback and exit with code 1; Python callers catch it
    like any exception.

    Args:
        what: one sentence saying what happened and why.
        hint: one sentence saying what to do about it, or ``""``.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint

    @property
    def one_line(self) -> str:
        """Both sentences on one line, for ledgers and lists."""
        return f"{self.what} {self.hint}".strip()


def model_not_loaded(name: object, error: Exception) -> AFTError:
    """The error to raise when transformers cannot load a model (its name, or the model itself)."""
    told = repr(name) if isinstance(name, str) else type(name).__name__
    if "trust_remote_code" in str(error):
        return AFTError(
            f"The model {told} brings code of its own, which is not run unless you allow it.",
            "Read that code; if you trust it, give trust_remote_code=true among the model arguments.",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    hint = "Give a local folder written by save_pretrained, or the name of a model on the Hub."
    if "Unrecognized configuration class" in reason:
        reason = "transformers has no causal language model for this kind of checkpoint."
        hint = "From Python, load it with a class of its own and pass the model itself as pretrained."
    if isinstance(error, ImportError) and "gguf" in str(error).lower():
        reason, hint = "GGUF files need the gguf package.", "Install it: pip install 'lm-eval-aft[gguf]'"
    return AFTError(f"The model {told} cannot be loaded: {reason}", hint)


def not_finite_cause(dtype: str, coefficient: float | None = None) -> str:
    """What makes a model's answers NaN or infinite, and what to do about it.

    Args:
        coefficient: of the vector that steers the model; ``None`` where none does.
    """
    smaller = "" if coefficient is None else f", or a weaker vector (its coefficient is {coefficient:g})"
    if dtype == "float16":
        return f"float16 holds no number above 65,504. Use bfloat16 or float32{smaller}."
    if coefficient is None:
        return f"the model itself gives them in {dtype}. Check its weights, and try float32."
    return f"the vector is too large for this model in {dtype}. Use{smaller.removeprefix(', or')}."


def print_errors_plainly() -> None:
    """Let an uncaught ``AFTError`` end another program with its message alone.

    The stock ``lm_eval`` command has no handler of its own: a wrong vector path would print forty lines of
    traceback before the one line that helps. May be called again.
    """
    if getattr(sys.excepthook, "_aft", False):
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, AFTError):
            error.show()
        else:
            previous(kind, error, trace)

    hook._aft = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def refuse_pickle(source: Path, start: bytes) -> None:
    """Raise `AFTError` if a file that should be safetensors is a pickle or a torch.save archive.

    Args:
        start: its first nine bytes. A safetensors file begins with the length of its header in
            eight bytes, of any value, and the header's ``{``.
    """
    if start[8:9] != b"{" and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise AFTError(
            f"{source} is a pickle or a torch.save archive, whatever its name says.",
            "Pickles can run code, so they are never opened: ask for the vector as safetensors.",
        )
