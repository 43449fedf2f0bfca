"""An index as a folder: index.safetensors and manifest.json, published complete or not at all.

manifest.json is the canonical JSON of the fields of `IndexManifest` and the sha256 of that JSON
without the hash. Reading it back must give the same bytes, so not even a blank can change
unnoticed. The data file is checked by its size, a hash of its header, and a hash of each group.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashhead_dist.index.options import HeadIndexError
from flashhead_kernels.shard import IndexShard

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
DATA_NAME = "index.safetensors"
TO_STATE, CENTROID_MEAN = "centroid_to_state", "centroid_mean"
SHARED = (CENTROID_MEAN, TO_STATE)
"""Tensors that are not split by group: every rank reads them whole."""
_MAX_HEADER_BYTES = 1 << 20
_USUAL_SHRINKAGE = 0.55
_LATER = {"centroid_columns": None, "shared_sha256": ""}
"""Fields of later versions, and the value with which they are left out."""


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

        Calibrated when the index is built. An older index, or one built without hidden states, has
        that of the default index of Gemma-3-270M.
        """
        return float(self.calibration.get("shrinkage", _USUAL_SHRINKAGE))

    @property
    def margin_by_share(self) -> dict[float, float]:
        """By share of rows that escalate, the margin that they lie below; see `index.calibrate`.

        Of `num_probes` and `alpha` as stored; empty for an older index, or one built without hidden
        states.
        """
        found = self.calibration.get("escalation", {}).get("margin_by_share", [])
        return {float(item["share"]): float(item["margin"]) for item in found}

    @property
    def index_hash(self) -> str:
        """Hex sha256 of everything in this index but the time it took to build."""
        return _self_hash(_plain(self) | {"build_seconds": None})

    @property
    def centroid_bytes(self) -> int:
        """Bytes of all centroids and their scales, and of the states' projection to theirs."""
        columns = self.centroid_columns or self.hidden_size
        scales = 0 if self.bits == 16 else 2 * (columns // self.group_size)
        projected = 0 if self.centroid_columns is None else self.centroid_columns + 1
        centroids = self.num_clusters * (columns * self.bits // 8 + scales)
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


def named_tensors(tensors: IndexShard) -> dict[str, Tensor]:
    """The tensors under the names they are stored by; empty and absent ones are left out.

    All but those of SHARED begin with the group.
    """
    named = {
        "rows": tensors.rows,
        "token_ids": tensors.token_ids,
        "centroid_values": tensors.centroids.values,
        "spread": tensors.spread,
    }
    if tensors.centroids.scales is not None:
        named["centroid_scales"] = tensors.centroids.scales
    if tensors.centroids.projection is not None:
        named[TO_STATE] = tensors.centroids.projection.to_state
        named[CENTROID_MEAN] = tensors.centroids.projection.mean
    if tensors.pinned_token_ids.numel():
        named["pinned_rows"] = tensors.pinned_rows
        named["pinned_token_ids"] = tensors.pinned_token_ids
    return {name: named[name].contiguous().cpu() for name in sorted(named)}


def hash_group(slices: list[Tensor]) -> str:
    """Hex sha256 over one group's slices of all tensors, given in the order of their names."""
    digest = hashlib.sha256()
    for piece in slices:
        digest.update(tensor_bytes(piece))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def header_bytes(file: Path) -> bytes:
    """The first bytes of a safetensors file: the header's length and the header."""
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))


def save_index(
    out: Path,
    tensors: IndexShard,
    describe: Callable[[dict[str, object]], IndexManifest],
    *,
    replace: bool,
) -> Path:
    """Write an index folder under a temporary name and rename it to `out`.

    describe: makes the manifest from the fields that depend on the stored bytes: `data_bytes`,
        `header_sha256`, `group_sha256`, `token_ids_sha256`, `shared_sha256`.
    replace: whether an `out` that is there already gives way; it does so only once the new one is
        complete.

    Raises:
        HeadIndexError: `out` exists, its folder cannot be written, or the disk is full. Nothing is
            left behind then, nor after an interrupt.
    """
    check_target(out, replace=replace)
    named = named_tensors(tensors)
    ids = [tensors.token_ids.cpu().contiguous(), tensors.pinned_token_ids.cpu().contiguous()]
    groups = range(len(tensors.token_ids))
    split = [tensor for name, tensor in named.items() if name not in SHARED]
    hashes = tuple(hash_group([tensor[g] for tensor in split]) for g in groups)
    shared = [named[name] for name in SHARED if name in named]
    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder = scratch / out.name
        folder.mkdir()
        save_file(named, folder / DATA_NAME)
        stored = {
            "data_bytes": (folder / DATA_NAME).stat().st_size,
            "header_sha256": hashlib.sha256(header_bytes(folder / DATA_NAME)).hexdigest(),
            "group_sha256": hashes,
            "token_ids_sha256": hash_group(ids),
            "shared_sha256": hash_group(shared) if shared else "",
        }
        save_manifest(folder, describe(stored))
        _flush(folder)
        _put_in_place(folder, out, scratch / "replaced")
    except Exception as error:
        if not _is_storage_error(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise HeadIndexError(
            f"The index cannot be written to {out} ({reason}); free some space or choose another "
            "folder with --out."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return out


def _put_in_place(folder: Path, out: Path, replaced: Path) -> None:
    """Rename `folder` to `out`; an index that is there moves aside, and back where that fails."""
    if not out.exists():
        folder.rename(out)
        return
    out.rename(replaced)
    try:
        folder.rename(out)
    except BaseException:
        replaced.rename(out)
        raise


def check_target(out: Path, *, replace: bool) -> None:
    """Raise HeadIndexError where `out` is in the way, or is anything but an index folder."""
    if not out.exists():
        return
    if not replace:
        raise HeadIndexError(f"{out} exists already; give --force to replace it or another --out.")
    others = not out.is_dir() or {file.name for file in out.iterdir()} - {
        DATA_NAME,
        "manifest.json",
    }
    if others:
        raise HeadIndexError(f"{out} is not an index, so it is not replaced; give another --out.")


def _is_storage_error(error: Exception) -> bool:
    # safetensors reports a full disk as its own exception, which is no OSError.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename that publishes them."""
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb+") as stream, suppress(OSError):
            os.fsync(stream.fileno())
