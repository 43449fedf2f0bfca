"""The command `robustness` of evaluate.py: its options, its run and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.robustness import robustness_specs, try_head
from flashhead_dist.index import IndexOptions
from flashhead_dist.progress import progress
from flashhead_kernels.cpu_threads import compute_threads
from options import Checked, Positive, TableOutput, ThreadOptions, Value, text_table

_HIDDEN_SIZE = 256
_NAMES = tuple(spec.name for spec in robustness_specs())


@dataclass(kw_only=True)
class _Cases(Checked):
    """Which synthetic heads, and their indexes."""

    cases: Value[list[str] | None] = None
    """names of heads (default: all)"""
    divisor: Positive[int] = 4
    """of the vocabulary; 1 is full size and takes some minutes a head"""
    hidden_size: Positive[int | None] = None
    """hidden size (default: 256, or the model's own with --divisor 1)"""
    states: Positive[int] = 500
    """test states a source"""
    groups: Value[int] = 128
    """probing groups"""
    num_probes: Value[int | None] = None
    """clusters probed (default: 1 row in 32)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.cases or ():
            if name not in _NAMES:
                raise UserError(f"there is no head named {name!r}: choose from {', '.join(_NAMES)}")


@dataclass(kw_only=True)
class RobustnessCommand:
    """Indexes of synthetic heads: other models' shapes, unusual rows (docs/results/robustness.md).

    Output embeddings follow published figures of Llama-3 and Qwen-3, with uneven vocabularies,
    huge, equal and all-zero rows. For each, the default index's fidelity on synthetic states, its
    balance, and whether ids are equal at every tp size. Indexes are cached.
    """

    heads: _Cases
    threads: ThreadOptions
    output: TableOutput

    def run(self) -> dict[str, Any]:
        """Measure; raises UserError for what cannot be used."""
        heads = self.heads
        size = heads.hidden_size or (None if heads.divisor == 1 else _HIDDEN_SIZE)
        by_name = {spec.name: spec for spec in robustness_specs(heads.divisor, size)}
        specs = [by_name[name] for name in heads.cases or by_name]
        options = IndexOptions(num_groups=heads.groups, num_probes=heads.num_probes)
        for spec in specs:
            options.check(spec.vocab_size, spec.hidden_size)
        trials: list[dict[str, Any]] = []
        with (
            compute_threads(self.threads.count),
            progress("", total=len(specs), unit="heads") as advance,
        ):
            for spec in specs:
                advance.stage(f"{spec.name}, {spec.vocab_size:,} x {spec.hidden_size}")
                trials.append(asdict(try_head(spec, options=options, num_states=heads.states)))
                self.output.write_csv(trials)
        return {"divisor": heads.divisor, "trials": trials}

    def show(self, document: dict[str, Any]) -> list[Table]:
        """The document as a table."""
        rows = []
        for trial in document["trials"]:
            work = trial["work_max_over_mean"]
            fewest, most = trial["tokens_a_cluster"]
            rows.append(
                [
                    trial["name"],
                    f"{trial['vocab_size']:,} x {trial['hidden_size']}",
                    f"{100 * trial['bytes_share']:.1f}",
                    f"{100 * trial['top1_logit']:.2f} ({100 * trial['top1_token']:.2f})",
                    f"{100 * trial['worst_top1_logit']:.2f} {trial['worst_source']}",
                    f"{fewest} to {most}, {trial['num_pads']}",
                    ", ".join(f"{work[size]:.3f}" for size in (2, 3, 5, 8) if size in work),
                    _ranges(trial["equal_tp_sizes"]),
                ]
            )
        headings = ("head", "V x D", "bytes, %", "top-1, %", "worst source, %", "tokens, pads",
                    "work at tp 2, 3, 5, 8", "equal ids at tp")  # fmt: skip
        caption = (
            "top-1: the head's best logit equals the dense head's (in brackets: the token too, "
            "where equal rows tie); tokens: fewest and most in a cluster; work: bytes that the "
            "busiest of tp ranks reads over the mean"
        )
        title = "Synthetic heads and their default indexes"
        return [text_table(headings, rows, title=title, caption=caption)]


def _ranges(sizes: list[int]) -> str:
    if sizes and sizes == list(range(sizes[0], sizes[-1] + 1)):
        return f"{sizes[0]} to {sizes[-1]}"
    return ", ".join(map(str, sizes)) or "none"
