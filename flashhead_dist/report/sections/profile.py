"""What a profile of the run shows, where `launch/profile.sh --output RUN/profile` took one."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Section
from flashhead_profiles.readers import Profile, read_profile
from flashhead_profiles.traces import TraceError, medians

PROFILE_NAME = "profile"
_NOT_TAKEN = (
    "no profile was taken: launch/profile.sh --output {folder} -- launch/scale.py takes one"
)


def ranges_section(run: Run) -> Section:
    """Median time of each range on each rank, kernels and communication under it.

    Raises:
        UserError: the run's profile cannot be read.
    """
    key, title = "ranges", "Ranges of a profiled run"
    profile = _profile_of(run)
    if profile is None or profile.timeline is None:
        return Section(key=key, title=title, missing=_reason(run, profile))
    frames = [
        medians(frame).assign(capture=str(capture))
        for capture, frame in profile.timeline.groupby("capture", sort=False)
    ]
    notes = (
        "Medians over a capture, disturbed by the tracing: what parts have of the whole holds, "
        "times do not. Kernels and communication: launched in the range, wherever they ran.",
        *_missing(profile.timeline),
    )
    return Section(key=key, title=title, notes=notes, frame=_known(pd.concat(frames)))


def kernels_section(run: Run) -> Section:
    """DRAM bytes, L2 hit rate and bandwidth of each kernel, by Nsight Compute.

    Raises:
        UserError: the run's profile cannot be read.
    """
    key, title = "kernels", "Counters of a profiled run's kernels"
    profile = _profile_of(run)
    if profile is None or profile.counters is None:
        return Section(key=key, title=title, missing=_reason(run, profile, "--counters "))
    frame = profile.counters.groupby(["kernel", "rank"], sort=False).median().reset_index()
    notes = (
        "Medians over launches. Nsight Compute runs each kernel alone, with a cold cache and the "
        "clocks held: its times are not those of a step.",
        *_missing(profile.counters),
    )
    return Section(key=key, title=title, notes=notes, frame=_known(frame))


def _profile_of(run: Run) -> Profile | None:
    folder = run.folder / PROFILE_NAME
    return _read(folder) if folder.is_dir() else None


@lru_cache(maxsize=8)
def _read(folder: Path) -> Profile:
    try:
        return read_profile(folder)
    except TraceError as error:
        raise UserError(str(error)) from error


def _reason(run: Run, profile: Profile | None, option: str = "") -> str:
    reason = _NOT_TAKEN.format(folder=f"{run.folder.name}/{PROFILE_NAME}")
    if profile is None and not option:
        return reason
    return reason.replace("--output", f"{option}--output")


def _missing(frame: pd.DataFrame) -> list[str]:
    return [f"{name} is missing, because {why}." for name, why in frame.attrs["missing"].items()]


def _known(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.dropna(axis="columns", how="all").reset_index(drop=True)
