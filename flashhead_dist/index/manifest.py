"""What an index says of itself, in a file that shows any change to it.

manifest.json is the canonical JSON of the fields below and the sha256 of that JSON without the
hash. Reading it back must give the same bytes, so not even a blank can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flashhead_dist.index.options import HeadIndexError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
DATA_NAME = "index.safetensors"
_USUAL_SHRINKAGE = 0.55
_LATER = {"centroid_columns": None, "shared_sha256": ""}


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """Description of a stored index; see `IndexOptions` for the choices.

    V vocabulary, D hidden size, C clusters of S tokens in G groups of M = C / G clusters.
    """

    model_name: str
    weight_hash: str
    synthetic: bool
    dtype: str
    vocab_size: int
    hidden_size: int
    num_clusters: int
    cluster_size: int
    num_groups: int
    bits: int
    group_size: int
    tile: int
    """Neighbouring centroids whose bytes are interleaved; see `flashhead_kernels.quantize`."""
    num_pinned: int
    """Slots for pinned tokens in each group, pads included."""
    centroid_kind: str
    alpha: float
    num_probes: int
    method: str
    metric_exponent: float
    seed: int
    rounds: int
    """Refinement rounds that were kept."""
    cohesion: float
    """Mean cosine of a row to the mean of its cluster."""
    build_seconds: float
    versions: dict[str, str]
    calibration: dict[str, Any]
    """Evidence for alpha: top-1 by alpha on the calibration states; empty without any."""
    fidelity: dict[str, Any]
    """Dense argmax among the candidates, on the test states; empty without any."""
    data_bytes: int
    header_sha256: str
    """Of the data file's safetensors header, length field included."""
    token_ids_sha256: str
    """Of the ids of all groups, clustered then pinned, for a rank that maps every token."""
    group_sha256: tuple[str, ...]
    """Of each group's slices of all tensors, in the order of their names."""
    schema_version: int = SCHEMA_VERSION
    centroid_columns: int | None = None
    """Columns that a stored centroid keeps; None: all D."""
    shared_sha256: str = ""
    """Of the tensors that are not split by group; empty where there are none."""

    @property
    def clusters_per_group(self) -> int:
        """M."""
        return self.num_clusters // self.num_groups

    @property
    def shrinkage(self) -> float:
        """Of the estimated mass of unprobed clusters: see `flashhead_kernels.sampling`.

        Calibrated when the index is built. One that was built before, or without hidden states, has
        what the default index of Gemma-3-270M was found to have.
        """
        return float(self.calibration.get("shrinkage", _USUAL_SHRINKAGE))

    @property
    def margin_by_share(self) -> dict[float, float]:
        """By share of rows that escalate, the margin that they lie below; see `index.escalation`.

        Of `num_probes` and `alpha` as stored; empty for an index built without hidden states, or
        before this was calibrated.
        """
        found = self.calibration.get("escalation", {}).get("margin_by_share", [])
        return {float(item["share"]): float(item["margin"]) for item in found}

    @property
    def index_hash(self) -> str:
        """Hex sha256 that names this index and all that is in it but the time it took to build."""
        return _self_hash(_plain(self) | {"build_seconds": None})

    @property
    def centroid_bytes(self) -> int:
        """Bytes of all centroids and their scales, and of the states' projection to theirs."""
        columns = self.centroid_columns or self.hidden_size
        centroids = _centroid_bytes(self.num_clusters, columns, self.bits, self.group_size)
        projected = 0 if self.centroid_columns is None else self.centroid_columns + 1
        return centroids + 4 * projected * self.hidden_size

    @property
    def bytes_share(self) -> float:
        """Bytes that one row's step reads, over the bytes of a bfloat16 output embedding.

        Centroids with scales, spreads, and the rows and ids of probed clusters and pinned tokens.
        """
        probes = -(-self.num_probes // self.num_groups) * self.num_groups
        rows = probes * self.cluster_size + self.num_pinned * self.num_groups
        read = self.centroid_bytes + 4 * self.num_clusters + rows * (2 * self.hidden_size + 4)
        return read / (2 * self.vocab_size * self.hidden_size)


def _centroid_bytes(clusters: int, columns: int, bits: int, group_size: int) -> int:
    scales = 0 if bits == 16 else 2 * (columns // group_size)
    return clusters * (columns * bits // 8 + scales)


def save_manifest(folder: Path, manifest: IndexManifest) -> None:
    """Write `manifest` into `folder`; OSError where it cannot be written."""
    (folder / MANIFEST_NAME).write_bytes(_encode(_plain(manifest)))


def change_manifest(path: Path, **changes: Any) -> IndexManifest:
    """Give fields of the index folder `path` other values; returns its manifest as it is then.

    The old manifest stands until the new one is complete.

    Raises:
        HeadIndexError: no index there, or a manifest that cannot be written.
    """
    changed = replace(load_manifest(path), **changes)
    scratch = Path(path) / f"{MANIFEST_NAME}.new"
    try:
        scratch.write_bytes(_encode(_plain(changed)))
        scratch.replace(Path(path) / MANIFEST_NAME)
    except OSError as error:
        raise HeadIndexError(
            f"the manifest of {path} cannot be written ({error.strerror}); copy the index to a "
            "folder that can."
        ) from error
    return changed


def load_manifest(path: Path) -> IndexManifest:
    """Read and check the manifest of the index folder `path`.

    Raises:
        HeadIndexError: no index there, another schema, or a file that is not as it was written.
    """
    path = Path(path)
    try:
        stored = (path / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise HeadIndexError(
            f"{path} holds no index ({MANIFEST_NAME}: {error.strerror}); "
            "build one with launch/build_index.py."
        ) from error
    try:
        document = json.loads(stored)
        if document.pop("schema_version") != SCHEMA_VERSION:
            raise HeadIndexError(
                f"{path} was stored by another version of this program (schema version not "
                f"{SCHEMA_VERSION}); build it again with launch/build_index.py --force."
            )
        document.pop("sha256")
        document["group_sha256"] = tuple(document["group_sha256"])
        manifest = IndexManifest(**document)
        intact = _encode(_plain(manifest)) == stored
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)
    return manifest


def _damaged(path: Path) -> HeadIndexError:
    return HeadIndexError(
        f"{path / MANIFEST_NAME} is damaged; build the index again with launch/build_index.py "
        "--force."
    )


def _plain(manifest: IndexManifest) -> dict[str, Any]:
    """Every field, but those of later versions that say what was always so."""
    found = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    for name, usual in _LATER.items():
        if found[name] == usual:
            del found[name]
    return found


def _self_hash(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _encode(document: dict[str, Any]) -> bytes:
    signed = {**document, "sha256": _self_hash(document)}
    return (json.dumps(signed, sort_keys=True, indent=1) + "\n").encode()
