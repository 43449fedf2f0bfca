"""An index as a folder: index.safetensors and manifest.json, published whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashhead_dist.index.manifest import DATA_NAME, IndexManifest, save_manifest
from flashhead_dist.index.options import HeadIndexError
from flashhead_kernels.shard import IndexShard

HEADER_LENGTH_BYTES = 8
TO_STATE, CENTROID_MEAN = "centroid_to_state", "centroid_mean"
SHARED = (CENTROID_MEAN, TO_STATE)
"""Tensors that are not split by group: every rank reads them whole."""
_MAX_HEADER_BYTES = 1 << 20


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
    """Length field and header of a safetensors file; short where the file is.

    Format: https://github.com/huggingface/safetensors#format
    """
    with file.open("rb") as stream:
        length = stream.read(HEADER_LENGTH_BYTES)
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
