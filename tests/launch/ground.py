"""What every mistake is made in: the files of a small run that works, and how two ranks are run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashhead_dist.index import IndexOptions, build_index

LAUNCH = Path(__file__).parents[2] / "launch"
NUM_GROUPS = 4
VOCAB_SIZE = 500
Refused = Callable[..., str]


@dataclass(frozen=True)
class Ground:
    """Files of a run that works, and a folder to spoil copies of them in."""

    model: Path
    index: Path
    states: Path
    scratch: Path

    def arguments(self, *more: str, **changed: Path) -> list[str]:
        files = {"model": self.model, "index": self.index, "hidden_states": self.states} | changed
        named = [(f"--{name.replace('_', '-')}", str(path)) for name, path in files.items()]
        quick = ["--heads", "flashhead", "--iters", "1", "--batch-sizes", "1"]
        return [*quick, "--max-states", "16", *(word for pair in named for word in pair), *more]

    def copy_of(self, folder: Path) -> Path:
        return shutil.copytree(folder, self.scratch / folder.name)


def build_small(model: object, out: Path, num_groups: int, num_probes: int) -> Path:
    options = IndexOptions(num_groups=num_groups, num_probes=num_probes, alpha=0.0)
    return build_index(
        model, options, calibration=None, test=None, out=out, device="cpu", progress=False
    )


def torchrun_scale(*arguments: str, python_path: Path | None = None) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    paths = [str(python_path)] if python_path else []
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    done = subprocess.run(
        [*command, str(LAUNCH / "scale.py"), "--skip-plots", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def sentence_of_two_ranks(code: int, stderr: str) -> str:
    """The one sentence of a job whose ranks both ended with 2, and its root cause."""
    assert code == 1, stderr  # torchrun's own code for any rank that fails
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, stderr
    assert stderr.count("exitcode  : 2 ") == 2, stderr
    assert f"traceback : {said[0]}" in stderr.partition("Root Cause")[2]
    # torchrun's own traceback cannot be helped; one of ours would name our files.
    ours = str(LAUNCH.parent / "flashhead_dist"), str(LAUNCH)
    assert not any(f'File "{folder}' in stderr for folder in ours), stderr
    return said[0]
