"""What a run stands on: versions of the software and the commit of this project."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flashhead_dist import __version__
from flashhead_dist.bench.records import SCHEMA_VERSION, Provenance
from flashhead_dist.bench.setup import Setup
from flashhead_dist.models import ModelSource

_PACKAGES = ("torch", "numpy", "numba", "triton", "transformers", "faiss-cpu")


def software_versions() -> dict[str, str]:
    """Versions by name of what can change a figure; what is not installed is left out."""
    versions = {"python": platform.python_version(), "flashhead-dist": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            versions["nccl"] = _nccl_version()
    return versions


def describe_environment(
    setup: Setup, arguments: Mapping[str, str], tp_sizes: Iterable[int]
) -> dict[str, Any]:
    """What `environment.json` says of a run before it begins."""
    return {
        "machine": setup.machine.as_dict(),
        "placement": asdict(setup.placement),
        "oversubscription": {str(size): asdict(setup.fit(size)) for size in tp_sizes},
        "versions": software_versions(),
        "commit": source_commit(),
        "arguments": dict(arguments),
        "heads": list(setup.heads),
    }


def make_provenance(
    environment: Mapping[str, Any],
    setup: Setup,
    model: ModelSource,
    *,
    index_hash: str | None,
    num_probes: int | None,
    alpha: float | None,
    escalate_below: float | None = None,
    seed: int,
    world_size: int,
) -> Callable[[], Provenance]:
    """Return what gives each record its provenance, with the time at which it is called."""

    def provenance() -> Provenance:
        return Provenance(
            schema_version=SCHEMA_VERSION,
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            system=setup.machine.host_class,
            device=setup.device_name,
            os=setup.machine.os,
            backend=setup.placement.backend,
            dtype=str(model.dtype).removeprefix("torch."),
            threads_per_rank=setup.threads_per_rank,
            world_size=world_size,
            versions=environment["versions"],
            commit=environment["commit"],
            model=model.name,
            model_hash=model.weight_hash,
            synthetic=model.synthetic,
            index_hash=index_hash,
            num_probes=num_probes,
            alpha=alpha,
            escalate_below=escalate_below,
            seed=seed,
        )

    return provenance


def _nccl_version() -> str:
    return ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def source_commit(folder: Path | None = None) -> str:
    """Short commit of the checkout around `folder` (default: this file's), `-dirty` if changed.

    `unknown` where the code was installed without its repository.
    """
    here = folder or Path(__file__).parent
    commit = _git(here, "rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "unknown"
    changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def boot_id() -> str:
    """Identifier of the running kernel: two ranks have the same one only on one host."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else platform.node()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
