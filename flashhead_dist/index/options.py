"""What the builder of an index may choose, and what the choices mean for V and D."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from flashhead_dist.errors import UserError

Method = Literal["bisect", "faiss"]
CentroidKind = Literal["mean", "unit_norm"]
CLUSTER_SIZES = (1, 2, 4, 8, 16, 32, 64)
CENTROID_BITS = (4, 8, 16)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PROBED_SHARE = 32
"""By default one row in this many is a candidate."""
_SEEDS = 2**31 - 1
_MOST_GROUPS = 1 << 16


class HeadIndexError(UserError):
    """An index cannot be built, stored, read or used."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Choices of an index; frozen and hashable, so that a cache can be keyed by them."""

    cluster_size: int = 4
    """Tokens a cluster, S: a power of two from 1 to 64."""
    centroid_bits: int = 4
    """4 or 8 (integers with a bfloat16 scale per `group_size` columns) or 16 (bfloat16)."""
    group_size: int = 64
    """Columns that share a scale."""
    centroid_columns: int | None = None
    """Columns that a stored centroid keeps, of the axes in which hidden states tell clusters apart
    (`index.layout`); whole groups of them, integers only. None: all D, as they are."""
    num_groups: int = 128
    """Probing groups, G: the greatest tp_size that can use the index."""
    pinned_token_ids: tuple[int, ...] = ()
    """Tokens that every step scores, whatever is probed."""
    learned_pins_per_group: int = 1
    """At most this many tokens a group are pinned because the calibration states miss them."""
    pin_special_tokens: bool = True
    """Also pin the tokenizer's named special tokens (unknown, end of text, ...). Texts that
    calibrate hold none of them, and in others one that is missed is missed again and again."""
    method: Method = "bisect"
    """Clustering: balanced bisection with refinement, or faiss k-means."""
    centroid_kind: CentroidKind = "mean"
    """`mean` of the rows, or `unit_norm`: the mean of unit-normed rows, normalised."""
    alpha: float | None = None
    """Weight of |h| * spread in the probing score; None calibrates it."""
    num_probes: int | None = None
    """Default number of probes, p; None takes one candidate in 32 rows."""
    metric_exponent: float = 0.85
    """Clusters form in the metric (mean of h h^T over unit-normed calibration states)^exponent;
    0 is the plain Euclidean metric."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cluster_size not in CLUSTER_SIZES:
            raise HeadIndexError(
                f"cluster size {self.cluster_size} is not a power of two from 1 to 64; "
                f"choose one of {', '.join(map(str, CLUSTER_SIZES))}."
            )
        if self.centroid_bits not in CENTROID_BITS:
            raise HeadIndexError(
                f"centroid bits {self.centroid_bits} must be 4, 8 or 16; choose one."
            )
        if not 1 <= self.num_groups <= _MOST_GROUPS:
            raise HeadIndexError(
                f"{self.num_groups} probing groups must lie between 1 and {_MOST_GROUPS}; "
                "128 is usual."
            )
        if self.group_size < 2:
            raise HeadIndexError(
                f"scale groups of {self.group_size} columns are too small; 64 is usual."
            )
        if not 0 <= self.seed < _SEEDS:
            raise HeadIndexError(f"seed {self.seed} must lie between 0 and {_SEEDS - 1}.")
        for name, allowed in (("method", Method), ("centroid_kind", CentroidKind)):
            if getattr(self, name) not in get_args(allowed):
                raise HeadIndexError(
                    f"{name} {getattr(self, name)!r} is unknown; "
                    f"choose from {', '.join(get_args(allowed))}."
                )
        if self.centroid_columns is not None:
            if self.centroid_bits == 16:
                raise HeadIndexError(
                    "16-bit centroids keep all their columns; choose 4 or 8 bits with --centroid-"
                    "bits, or leave --centroid-columns out."
                )
            if self.centroid_columns < 1 or self.centroid_columns % self.group_size:
                raise HeadIndexError(
                    f"{self.centroid_columns} centroid columns are no whole number of scale groups "
                    f"of {self.group_size}; give a multiple of {self.group_size}."
                )
        if self.learned_pins_per_group < 0:
            raise HeadIndexError(
                f"{self.learned_pins_per_group} learned pins a group are too few; give 0 for none."
            )
        if not 0 <= self.metric_exponent <= 1:
            raise HeadIndexError(
                f"metric exponent {self.metric_exponent} must lie between 0 and 1; 0.85 is usual."
            )
        if self.alpha is not None and not 0 <= self.alpha < 100:
            raise HeadIndexError(f"alpha {self.alpha} must lie between 0 and 100; 1 is usual.")
        if len(set(self.pinned_token_ids)) != len(self.pinned_token_ids):
            raise HeadIndexError("a pinned token id is given twice; give each once.")

    def check(self, vocab_size: int, hidden_size: int) -> None:
        """Raise HeadIndexError where these choices do not fit an output embedding `[V, D]`."""
        if self.centroid_bits != 16 and (self.group_size % 2 or hidden_size % self.group_size):
            fitting = [n for n in (32, 64, 128, 256) if hidden_size % n == 0] or [hidden_size]
            raise HeadIndexError(
                f"scale groups of {self.group_size} columns do not divide the hidden size "
                f"{hidden_size} evenly; build the index with launch/build_index.py --group-size "
                f"{fitting[-1]} or --centroid-bits 16."
            )
        if self.centroid_columns is not None and self.centroid_columns >= hidden_size:
            raise HeadIndexError(
                f"{self.centroid_columns} centroid columns are not fewer than the hidden size "
                f"{hidden_size}; give fewer, or leave --centroid-columns out to keep all."
            )
        for token in self.pinned_token_ids:
            if not 0 <= token < vocab_size:
                raise HeadIndexError(
                    f"pinned token {token} is outside the vocabulary of {vocab_size}; "
                    f"give ids from 0 to {vocab_size - 1}."
                )
        if len(self.pinned_token_ids) >= vocab_size:
            raise HeadIndexError(f"all {vocab_size} tokens are pinned; leave some to cluster.")
        clusters = self.num_clusters(vocab_size)
        if self.num_probes is not None and not 1 <= self.num_probes <= clusters:
            raise HeadIndexError(
                f"{self.num_probes} probes must lie between 1 and the {clusters} clusters; "
                "choose a number in that range."
            )

    def num_clusters(self, vocab_size: int) -> int:
        """C: enough clusters for the tokens that are not pinned, padded to a multiple of G."""
        unpinned = vocab_size - len(self.pinned_token_ids)
        per_group = -(-unpinned // (self.cluster_size * self.num_groups))
        return per_group * self.num_groups

    def probes(self, vocab_size: int) -> int:
        """p: what was chosen, or the default, rounded up to whole probes a group."""
        if self.num_probes is not None:
            return self.num_probes
        per_group = -(-self.num_clusters(vocab_size) // (PROBED_SHARE * self.num_groups))
        return per_group * self.num_groups

    def probes_per_group(self, vocab_size: int) -> int:
        """Clusters that each group probes."""
        return -(-self.probes(vocab_size) // self.num_groups)

    def max_learned_pins(self, vocab_size: int) -> int:
        """The most tokens that calibration may pin: a small part of what is probed."""
        return min(self.learned_pins_per_group * self.num_groups, vocab_size // PROBED_SHARE)

    def fingerprint(self) -> str:
        """Twelve hex digits that differ where any choice does."""
        choices = asdict(self)
        # What an option of later versions leaves as it was has the name that it had.
        if self.centroid_columns is None:
            del choices["centroid_columns"]
        else:
            # Since the spread counts what fewer columns leave out.
            choices["spread"] = "with what columns leave out"
        text = json.dumps(choices, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
