"""Where derived files live, and how several ranks make one of them exactly once.

A file is written under a temporary name beside its target and renamed, so a reader never sees a
part of it; a file lock keeps concurrent ranks from doing the same work twice. Work that needs much
memory runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead_dist.errors import ModelSourceError


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


def make_once(target: Path, write: Callable[[Path], object]) -> Path:
    """Return `target`, made by `write(temporary_path)` where it is not there yet.

    Safe when many processes call it at once: one writes, the others wait and find it made.
    """
    if target.exists():
        return target
    with locked(target):
        if not target.exists():
            publish(target, write)
    return target


def file_fingerprint(path: Path, part: str = "") -> str:
    """Changes with the path, size or modification time of the file, and with the part's name."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{part}"


def cached_hash(fingerprint: str, chunks: Callable[[], Iterable[bytes]], cache: Path | None) -> str:
    """Hex sha256 of bytes that take seconds to hash, remembered in `cache` by `fingerprint`."""

    def compute() -> str:
        digest = hashlib.sha256()
        for chunk in chunks():
            digest.update(chunk)
        return digest.hexdigest()

    if cache is None:
        return compute()
    key = hashlib.sha256(fingerprint.encode()).hexdigest()
    made = make_once(cache / "weight_hashes" / key, lambda path: path.write_text(compute()))
    return made.read_text()


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


def call_in_process(function: Callable[..., None], *arguments: object, remedy: str) -> None:
    """Call a module's `function` in another Python process, so that this one's memory stays small.

    Arguments arrive as strings. Raises ModelSourceError as `function` does, or with `remedy` where
    the process fails otherwise.
    """
    name = function.__name__
    program = f"import sys; from {function.__module__} import {name}; {name}(*sys.argv[1:])"
    # torchrun gives a rank one thread; this process may use every core.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return
    last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    refusal = f"{ModelSourceError.__module__}.{ModelSourceError.__qualname__}: "
    if last_line.startswith(refusal):
        raise ModelSourceError(last_line.removeprefix(refusal))
    raise ModelSourceError(f"{name} failed in a process of its own ({last_line}); {remedy}.")


def publish(target: Path, write: Callable[[Path], object]) -> None:
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
