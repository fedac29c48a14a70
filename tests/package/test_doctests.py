"""The ``>>>`` examples in the package's docstrings, run as a reader would run them."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import lm_eval_aft

MODULES = sorted(found.name for found in pkgutil.walk_packages(lm_eval_aft.__path__, "lm_eval_aft."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_are_right(name: str) -> None:
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not failed
    # One that doctest does not find, inside a decorated function for instance, would never be wrong.
    source = inspect.getsource(module)
    assert tried == source.count(">>> ") - source.count("# doctest: +SKIP")
