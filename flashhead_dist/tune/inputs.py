"""What a tuning run starts from: a model, its states, and which texts are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from flashhead_dist.index.options import IndexOptions
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import (
    HiddenStates,
    collect_hidden_states,
    synthetic_hidden_states,
)
from flashhead_dist.states.hold_out import HoldOut, parse_hold_out
from flashhead_dist.states.texts import Document, read_texts, shipped_texts
from flashhead_dist.tune.journal import Journal
from flashhead_dist.tune.pins import frequent_tokens

_VERSION = 3
"""Of what a journal's measurements mean: raise it where they are made otherwise."""


@dataclass(frozen=True)
class Inputs:
    """A model, the calibration and test states, the texts they are of, and how to cluster.

    hold_out: texts that do nothing but report. choose_by: texts that calibrate nothing and choose.
    options: of the tree: cluster size, groups, metric, seed.
    """

    model: ModelSource
    calibration: HiddenStates
    test: HiddenStates
    documents: list[Document]
    hold_out: HoldOut
    choose_by: HoldOut
    options: IndexOptions


def gather(
    model_name: str | None,
    synthetic: str | None,
    texts: Path | None,
    hold_out: str,
    choose_by: str,
    num_groups: int,
) -> Inputs:
    """Open the model and collect states, of the shipped corpus where `texts` is None.

    A made-up model has made-up states and no texts. choose_by: of the texts that are not held out,
    those that calibrate nothing and choose.

    Raises:
        UserError: a model, texts or a hold-out that is not there.
    """
    options = IndexOptions(num_groups=num_groups)
    documents: list[Document] = []
    if synthetic is None:
        documents = shipped_texts() if texts is None else read_texts(texts)
    held = parse_hold_out(hold_out, documents)
    choosing = parse_hold_out(
        choose_by,
        [d for d in documents if d.source not in held.sources and d.data_set not in held.data_sets],
    )
    model = open_model(model_name, synthetic=synthetic)
    if model.synthetic:
        calibration, test = synthetic_hidden_states(model)
    else:
        calibration, test = collect_hidden_states(model, texts)
    return Inputs(model, calibration, test, documents, held, choosing, options)


def open_journal(folder: Path, inputs: Inputs, *, quick: bool) -> Journal:
    """The journal of `folder`; UserError where it is of other inputs."""
    digest = hashlib.sha256()
    for part in (inputs.calibration, inputs.test):
        digest.update(str((len(part), part.origin, part.counts())).encode())
    described = {
        "version": _VERSION,
        "weight_hash": inputs.model.weight_hash,
        "states": digest.hexdigest(),
        "held_out": list(inputs.hold_out.names),
        "choose_by": list(inputs.choose_by.names),
        "options": inputs.options.fingerprint(),
        "quick": quick,
    }
    return Journal(folder / "journal.jsonl", described)


def frequent_of(model: ModelSource, count: int) -> list[int]:
    """Up to `count` frequent tokens of the model's tokenizer; none where it has none."""
    if not count or model.tokenizer_loader is None:
        return []
    return frequent_tokens(model.tokenizer_loader(), count, model.vocab_size)
