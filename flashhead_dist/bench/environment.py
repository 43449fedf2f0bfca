"""The machine of a run, how the run uses it, and what records say of both.

`decide_setup` chooses devices, backend, threads and heads, and says which `tp_size` fits: the same
on every rank of a host, from what the rank sees; nothing is opened there.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flashhead_dist import __version__
from flashhead_dist.bench.records import SCHEMA_VERSION, Provenance
from flashhead_dist.errors import UserError
from flashhead_dist.heads.dense import DenseGather
from flashhead_dist.heads.registry import BASELINE, DEFAULT_HEAD, head_type
from flashhead_dist.models import ModelSource
from flashhead_topology.machine import (
    Machine,
    Oversubscription,
    Placement,
    choose_placement,
    oversubscription,
)

DEFAULT_HEADS = (DenseGather.name, BASELINE, DEFAULT_HEAD)
"""What serving systems do, the strongest dense head, and ours."""
_PACKAGES = ("torch", "numpy", "numba", "triton", "transformers", "faiss-cpu")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What `decide_setup` decided; `notes` are sentences that a person must read."""

    machine: Machine
    placement: Placement
    device: torch.device
    heads: tuple[str, ...]
    threads_per_rank: int
    local_world_size: int
    notes: tuple[str, ...] = ()

    def fit(self, tp_size: int) -> Oversubscription:
        """Whether a group of `tp_size` ranks, of which this host has what fits, runs at speed."""
        return oversubscription(
            min(tp_size, self.local_world_size),
            self.machine.num_cores,
            len(self.machine.gpus) if self.device.type == "cuda" else 0,
            threads_per_rank=self.threads_per_rank,
        )

    def group_sizes(self, tp_sizes: Iterable[int], world_size: int) -> list[int]:
        """Groups that a sweep of `tp_sizes` needs, ascending.

        Where one is oversubscribed, the largest group that is not joins them: it times the
        exchanges that projections are made of.
        """
        sizes = set(tp_sizes)
        if any(self.fit(size).oversubscribed for size in sizes):
            fitting = [s for s in range(2, world_size + 1) if not self.fit(s).oversubscribed]
            sizes.update(fitting[-1:])
        return sorted(sizes)

    @property
    def device_name(self) -> str:
        """Name of what computes."""
        if self.device.type == "cuda":
            return self.machine.gpus[self.device.index or 0].name
        return self.machine.cpu_model


def decide_setup(
    machine: Machine,
    *,
    local_rank: int,
    local_world_size: int,
    threads_per_rank: int,
    device: str | None = None,
    heads: Sequence[str] | None = None,
) -> Setup:
    """Decide how this rank uses `machine`.

    Args:
        device: `cpu` or `cuda` where the user insists.
        heads: None for the default ones that can run here.

    Raises:
        UserError: cuda is asked for and the ranks do not have a GPU each.
    """
    notes: list[str] = []
    num_gpus = 0 if device == "cpu" else len(machine.gpus)
    placement = choose_placement(local_world_size, num_gpus)
    if device == "cuda" and placement.device_type != "cuda":
        raise UserError(f"--device cuda is not possible: {placement.reason}")
    if num_gpus and placement.device_type == "cpu":
        notes.append(f"GPUs are NOT USED: {placement.reason}.")
    if heads is None:
        heads, skipped = _default_heads(placement.device_type)
        notes += skipped
    on_cuda = placement.device_type == "cuda"
    return Setup(
        machine=machine,
        placement=placement,
        device=torch.device("cuda", local_rank) if on_cuda else torch.device("cpu"),
        heads=tuple(heads),
        threads_per_rank=threads_per_rank,
        local_world_size=local_world_size,
        notes=tuple(notes),
    )


def _default_heads(device_type: str) -> tuple[list[str], list[str]]:
    """The heads of a run that names none, and a note for each that cannot run here."""
    reasons = {name: head_type(name).unavailable(device_type) for name in DEFAULT_HEADS}
    names = [name for name, reason in reasons.items() if reason is None]
    return names, [f"{name} is SKIPPED: {why}." for name, why in reasons.items() if why]


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
    **given: Any,
) -> Callable[[], Provenance]:
    """Return what gives each record its provenance, with the time at which it is called.

    given: the fields of `Provenance` that depend on neither machine nor model.
    """

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
            versions=environment["versions"],
            commit=environment["commit"],
            model=model.name,
            model_hash=model.weight_hash,
            synthetic=model.synthetic,
            **given,
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
