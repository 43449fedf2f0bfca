"""A tuning run: its inputs, what is computed once, and every measurement as soon as it is done.

The dense head's answers are cached with the model; the tree and the journal are in the run's
folder. A run that ends early resumes where it ended. The setting that is chosen becomes an index of
its own (`build_default`) or new probes and alpha of an existing one (`apply_default`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.index.build import BuildInputs, build_from, read_weights
from flashhead_dist.index.cluster import cluster_space, cluster_tokens, second_moment
from flashhead_dist.index.options import HeadIndexError, IndexOptions
from flashhead_dist.index.store import IndexManifest, change_manifest, load_manifest
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.models.cache import publish
from flashhead_dist.states import HiddenStates, collect_hidden_states, synthetic_hidden_states
from flashhead_dist.states.split import (
    Document,
    HoldOut,
    Parts,
    divide,
    parse_hold_out,
    read_texts,
    set_aside,
    shipped_texts,
)
from flashhead_dist.tune.front import Record, Target
from flashhead_dist.tune.settings import Family, SearchSpace, Setting
from flashhead_dist.tune.simulate import Simulator, TuningData, join, measure_family
from flashhead_kernels.cpu_threads import compute_threads

NOTE = "tuning"
"""Key of the evidence for a choice in a manifest's calibration."""
_JOURNAL_VERSION = 3
"""Of what measurements mean: raise it where they are made otherwise."""
_INPUTS = "inputs"
_SKIPPED = "skipped"
_TREE_NAME = "tree.safetensors"


@dataclass(frozen=True)
class Inputs:
    """A model, the calibration and test states, the texts they are of, and how to cluster.

    hold_out: texts that only report. choose_by: texts that calibrate nothing and choose.
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

    A synthetic model has synthetic states and no texts. choose_by: names among the texts that are
    not held out.

    Raises:
        UserError: a model, texts or a hold-out that do not exist.
    """
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
    options = IndexOptions(num_groups=num_groups)
    return Inputs(model, calibration, test, documents, held, choosing, options)


@dataclass(frozen=True)
class Prepared:
    """The data of all simulations, the parts of states that it holds, and the tree's rounds."""

    data: TuningData
    parts: Parts
    rounds: int


def prepare(inputs: Inputs, folder: Path, threads: int) -> Prepared:
    """Everything that is computed once. folder: holds the tree.

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
    weights = read_weights(model)
    moment = second_moment(parts.calibration.states)
    slots, rounds = _tree(weights, options, moment, folder)
    states, ranges = join(parts)
    data = TuningData(
        weights=weights,
        slots=slots,
        vectors=cluster_space(weights, moment, options.metric_exponent),
        moment=moment,
        num_groups=options.num_groups,
        states=states,
        top_tokens=divide(calibration, test, *apart).order(*truths),
        calibration=ranges[0],
        selection=ranges[1],
        held_out=ranges[2] if len(ranges) > 2 else None,
    )
    return Prepared(data, parts, rounds)


def _tree(
    weights: Tensor, options: IndexOptions, moment: Tensor, folder: Path
) -> tuple[Tensor, int]:
    """Slots `[C, S]` and refinement rounds, from `folder` where it has them."""
    path = folder / _TREE_NAME
    if path.exists():
        stored = load_file(path)
        return stored["slots"], int(stored["rounds"])
    # One thread: sums over several are added in another order, and a tree depends on the last bit.
    with compute_threads(1):
        slots, rounds = cluster_tokens(weights, options, moment=moment, visible=True)
    tensors = {"slots": slots.contiguous(), "rounds": torch.tensor(rounds)}
    publish(path, lambda temporary: save_file(tensors, temporary))
    return slots, rounds


class Journal:
    """Finished measurements by name in a file of JSON lines, so that a run can resume.

    The first line names the inputs. A line without its newline is what a killed run left; it is
    cut.
    """

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        """Open or begin `path`; inputs: what the measurements are of, JSON-ready.

        Raises:
            UserError: the file holds measurements of other inputs, is damaged, or cannot be
                written.
        """
        self._path = path
        self._entries: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = path.read_bytes() if path.exists() else b""
            complete = stored[: stored.rfind(b"\n") + 1]
            if complete != stored:
                os.truncate(path, len(complete))
            entries = self._parse(complete)
            if not entries:
                self._append(_INPUTS, inputs)
            elif entries.get(_INPUTS) != json.loads(json.dumps(inputs)):
                raise UserError(
                    f"{path} holds measurements of other states, weights or options: give another "
                    "--out, or delete it"
                )
            self._entries |= {name: entry for name, entry in entries.items() if name != _INPUTS}
        except OSError as error:
            raise self._unwritable(error) from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def add(self, name: str, entry: Any) -> None:
        """Store a finished measurement; it is on the disk when this returns."""
        try:
            self._append(name, entry)
        except OSError as error:
            raise self._unwritable(error) from error
        self._entries[name] = entry

    def _append(self, name: str, entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, entry]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, stored: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(line) for line in stored.splitlines())
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}): delete it, or give another --out"
            ) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written ({error.strerror}): give another --out")


def open_journal(folder: Path, inputs: Inputs, *, quick: bool) -> Journal:
    """The journal of `folder`; UserError where it is of other inputs."""
    digest = hashlib.sha256()
    for part in (inputs.calibration, inputs.test):
        digest.update(str((len(part), part.origin, part.counts())).encode())
    described = {
        "version": _JOURNAL_VERSION,
        "weight_hash": inputs.model.weight_hash,
        "states": digest.hexdigest(),
        "held_out": list(inputs.hold_out.names),
        "choose_by": list(inputs.choose_by.names),
        "options": inputs.options.fingerprint(),
        "quick": quick,
    }
    return Journal(folder / "journal.jsonl", described)


def simulate_all(
    data: TuningData,
    families: Sequence[Family],
    space: SearchSpace,
    frequent: Sequence[int],
    journal: Journal,
    threads: int,
    on_family: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Records of every family, from `journal` where it has them.

    frequent: token ids of the tokenizer, most frequent first. A family whose clusters do not divide
    evenly is left out.
    """
    simulator = Simulator(data)
    records: list[Record] = []
    with compute_threads(threads):
        for family in families:
            on_family(family.key)
            if family.key not in journal:
                entry: dict[str, Any]
                try:
                    entry = {"points": measure_family(simulator, family, space, frequent)}
                except ValueError as error:
                    entry = {_SKIPPED: str(error)}
                journal.add(family.key, entry)
            records += journal[family.key].get("points", [])
    return records


