"""Vocabulary-parallel FlashHead, and the testbed that measures output heads.

    import flashhead_dist as fh

    folder = fh.build_index("FOLDER_OF_A_MODEL")          # clusters and calibrates, once
    fh.replace_head(model, folder)                        # model.generate() uses FlashHead
    fh.measure("FOLDER_OF_A_MODEL")                       # a DataFrame: heads, times, bytes, recall

Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashhead_dist.api import build_head, build_index, load_index, measure
    from flashhead_dist.integrations.transformers import replace_head
    from flashhead_dist.parallel import TensorParallel

__version__ = "0.1.0"

__all__ = [
    "TensorParallel", "build_head", "build_index", "load_index", "measure", "replace_head",
]  # fmt: skip

_MODULES = {
    "TensorParallel": "flashhead_dist.parallel",
    "replace_head": "flashhead_dist.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "flashhead_dist.api")), name)
