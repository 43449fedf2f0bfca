"""The functions of `import flashhead_dist as fh`. Examples are run by tests/test_api.py.

A model is named as on a command line: a Hugging Face folder, a .gguf file, a hub id, None for the
built-in default, or `"synthetic:V,D"` for random rows, as in the examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from flashhead_dist import index as indexes
from flashhead_dist.bench.cell import Effort
from flashhead_dist.bench.control import Control
from flashhead_dist.bench.run import Run, RunOptions
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.workload import Request
from flashhead_dist.heads.base import Head
from flashhead_dist.heads.registry import DEFAULT_HEAD, needs_index
from flashhead_dist.heads.registry import build_head as build_registered_head
from flashhead_dist.index import IndexOptions, LoadedShard, ensure_index, load_shard
from flashhead_dist.index.build import default_states
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel

_SYNTHETIC = "synthetic:"
Model = str | Path | None


def build_index(
    model: Model = None, out: str | Path | None = None, *, calibrate: bool = True, **options: Any
) -> Path:
    """Build the index of a model, calibrated on its hidden states over the shipped corpus.

    out: a new folder. None: the model's folder in the cache, where an index that is there already
        is reused.
    calibrate: False for a model without a tokenizer; recall is then lower.
    options: fields of `flashhead_dist.index.IndexOptions`.

    Returns the index's folder.

    Raises:
        UserError: no such model, options that do not fit it, a folder that exists.

    >>> import flashhead_dist as fh
    >>> folder = fh.build_index("synthetic:1000,64", num_groups=8)
    >>> fh.load_index(folder).manifest.num_clusters
    256
    """
    source, chosen = _open(model), IndexOptions(**options)
    if out is None and calibrate:
        return ensure_index(source, chosen)
    if out is None:
        raise UserError("an index without calibration is not cached: name its folder with out=")
    calibration, test = default_states(source, None, True) if calibrate else (None, None)
    return indexes.build_index(source, chosen, calibration=calibration, test=test, out=Path(out))


def load_index(folder: str | Path, tp: TensorParallel | None = None) -> LoadedShard:
    """A rank's part of a stored index: `manifest`, and the tensors in `shard`.

    tp: the rank and its device; None for the whole index on the CPU.

    Raises:
        UserError: no index there, a damaged one, more ranks than probing groups.

    >>> import flashhead_dist as fh
    >>> folder = fh.build_index("synthetic:1000,64", num_groups=8)
    >>> second_of_four = fh.TensorParallel(tp_rank=1, tp_size=4)
    >>> fh.load_index(folder, second_of_four).shard.group_ids.tolist()
    [1, 5]
    """
    tp = tp or TensorParallel.single()
    return load_shard(Path(folder), tp_rank=tp.tp_rank, tp_size=tp.tp_size, device=tp.device)


def build_head(
    name: str = DEFAULT_HEAD,
    model: Model = None,
    index: str | Path | None = None,
    tp: TensorParallel | None = None,
    *,
    num_probes: int | None = None,
    alpha: float | None = None,
) -> Head:
    """One rank of an output head; `head(hidden_states)` gives ids and logits, equal on all ranks.

    index: a folder; None: of a head that needs one, the model's in the cache, built where missing.
    tp: this rank; None for a head on one rank, on the CPU. num_probes, alpha: the index's own.

    Raises:
        UserError: an unknown name, no such model, an index of other weights.

    >>> import torch, flashhead_dist as fh
    >>> head = fh.build_head("flashhead", "synthetic:1000,64")
    >>> head(torch.randn(3, 64), k=2).token_ids.shape
    torch.Size([3, 2])
    """
    source, tp = _open(model), tp or TensorParallel.single()
    folder = Path(index) if index is not None else None
    if folder is None and needs_index(name):
        folder = ensure_index(source)
    return build_registered_head(
        name, tp=tp, model=source, index_dir=folder, device=tp.device, num_probes=num_probes,
        alpha=alpha,
    )  # fmt: skip


def measure(
    model: Model = None,
    heads: Sequence[str] = (),
    index: str | Path | None = None,
    *,
    tp_sizes: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    max_states: int = 1024,
    iterations: int = 40,
) -> pd.DataFrame:
    """Measure heads as launch/scale.py does; a row for each head, tp size and batch size.

    heads: names; the default ones where empty. max_states: test states for recall. iterations: of a
    cell, at most. The ranks of an open process group measure together, each calling this; without
    one it measures this process, as tp size 1. Columns are the keys of a record
    (docs/reference/records.md). Ranks other than the first get no rows.

    Raises:
        UserError: no such model or head, an index of other weights, a tp size beyond the ranks.

    >>> import flashhead_dist as fh
    >>> frame = fh.measure("synthetic:4000,64", ["dense_local_max", "flashhead"], iterations=3)
    >>> frame[["head", "tp_size", "batch_size", "measured"]].to_dict("list")
    {'head': ['dense_local_max', 'flashhead'], 'tp_size': [1, 1], 'batch_size': [1, 1], 'measured': [True, True]}
    >>> bool((frame["median_us"] > 0).all())
    True
    """  # noqa: E501
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    name, synthetic = _named(model)
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(
            request=Request(
                heads=tuple(heads),
                model=name,
                synthetic=synthetic,
                index=Path(index) if index is not None else None,
                max_states=max_states,
            ),
            tp_sizes=list(tp_sizes or [ranks]),
            batch_sizes=list(batch_sizes),
            num_probes=None,
            alpha=None,
            escalation=None,
            effort=Effort(iterations=iterations),
            threads_per_rank=torch.get_num_threads(),
            device=None,
            remeasure=False,
            runs_dir=Path(folder),
            plots=False,
            given={},
        )
        run = Run(options, ranks)
        run.measure(Control(_store(), rank, range(ranks)), lambda *_: None, rank, ranks)
        assert run.sweep is not None
        return pd.DataFrame([asdict(record) for record in run.sweep.records])


def _store() -> Store:
    if not dist.is_initialized():
        return HashStore()
    return PrefixStore("flashhead-measure", dist.distributed_c10d._get_default_store())


def _named(model: Model) -> tuple[str | None, str | None]:
    """What `open_model` calls model and synthetic."""
    text = None if model is None else str(model)
    if text is not None and text.startswith(_SYNTHETIC):
        return None, text.removeprefix(_SYNTHETIC)
    return text, None


def _open(model: Model) -> ModelSource:
    name, synthetic = _named(model)
    return open_model(name, synthetic=synthetic)
