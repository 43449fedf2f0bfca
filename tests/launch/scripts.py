"""A script of launch/ as a module, to call its functions and patch what it uses."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.launch.ground import LAUNCH


def load_script(name: str) -> ModuleType:
    """Import launch/NAME.py anew. What it imports beside it must be on `sys.path`."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", LAUNCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their annotations up there.
    spec.loader.exec_module(module)
    return module
