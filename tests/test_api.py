"""The public API: its documented examples run, and importing the package loads nothing heavy."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashhead_dist as fh


@pytest.mark.parametrize("name", fh.__all__)
def test_the_example_of_each_function_gives_what_it_shows(own_cache: Path, name: str) -> None:
    if find_spec("deepspeed"):  # it writes a line to stdout when it is first used
        import_module("deepspeed.accelerator").get_accelerator()
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(fh, name), name)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_importing_the_package_is_cheap() -> None:
    heavy = ["numba", "triton", "transformers", "pandas", "torch"]
    code = f"import sys, flashhead_dist; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such"):
        fh.no_such  # noqa: B018
