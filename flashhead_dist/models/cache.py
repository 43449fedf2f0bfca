"""Where derived files live, and how several ranks make one of them exactly once.

Everything is written to a temporary name beside its target and renamed, so that a reader sees
either nothing or the whole; a file lock keeps concurrent ranks from doing the same work twice.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead_dist.models.errors import ModelSourceError


def cache_root(cache_dir: Path | None = None) -> Path:
    """Folder of everything derived: `cache_dir`, `$FLASHHEAD_CACHE`, or the XDG cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("FLASHHEAD_CACHE"):
        return Path(named)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "flashhead-dist"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` across processes.

    Raises ModelSourceError where the folder of `target` cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise ModelSourceError(
            f"The cache folder {target.parent} cannot be written ({error.strerror}); "
            "set FLASHHEAD_CACHE to a folder that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


def make_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Return `target`, made by `write(temporary_path)` where it is not there yet.

    Safe when many processes call it at once: one writes, the others wait and find it made.
    """
    if target.exists():
        return target
    with locked(target):
        if not target.exists():
            publish(target, write)
    return target


def cached_tensors(target: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the safetensors file `target`, made by `compute` where it is not there yet.

    Raises ModelSourceError where it cannot be written, or is there and cannot be read.
    """
    make_once(target, lambda temporary: save_file(compute(), temporary))
    try:
        return load_file(target)
    except (SafetensorError, OSError) as error:
        raise ModelSourceError(
            f"The cached file {target} is damaged ({error}); delete it, and it is made again."
        ) from error


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary path beside `target`, then rename it; an old target is replaced.

    Raises ModelSourceError on a full disk or an unwritable folder, leaving nothing behind.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        temporary = scratch / target.name
        write(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an exception of its own.
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unwritable(target: Path, error: Exception) -> ModelSourceError:
    reason = getattr(error, "strerror", None) or error
    return ModelSourceError(
        f"{target} cannot be written ({reason}); free some space or set FLASHHEAD_CACHE to "
        "another folder."
    )
