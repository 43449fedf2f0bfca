"""From a model and texts to a scene: the dense head's answers, a tree of clusters, parts of states.

All of it is kept: the dense head's answers in the cache, the tree in the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.index.cluster import cluster_tokens
from flashhead_dist.index.metric import cluster_space, second_moment
from flashhead_dist.index.options import IndexOptions
from flashhead_dist.index.progress import Report
from flashhead_dist.models import ModelSource
from flashhead_dist.models.cache import publish
from flashhead_dist.states.hold_out import Parts, divide, set_aside
from flashhead_dist.tune.inputs import Inputs
from flashhead_dist.tune.scene import Scene, join
from flashhead_kernels.cpu_threads import compute_threads

_READ_ROWS = 1 << 14
_TREE_NAME = "tree.safetensors"


@dataclass(frozen=True)
class Prepared:
    """A scene, the parts of states that it holds, and the refinement rounds of its tree."""

    scene: Scene
    parts: Parts
    rounds: int


def prepare(inputs: Inputs, folder: Path, report: Report, threads: int) -> Prepared:
    """Everything that is computed once. folder: keeps the tree.

    Raises:
        UserError: options that do not fit the model, nothing left to calibrate by, or a folder that
            cannot be written.
    """
    model, options = inputs.model, inputs.options
    calibration, test = inputs.calibration, inputs.test
    options.check(model.vocab_size, model.hidden_size)
    apart = (inputs.documents, inputs.hold_out, inputs.choose_by)
    parts = set_aside(calibration, test, *apart)
    with compute_threads(threads):
        truths = [dense_truth(model, part.states).token_ids for part in (calibration, test)]
    report("Dense head", 1.0)
    weights = _read(model, report)
    moment = second_moment(parts.calibration.states)
    tree, rounds = _tree(weights, options, moment, folder, report)
    states, places = join(parts)
    scene = Scene(
        weights=weights,
        slots=tree,
        vectors=cluster_space(weights, moment, options.metric_exponent),
        moment=moment,
        num_groups=options.num_groups,
        states=states,
        top_tokens=divide(calibration, test, *apart).order(*truths),
        calibration=places[0],
        selection=places[1],
        held_out=places[2],
    )
    return Prepared(scene, parts, rounds)


def _read(model: ModelSource, report: Report) -> Tensor:
    weights = torch.empty(model.vocab_size, model.hidden_size, dtype=model.dtype)
    for start in range(0, model.vocab_size, _READ_ROWS):
        stop = min(start + _READ_ROWS, model.vocab_size)
        weights[start:stop] = model.read_rows(start, stop)
    report("Reading the output embedding", 1.0)
    return weights


def _tree(
    weights: Tensor, options: IndexOptions, moment: Tensor, folder: Path, report: Report
) -> tuple[Tensor, int]:
    """Slots `[C, S]` and refinement rounds, from `folder` where they are there already."""
    path = folder / _TREE_NAME
    if path.exists():
        stored = load_file(path)
        return stored["slots"], int(stored["rounds"])
    # One thread: sums over several are added in another order, and a tree turns on the last bit.
    with compute_threads(1):
        slots, rounds = cluster_tokens(weights, options, moment=moment, report=report)
    tensors = {"slots": slots.contiguous(), "rounds": torch.tensor(rounds)}
    publish(path, lambda temporary: save_file(tensors, temporary))
    return slots, rounds
