"""A rank's part of a stored index: complete probing groups, checked as they are read.

Rank r of P owns the groups g with g % P == r, so that every P from 1 to G can use one file. Every
rank also reads the ids of all tokens where it maps them, and the projection of hidden states to the
columns of the centroids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashhead_dist.index.options import HeadIndexError
from flashhead_dist.index.store import (
    CENTROID_MEAN,
    DATA_NAME,
    SHARED,
    TO_STATE,
    IndexManifest,
    hash_group,
    header_bytes,
    load_manifest,
)
from flashhead_dist.models import ModelSource
from flashhead_kernels.cpu_threads import empty_on_large_pages
from flashhead_kernels.quantize import Projection, QuantizedCentroids, tile_centroids
from flashhead_kernels.shard import IndexShard

_PINNED = "pinned_"


@dataclass(frozen=True)
class TokenMap:
    """`(rank, row)` of every token, packed as `row * tp_size + rank` in int32 `[V]`."""

    packed: Tensor
    tp_size: int

    @classmethod
    def of(
        cls, token_ids: Tensor, pinned_token_ids: Tensor, vocab_size: int, tp_size: int
    ) -> TokenMap:
        """Map of clusters `token_ids [G, M, S]` and `pinned_token_ids [G, n]` (-1: pad).

        A rank's rows are those of its groups' clusters, in order, then their pinned slots.
        """
        groups = len(token_ids)
        clustered, pinned = token_ids.flatten(1), pinned_token_ids
        group = torch.arange(groups)
        rank, turn = group % tp_size, group // tp_size
        num_owned = torch.bincount(rank, minlength=tp_size)[rank]
        first = turn * clustered.shape[1]
        first_pinned = num_owned * clustered.shape[1] + turn * pinned.shape[1]
        packed = torch.full((vocab_size,), -1, dtype=torch.int32)
        for ids, start in ((clustered, first), (pinned, first_pinned)):
            rows = start.unsqueeze(1) + torch.arange(ids.shape[1])
            codes = (rows * tp_size + rank.unsqueeze(1)).to(torch.int32)
            real = ids >= 0
            packed[ids[real].long()] = codes[real]
        return cls(packed, tp_size)

    def to(self, device: torch.device) -> TokenMap:
        return TokenMap(self.packed.to(device), self.tp_size)

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`(rank, row)`, int64, of `token_ids`; IndexError for an id outside the vocabulary."""
        if bool(((token_ids < 0) | (token_ids >= len(self.packed))).any()):
            raise IndexError(f"token ids must lie between 0 and {len(self.packed) - 1}")
        return self.places(token_ids)

    def places(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`locate`, of ids known to lie in the vocabulary; on CUDA the host does not wait."""
        codes = self.packed[token_ids.long()].long()
        return codes % self.tp_size, codes // self.tp_size


@dataclass(frozen=True)
class LoadedShard:
    """One rank's part of the index in the folder `path`: its tensors, and what they belong to."""

    manifest: IndexManifest
    tp_rank: int
    tp_size: int
    shard: IndexShard
    path: Path = field(repr=False)

    @cached_property
    def token_map(self) -> TokenMap:
        """Where every token's row is; read on first use (4 bytes a token).

        Raises HeadIndexError where the stored ids are damaged.
        """
        ids = read_token_ids(self.path, self.manifest)
        token_map = TokenMap.of(*ids, self.manifest.vocab_size, self.tp_size)
        return token_map.to(self.shard.rows.device)

    def token_location(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`(rank, row)`, both int64 like `token_ids`: `embedding_rows(...)` of that rank holds it.

        Row counts through this rank's clusters first, then through its pinned slots.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        return self.token_map.locate(token_ids)

    def embedding_lookup(self, token_ids: Tensor) -> Tensor:
        """Rows `[..., D]` of `token_ids [...]` that this rank owns, zeros for the others.

        The sum over ranks is the tied input embedding, without a second copy of the weights.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        rank, row = self.token_location(token_ids)
        owned = rank == self.tp_rank
        clustered, shard = self.shard.rows.flatten(0, 2), self.shard
        pinned_row = row - len(clustered)
        found = clustered[torch.where(owned & (pinned_row < 0), row, 0)]
        is_pinned = owned & (pinned_row >= 0)
        if shard.pinned_token_ids.numel():
            pinned = shard.pinned_rows.flatten(0, 1)[torch.where(is_pinned, pinned_row, 0)]
            found = torch.where(is_pinned.unsqueeze(-1), pinned, found)
        return found.masked_fill(~owned.unsqueeze(-1), 0)


def load_shard(
    path: Path,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    device: torch.device | str = "cpu",
    model: ModelSource | None = None,
) -> LoadedShard:
    """Read the groups that `tp_rank` owns; memory peaks at that share and one group.

    model: the index must have been built from its weights.

    Raises:
        HeadIndexError: no index, a damaged one, one for other weights, fewer groups or tokens than
            ranks.
    """
    path = Path(path)
    manifest = load_manifest(path)
    _check_use(path, manifest, tp_rank, tp_size, model)
    _check_data_file(path, manifest)
    groups = list(range(tp_rank, manifest.num_groups, tp_size))
    tensors = _read_groups(path, manifest, groups)
    projection = _read_projection(path, manifest, device)
    if torch.device(device).type != "cpu":
        on_device = _allocate(tensors, device)
        tensors = {name: on_device[name].copy_(tensor) for name, tensor in tensors.items()}
    return _assemble(path, manifest, tp_rank, tp_size, groups, tensors, projection)


def _check_use(
    path: Path, manifest: IndexManifest, tp_rank: int, tp_size: int, model: ModelSource | None
) -> None:
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank {tp_rank} is not one of {tp_size} ranks")
    if tp_size > manifest.vocab_size:
        raise HeadIndexError(
            f"a vocabulary of {manifest.vocab_size} tokens is too small for {tp_size} ranks; "
            "use fewer ranks."
        )
    if tp_size > manifest.num_groups:
        raise HeadIndexError(
            f"{tp_size} ranks are more than the {manifest.num_groups} probing groups of {path}; "
            "use fewer ranks or build the index with more --groups."
        )
    if model is not None and model.weight_hash != manifest.weight_hash:
        raise HeadIndexError(
            f"{path} was built for other weights ({manifest.model_name}) than those of "
            f"{model.name}; build an index for this model with launch/build_index.py."
        )


def _check_data_file(path: Path, manifest: IndexManifest) -> None:
    """Raise HeadIndexError unless the data file has the size and header it was stored with."""
    file = path / DATA_NAME
    try:
        size = file.stat().st_size
        header = header_bytes(file)
    except OSError as error:
        raise HeadIndexError(
            f"{file} cannot be read ({error.strerror}); build the index again with "
            "launch/build_index.py --force."
        ) from error
    intact = hashlib.sha256(header).hexdigest() == manifest.header_sha256
    if size != manifest.data_bytes or not intact:
        raise _damaged(path)


def _read_groups(path: Path, manifest: IndexManifest, groups: list[int]) -> dict[str, Tensor]:
    """Slices of `groups` from all stored tensors, by name."""
    tensors: dict[str, Tensor] = {}
    for index, group in enumerate(groups):
        # Opened for each group: the pages of the mapped file count as memory until it is closed.
        one = _read_group(path, group)
        if not tensors:
            like = {name: tensor.expand(len(groups), *tensor.shape) for name, tensor in one.items()}
            tensors = _allocate(like, "cpu")
        for name, tensor in one.items():
            tensors[name][index] = tensor
        if hash_group([one[name] for name in sorted(one)]) != manifest.group_sha256[group]:
            raise _damaged(path)
    return tensors


def _allocate(like: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Memory for tensors like these on `device`; what is pinned follows the rest."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in like.items():
        if name.startswith(_PINNED):
            continue
        pinned = like.get(_PINNED + name)
        extra = 0 if pinned is None else pinned.numel()
        size = (tensor.numel() + extra,)
        if torch.device(device).type == "cpu":
            memory = empty_on_large_pages(size, tensor.dtype)
        else:
            memory = torch.empty(size, dtype=tensor.dtype, device=device)
        tensors[name] = memory[: tensor.numel()].view(tensor.shape)
        if pinned is not None:
            tensors[_PINNED + name] = memory[tensor.numel() :].view(pinned.shape)
    return tensors


def _read_group(path: Path, group: int) -> dict[str, Tensor]:
    try:
        with safe_open(path / DATA_NAME, framework="pt") as file:
            names = [name for name in file.keys() if name not in SHARED]  # noqa: SIM118
            return {name: file.get_slice(name)[group].clone() for name in names}
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error


def _assemble(
    path: Path,
    manifest: IndexManifest,
    tp_rank: int,
    tp_size: int,
    groups: list[int],
    tensors: dict[str, Tensor],
    projection: Projection | None,
) -> LoadedShard:
    rows = tensors["rows"]
    columns = manifest.centroid_columns or manifest.hidden_size
    group_size = columns if manifest.bits == 16 else manifest.group_size
    centroids = QuantizedCentroids(
        tensors["centroid_values"],
        tensors.get("centroid_scales"),
        manifest.bits,
        group_size,
        columns,
        manifest.tile,
        projection,
    )
    if rows.is_cuda:
        # A thread of the CUDA kernels scores a cluster: tiles let a warp read them side by side.
        centroids = tile_centroids(centroids, pad=True)
    no_rows = rows.new_empty(len(groups), 0, manifest.hidden_size)
    no_ids = tensors["token_ids"].new_empty(len(groups), 0)
    shard = IndexShard(
        rows=rows,
        token_ids=tensors["token_ids"],
        centroids=centroids,
        spread=tensors["spread"],
        pinned_rows=tensors.get("pinned_rows", no_rows),
        pinned_token_ids=tensors.get("pinned_token_ids", no_ids),
        group_ids=torch.tensor(groups, device=rows.device),
    )
    return LoadedShard(manifest, tp_rank, tp_size, shard, path)


def with_row_dtype(loaded: LoadedShard, dtype: torch.dtype) -> LoadedShard:
    """`loaded` with clustered and pinned rows in `dtype`; the same object where they are already.

    Its `table` is contiguous, so that its rows can be scanned and looked up as one matrix.
    """
    shard = loaded.shard
    if shard.rows.dtype == dtype and shard.table is not None:
        return loaded
    clustered, pinned = shard.rows.flatten(0, 2), shard.pinned_rows.flatten(0, 1)
    shape = (len(clustered) + len(pinned), shard.rows.shape[-1])
    if shard.rows.device.type == "cpu":
        block = empty_on_large_pages(shape, dtype)
    else:
        block = shard.rows.new_empty(shape, dtype=dtype)
    block[: len(clustered)] = clustered
    block[len(clustered) :] = pinned
    rows = block[: len(clustered)].view(shard.rows.shape)
    pinned_rows = block[len(clustered) :].view(shard.pinned_rows.shape)
    return replace(loaded, shard=replace(shard, rows=rows, pinned_rows=pinned_rows))


def _read_projection(
    path: Path, manifest: IndexManifest, device: torch.device | str
) -> Projection | None:
    """What takes states to the centroids' columns; None where these keep all.

    Raises:
        HeadIndexError: a damaged file.
    """
    if manifest.centroid_columns is None:
        return None
    try:
        with safe_open(path / DATA_NAME, framework="pt") as file:
            shared = {name: file.get_tensor(name).clone() for name in SHARED}
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error
    if hash_group([shared[name] for name in SHARED]) != manifest.shared_sha256:
        raise _damaged(path)
    return Projection(shared[TO_STATE], shared[CENTROID_MEAN]).to(device)


def read_token_ids(path: Path, manifest: IndexManifest) -> tuple[Tensor, Tensor]:
    """Ids of all groups: clustered int32 `[G, M, S]` and pinned int32 `[G, n]`, -1 for pads.

    Raises:
        HeadIndexError: the stored ids are damaged.
    """
    try:
        with safe_open(path / DATA_NAME, framework="pt") as file:
            names = file.keys()
            token_ids = file.get_tensor("token_ids").clone()
            pinned = token_ids.new_empty(manifest.num_groups, 0)
            if "pinned_token_ids" in names:
                pinned = file.get_tensor("pinned_token_ids").clone()
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error
    if hash_group([token_ids, pinned]) != manifest.token_ids_sha256:
        raise _damaged(path)
    return token_ids, pinned


def _damaged(path: Path) -> HeadIndexError:
    return HeadIndexError(
        f"{path / DATA_NAME} is damaged; build the index again with launch/build_index.py --force."
    )
