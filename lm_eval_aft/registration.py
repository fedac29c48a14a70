"""Makes ``lm_eval --model aft`` work in a stock lm-eval.

Harness releases fill their model table in ``lm_eval.models`` and ask nobody else. So a start-up file in
site-packages calls :func:`install` in every new interpreter: it waits for exactly that module to be
imported, adds one lazy entry once the table is filled, and goes away. Waiting for ``lm_eval.api.registry``
instead would break ``hf``: the harness fills the table only while it is empty.

This module runs whenever Python starts, so it imports nothing but ``sys`` and never lets an error out.
"""

import sys

TYPE_CHECKING = False  # typing is too slow for this module; checkers know the name
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["MODEL_NAME", "TARGET", "install", "register"]

MODEL_NAME = "aft"
# The harness replaces a lazy entry by its class only when the entry reads exactly `module:ClassName`.
TARGET = "lm_eval_aft.lm:AFTLM"

_HOOKED_MODULE = "lm_eval.models"


def install() -> None:
    """Register now if the harness has its model table, else as soon as it has. Idempotent, never raises."""
    try:
        if _HOOKED_MODULE in sys.modules:
            register()
        elif not any(_is_hook(finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _ModelsHook())
    except Exception:
        pass


def register() -> None:
    """Add the lazy entry ``aft`` to the harness's model table unless the name is taken. Never raises."""
    try:
        registry = sys.modules["lm_eval.api.registry"].model_registry
        if MODEL_NAME not in registry:
            registry.register(MODEL_NAME, target=TARGET)
    except Exception:
        pass


class _ModelsHook:
    """A finder that finds nothing itself: it lets the real loader of ``lm_eval.models`` report back."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname != _HOOKED_MODULE or self._asking:
            return None
        # Another tool may hook the same module the same way: while we ask it, we must not answer it.
        self._asking = True
        try:
            spec = _spec_of_others(self, fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._watch(spec.loader)
            return spec
        except Exception:
            return None
        finally:
            self._asking = False

    def _watch(self, loader: "Loader") -> None:
        # Shadowing one method on this instance keeps the loader's type, so that inspect, pkgutil and
        # importlib.resources see an ordinary module.
        if isinstance(loader, type) or "exec_module" in vars(loader):
            return
        run = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            run(module)
            if module.__name__ == _HOOKED_MODULE:  # zip files share one loader between modules
                self._finish(loader)

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def _finish(self, loader: "Loader") -> None:
        register()
        try:
            vars(loader).pop("exec_module", None)
            sys.meta_path.remove(self)
        except Exception:
            pass


def _spec_of_others(
    hook: _ModelsHook, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
) -> "ModuleSpec | None":
    for finder in list(sys.meta_path):
        find = None if finder is hook else getattr(finder, "find_spec", None)
        spec = find(fullname, path, target) if find is not None else None
        if spec is not None:
            return spec  # type: ignore[no-any-return]
    return None


def _is_hook(finder: object) -> bool:
    # By name: a reloaded or second copy of this module has a class of its own.
    kind = type(finder)
    return (kind.__module__, kind.__qualname__) == (_ModelsHook.__module__, _ModelsHook.__qualname__)
