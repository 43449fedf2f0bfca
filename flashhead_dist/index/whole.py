"""What every rank reads of an index whatever its groups: the ids of all tokens, and the projection
of hidden states to the columns of the centroids.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashhead_dist.index.manifest import DATA_NAME, IndexManifest
from flashhead_dist.index.options import HeadIndexError
from flashhead_dist.index.store import CENTROID_MEAN, SHARED, TO_STATE, hash_group
from flashhead_dist.index.token_map import TokenMap
from flashhead_kernels.quantize import Projection


def damaged(file: Path) -> HeadIndexError:
    """The error of a data file that is not as it was stored."""
    return HeadIndexError(
        f"{file} is damaged; build the index again with launch/build_index.py --force."
    )


def read_projection(
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
        raise damaged(path / DATA_NAME) from error
    if hash_group([shared[name] for name in SHARED]) != manifest.shared_sha256:
        raise damaged(path / DATA_NAME)
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
        raise damaged(path / DATA_NAME) from error
    if hash_group([token_ids, pinned]) != manifest.token_ids_sha256:
        raise damaged(path / DATA_NAME)
    return token_ids, pinned


def read_token_map(
    path: Path, manifest: IndexManifest, tp_size: int, device: torch.device
) -> TokenMap:
    """Where every token's row is, on `device`; HeadIndexError where the stored ids are damaged."""
    token_ids, pinned = read_token_ids(path, manifest)
    return TokenMap.of(token_ids, pinned, manifest.vocab_size, tp_size).to(device)