def frequent_of(model: ModelSource, count: int) -> list[int]:
    """Up to `count` frequent tokens of the model's tokenizer; none where it has none."""
    if not count or model.tokenizer_loader is None:
        return []
    return frequent_tokens(model.tokenizer_loader(), count, model.vocab_size)


def frequent_tokens(tokenizer: Any, count: int, vocab_size: int) -> list[int]:
    """Up to `count` token ids, in the order of their frequency in the tokenizer's training texts.

    A merge of a byte-pair encoding comes the earlier the more frequent its result was, so tokens
    come in the order of the merge that makes them (Sennrich et al.,
    https://arxiv.org/abs/1508.07909); characters, which no merge makes, after them by id. A
    tokenizer without merges gives its tokens in the order of their ids, which is that of its
    training. Special tokens are left out: they are pinned anyway.
    """
    special = set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = [] if backend is None else json.loads(backend.to_str())["model"].get("merges") or []
    made: list[int] = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        token = vocabulary.get(left + right)
        if token is not None:
            made.append(token)
    ordered = dict.fromkeys((*made, *sorted(vocabulary.values())))
    return [t for t in ordered if t not in special and 0 <= t < vocab_size][:count]


def evidence(chosen: Record, target: Target, inputs: Inputs, num_settings: int) -> dict[str, Any]:
    """For the manifest, under NOTE: the target, the setting, and what it was found to do."""
    return {
        NOTE: {
            "target": str(target),
            "chosen": chosen,
            "num_points": num_settings,
            "held_out": list(inputs.hold_out.names),
            "choose_by": list(inputs.choose_by.names),
            "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
    }


def build_default(
    chosen: Record,
    notes: dict[str, Any],
    prepared: Prepared,
    model: ModelSource,
    frequent: Sequence[int],
    out: Path,
    *,
    replace_existing: bool = False,
) -> Path:
    """Build the index of `chosen` in `out`, of the clusters that were simulated.

    Its calibration states are those of the run, and its fidelity is that on the held-out states
    where there are any, else on the selection states.

    Raises:
        HeadIndexError: a setting that no head runs, or an `out` that cannot be written.
    """
    setting, data, parts = Setting.of_record(chosen), prepared.data, prepared.parts
    if setting.row_bits != 16:
        raise HeadIndexError(
            f"{chosen['family']} with int8 rows is only simulated: choose among the settings that "
            "the head runs, without --simulated"
        )
    options = setting.index_options(
        data.shape,
        alpha=setting.alpha,
        num_probes=setting.probes_per_group * data.num_groups,
        learned_pins_per_group=-(-setting.learned_pins // data.num_groups),
        pinned_token_ids=tuple(sorted(frequent[: setting.frequent_pins])),
    )
    inputs = BuildInputs(
        parts.calibration,
        parts.held_out or parts.selection,
        clusters=(data.clusters(options), prepared.rounds),
        notes=notes,
    )
    return build_from(model, options, inputs, out, replace_existing=replace_existing)


def fitting(records: Sequence[Record], path: Path) -> list[Record]:
    """The records that the index `path` becomes by other probes and another alpha only.

    Raises:
        HeadIndexError: there is none, or no index.
    """
    manifest = load_manifest(path)
    found = [record for record in records if _fits(record, manifest)]
    if not found:
        raise HeadIndexError(
            f"{path} has clusters, centroids or pinned tokens that none of the {len(records)} "
            "settings has: build an index of the choice with --build"
        )
    return found


def _fits(record: Record, manifest: IndexManifest) -> bool:
    same = all(
        record[name] == value
        for name, value in {
            "cluster_size": manifest.cluster_size,
            "centroid_bits": manifest.bits,
            "group_size": manifest.group_size,
            "centroid_columns": manifest.centroid_columns or manifest.hidden_size,
            "row_bits": 16,
            "frequent_pins": 0,
        }.items()
    )
    learned = manifest.calibration.get("learned_pinned_token_ids", [])
    return same and bool(record["learned_pins"]) == bool(learned)


def apply_default(path: Path, chosen: Record, notes: dict[str, Any]) -> IndexManifest:
    """Write probes, alpha and the evidence into the manifest of the index `path`.

    Raises:
        HeadIndexError: an index that the setting does not fit, or that cannot be written.
    """
    manifest = load_manifest(path)
    # Margins are of the probes and the alpha that they were calibrated with.
    lasting = {name: item for name, item in manifest.calibration.items() if name != "escalation"}
    return change_manifest(
        path,
        num_probes=chosen["probes_per_group"] * manifest.num_groups,
        alpha=chosen["alpha"],
        calibration={**lasting, **notes},
        # Measured with other probes, on other states.
        fidelity={},
    )
