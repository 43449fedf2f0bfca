"""A folder that launch/profile.sh has filled: reports of all ranks, whichever tool wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from flashhead_profiles.chrome_trace import read_chrome_trace
from flashhead_profiles.ncu import read_ncu
from flashhead_profiles.nsys import read_nsys
from flashhead_profiles.timeline import TraceError


@dataclass(frozen=True)
class Profile:
    """What a folder holds; None for a kind of report that it has none of.

    timeline: as `flashhead_profiles.timeline` describes it, with a column `capture`: the name of
        the file without its rank. counters: see `ncu`.
    """

    timeline: pd.DataFrame | None
    counters: pd.DataFrame | None


def read_profile(folder: Path) -> Profile:
    """Read every report of a folder.

    Raises:
        TraceError: no such folder, nothing in it, or a report that cannot be read.
    """
    if not folder.is_dir():
        raise TraceError(f"there is no folder {folder}: name one that launch/profile.sh has filled")
    frames = []
    for path in sorted([*folder.glob("*rank*.json*"), *folder.glob("*rank*.sqlite")]):
        reads = read_nsys if path.suffix == ".sqlite" else read_chrome_trace
        frame = reads(path)
        frames.append(frame.assign(capture=capture_of(path, int(frame["rank"].iloc[0]))))
    counters = [read_ncu(path) for path in sorted(folder.glob("counters_*.csv"))]
    if not frames and not counters:
        raise TraceError(f"{folder} holds no report of a rank: fill it with launch/profile.sh")
    return Profile(_together(frames), _together(counters))


def capture_of(path: Path, rank: int) -> str:
    """What a report's name says beside its rank: `tp2_1` of `tp2_1_rank0.json`.

    nsys numbers the captures of a run behind the name: `rank0.2.sqlite` is capture `2`.
    """
    name = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".sqlite")
    return name.replace(f"rank{rank}", "").replace(f"rank_{rank}", "").strip("_.")


def _together(frames: list[pd.DataFrame]) -> pd.DataFrame | None:
    if not frames:
        return None
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs["missing"] = {k: v for f in frames for k, v in f.attrs["missing"].items()}
    return whole
