"""The command `escalation` of evaluate.py: its options, its run and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.escalation import escalation_points
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.index import load_manifest
from flashhead_dist.index.calibrate import write_escalation
from flashhead_dist.parallel import TensorParallel
from options import Checked, IndexedSyntheticModel, Positive, Switch, TableOutput, Value, text_table

_EVERY = "all"
_HEADINGS = (
    "probes", "then", "margin <", "escalated, %", "misses caught, %", "bytes, %", "top-1, %",
    "worst, %", "source",
)  # fmt: skip


@dataclass(kw_only=True)
class _Rounds(Checked):
    """Both rounds, and the thresholds between them."""

    num_probes: Value[list[int] | None] = None
    """clusters probed in the first round (default: the index's)"""
    then: Value[list[str]] = field(default_factory=lambda: [_EVERY])
    """clusters probed in the second round; all: every token"""
    shares: Value[list[float]] = field(
        default_factory=lambda: [0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    )
    """share of calibration states below the threshold; 0: no second round"""
    max_states: Positive[int | None] = None
    """test states (default: all)"""
    write: Switch = False
    """write the one threshold of this run into the index, for flashhead_escalate: give one of
    --num-probes, --then and --shares each"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.then:
            if text != _EVERY and not text.isdecimal():
                raise UserError(f"--then {text} is no number of clusters: give one, or {_EVERY}")
        if self.write and (len(self.num_probes or [0]) != 1 or len(self.then) != 1):
            raise UserError("--write keeps one threshold: give one --num-probes and one --then")
        if self.write and (len(self.shares) != 1 or self.shares[0] == 0):
            raise UserError("--write keeps one threshold: give one of --shares, above 0")


@dataclass(kw_only=True)
class EscalationCommand:
    """What flashhead_escalate costs and gains, by its threshold.

    Rows whose margin (best candidate's logit less the best unprobed cluster's score) lies below a
    threshold take a second round. For each threshold: the share of test states that do, mean bytes
    read, and top-1 agreement with the dense head.
    """

    source: IndexedSyntheticModel
    rounds: _Rounds
    output: TableOutput

    def run(self) -> dict[str, Any]:
        """Measure; raises UserError for what cannot be used."""
        rounds = self.rounds
        model = self.source.open()
        index = self.source.index_folder(model)
        assert index is not None
        manifest = load_manifest(index)
        if rounds.write and rounds.num_probes not in (None, [manifest.num_probes]):
            raise UserError(
                f"--write keeps a threshold for the index's own {manifest.num_probes} probes: "
                f"leave --num-probes out"
            )
        calibration, test = self.source.collected_states(model)
        if rounds.max_states is not None:
            # Every n-th state, because states of one source follow one another.
            test = test.subset(torch.arange(0, len(test), -(-len(test) // rounds.max_states)))
        points = escalation_points(
            HeadBuilder(tp=TensorParallel.single(), model=model, index_dir=index),
            calibration,
            test,
            dense_truth(model, test.states),
            num_probes=rounds.num_probes or [manifest.num_probes],
            second_probes=[None if text == _EVERY else int(text) for text in rounds.then],
            shares=rounds.shares,
        )
        rows = [asdict(point) for point in points]
        if rounds.write:
            manifest = write_escalation(
                index,
                margin=points[0].margin,
                second_probes=points[0].second_probes,
                share=points[0].escalated_share,
            )
        self.output.write_csv(rows, float_format="")
        return {
            "model": model.name,
            "synthetic": model.synthetic,
            "index_hash": manifest.index_hash,
            "hidden_states": test.origin,
            "num_states": len(test),
            # JSON has no infinity.
            "points": [
                row | {"margin": None if row["asked_share"] == 0 else row["margin"]} for row in rows
            ],
        }

    def show(self, document: dict[str, Any]) -> list[Table]:
        """The document as a table."""
        rows = [
            [
                str(point["num_probes"]),
                str(point["second_probes"] or _EVERY),
                "never" if point["margin"] is None else f"{point['margin']:.2f}",
                f"{100 * point['escalated_share']:.2f}",
                "" if point["caught"] is None else f"{100 * point['caught']:.0f}",
                f"{100 * point['bytes_share']:.2f}",
                f"{100 * point['top1_agreement']:.3f}",
                f"{100 * point['top1_agreement_worst_source']:.2f}",
                point["worst_source"],
            ]
            for point in document["points"]
        ]
        title = f"flashhead_escalate against the dense head of {document['model']}"
        caption = f"{document['num_states']} hidden states: {document['hidden_states']}"
        return [text_table(_HEADINGS, rows, title=title, caption=caption)]
