"""The shape of an output head, and the terms in which its work is told.

Units: bytes and floating-point operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashhead_topology.collective_cost import CollectiveOperation
from flashhead_topology.machine import DeviceType

_SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """An output embedding, and the index over it where a head has one.

    num_clusters: 0 for none. row_bits, logit_bytes: of the model's dtype, which the dense heads
    gather logits in. group_size: columns that share a scale of the centroids. pinned_per_group:
    slots for pinned tokens in each probing group. escalated_share: of rows that flashhead_escalate
    looks at again; escalated_probes: what it then probes in all, 0 for every token.
    centroid_columns: that a stored centroid keeps, 0 for all of the hidden size.
    """

    vocab_size: int
    hidden_size: int
    num_clusters: int = 0
    cluster_size: int = 4
    num_probes: int = 0
    centroid_bits: int = 4
    group_size: int = 64
    num_groups: int = 128
    pinned_per_group: int = 0
    row_bits: int = 16
    logit_bytes: int = 2
    escalated_share: float = 0.0
    escalated_probes: int = 0
    centroid_columns: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "cluster_size", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.centroid_bits not in (4, 8, 16):
            raise ValueError(f"centroid_bits is {self.centroid_bits}: choose 4, 8 or 16")
        if self.num_clusters and not 1 <= self.num_probes <= self.num_clusters:
            raise ValueError(
                f"num_probes is {self.num_probes}: choose between 1 and the {self.num_clusters} "
                "clusters"
            )

    @classmethod
    def with_default_index(cls, vocab_size: int, hidden_size: int) -> HeadShape:
        """The shape that `launch/build_index.py` makes of an embedding by default.

        Clusters of 4 in 128 groups, int4 centroids, one row in 32 a candidate, one pinned slot.
        """
        groups, cluster_size, probed_share = 128, 4, 32
        clusters = -(-vocab_size // (cluster_size * groups)) * groups
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_clusters=clusters,
            cluster_size=cluster_size,
            num_probes=-(-clusters // (probed_share * groups)) * groups,
            num_groups=groups,
            pinned_per_group=1,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the embedding."""
        return self.hidden_size * self.row_bits // 8

    @property
    def centroid_bytes(self) -> int:
        """Bytes of one centroid with its scales."""
        columns = self.centroid_columns or self.hidden_size
        values = columns * self.centroid_bits // 8
        scales = 0 if self.centroid_bits == 16 else columns // self.group_size
        return values + _SCALE_BYTES * scales

    @property
    def projection_bytes(self) -> int:
        """Bytes, on every rank, of what takes hidden states to the centroids' columns."""
        return 4 * (self.centroid_columns + 1) * self.hidden_size if self.centroid_columns else 0


@dataclass(frozen=True)
class Part:
    """One stretch of local work.

    read_bytes: of weights. scratch_bytes: of what it writes or reads beside them. gathered: whether
    the weights lie in pieces, one a cluster.
    """

    read_bytes: float
    flops: float
    scratch_bytes: float = 0.0
    gathered: bool = False


@dataclass(frozen=True)
class Sent:
    """One exchange: what it does with `operand_bytes` of each rank.

    element_bytes: of one number in it. keys: packed candidates, which shared memory can carry.
    times: how often a step has it, on average.
    """

    operation: CollectiveOperation
    operand_bytes: int
    element_bytes: int
    keys: bool = False
    times: float = 1.0


@dataclass(frozen=True)
class HeadWork:
    """One rank's step.

    launches: kernels or operators that it consists of on each type of device, exchanges aside.
    """

    parts: Mapping[str, Part]
    exchanges: tuple[Sent, ...]
    launches: Mapping[DeviceType, int]
    weight_bytes: int

    @property
    def read_bytes(self) -> float:
        """Bytes of weights, as `Head.read_bytes_per_step` counts them."""
        return sum(part.read_bytes for part in self.parts.values())
