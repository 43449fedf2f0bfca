"""Sections of the page on bytes, bandwidth, memory, agreement and profiles of a run."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import HEADS
from flashhead_dist.report.figures import (
    GREY,
    Chart,
    Section,
    byte_places,
    draw_bytes,
    head_chart,
    head_legend,
    log_numbers,
    style_of,
)
from flashhead_dist.report.runs import RunFolder, table_frame
from flashhead_dist.report.step_sections import by_batch
from flashhead_profiles.readers import Profile, read_profile
from flashhead_profiles.traces import TraceError, medians

LARGE_BYTES = 512 * 1024
"""From this many bytes sent a step and rank on, the protocol's own bytes should not matter."""
_SMALL_BYTES = 4096
PROFILE_NAME = "profile"


def wire_section(run: RunFolder) -> Section:
    """Counted and analytic bytes, and by how much they differ where messages are large."""
    title = "Bytes on the wire"
    sending = run.frame[run.frame["tp_size"] > 1]
    if sending.empty:
        return Section("wire", title, missing="one rank sends nothing")
    sent = sending.groupby("head")["sent_bytes_per_row"].max()
    silent = [head for head in run.heads if not sent.get(head, 0.0)]
    notes = [
        "Bytes that one rank sends for one row. The count includes the protocol: some hundreds of "
        "bytes a message."
    ]
    notes += [f"Sends nothing: {', '.join(silent)}."] if silent else []
    notes += _protocol_notes(sending)
    reasons = sending.loc[sending["counted_bytes_per_row"].isna(), "counted_reason"]
    notes += [f"Counted bytes are missing because {reason}." for reason in sorted(set(reasons))]
    charts, columns = by_batch(run, partial(_wire_chart, run, sending))
    legend = head_legend([head for head in run.heads if head not in silent])
    legend += [("o", "counted by the network interface"), ("hollow", "analytic: what a ring sends")]
    frame = table_frame(sending, "wire")
    return Section("wire", title, notes, frame, charts, columns, legend)


def _protocol_notes(sending: pd.DataFrame) -> list[str]:
    """How far the count is off for large messages, and what the protocol adds to small ones."""
    known = sending[(sending["counted_bytes_per_row"] > 0) & (sending["sent_bytes_per_row"] > 0)]
    step_bytes = known["sent_bytes_per_row"] * known["batch_size"]
    large, small = known[step_bytes >= LARGE_BYTES], known[step_bytes < _SMALL_BYTES]
    notes = []
    if len(large):
        off = large["counted_over_sent"] - 1
        worst = large.loc[[off.abs().idxmax()]].iloc[0]
        notes.append(
            f"Where a rank sends over 512 KiB a step, counted and analytic bytes differ by "
            f"{100 * (worst['counted_over_sent'] - 1):+.2f} % at most ({worst['head']}, tp "
            f"{worst['tp_size']}, batch {worst['batch_size']})."
        )
    if len(small):
        added = small["protocol_bytes_per_row"] * small["batch_size"]
        notes.append(
            f"Where it sends under 4 KiB, the protocol adds {added.min():,.0f} to "
            f"{added.max():,.0f} bytes a step and rank."
        )
    return notes


def _wire_chart(
    run: RunFolder, sending: pd.DataFrame, batch_size: int, cell: tuple[int, int]
) -> str:
    sizes = sorted(sending["tp_size"].unique())
    batch = sending[(sending["batch_size"] == batch_size) & (sending["sent_bytes_per_row"] > 0)]
    key, title = f"wire-{run.letter}-b{batch_size}", f"Bytes sent for a row, batch {batch_size}"
    chart = Chart(key, title, cell)
    draw_bytes(chart.axes, batch, run.heads, sizes)
    known = sending[["sent_bytes_per_row", "counted_bytes_per_row"]].replace(0, np.nan)
    if known.notna().any(axis=None):
        chart.axes.set_ylim(0.5 * known.min().min(), 2 * known.max().max())
    chart.axes.set_xlabel("tp_size (ranks)")
    places = byte_places(batch, run.heads, sizes)
    for x, row in zip(places, batch.to_dict("records"), strict=True):
        counted = row["counted_bytes_per_row"]
        shown = "not counted" if pd.isna(counted) else f"{counted:,.0f} counted"
        sent = row["sent_bytes_per_row"]
        chart.point(x, sent, f"{row['head']}, tp {row['tp_size']}: {sent:,.0f} B analytic, {shown}")
    return chart.html()


def device_counts_section(run: RunFolder) -> Section:
    """NVLink, PCIe and memory bytes by NVML; a counter that is missing is named with its reason."""
    title = "Bytes that GPUs counted"
    counts = pd.DataFrame(
        [
            {
                "batch_size": record.batch_size,
                "tp_size": record.tp_size,
                "head": record.head,
                "counter": count.name,
                "counted_bytes_per_step": count.bytes_per_step,
                "analytic_bytes_per_step": count.analytic_bytes_per_step,
                "reason": count.reason,
            }
            for record in run.records
            for count in record.device_counts
        ]
    )
    if counts.empty:
        whys = {r.device_counts_reason for r in run.records if r.device_counts_reason}
        missing = "; ".join(sorted(whys)) or "no GPU had any of these counters"
        return Section("device_counts", title, missing=missing)
    unknown = counts[counts["counted_bytes_per_step"].isna()]
    reasons = sorted(set(unknown["counter"] + " is missing because " + unknown["reason"] + "."))
    frame = counts.drop(unknown.index).drop(columns="reason").reset_index(drop=True)
    if frame.empty:
        return Section("device_counts", title, missing=" ".join(reasons))
    notes = [
        "Bytes of a step over all ranks, and of anything else that uses the same GPU or link. "
        "Counters named gpm, and memory, come from rates between two samples.",
        *reasons,
    ]
    return Section("device_counts", title, notes, frame)


def roofline_section(run: RunFolder) -> Section:
    """Share of the memory bandwidth that the same ranks reached in a plain read, in this run."""
    methods = dict.fromkeys(record.memory_bandwidth_method for record in run.records)
    notes = [
        "Bytes that a step must read over compute time, as a share of a plain read by the same "
        "ranks. Above 100 %: some bytes came from a cache. On grey: isolated compute.",
        *(f"Bandwidth: {method}." for method in methods),
    ]
    frame = table_frame(run.frame, "roofline")
    charts, columns = by_batch(run, partial(_roofline_chart, run))
    title, legend = "Share of the memory bandwidth", head_legend(run.heads)
    return Section("roofline", title, notes, frame, charts, columns, legend)


def _roofline_chart(run: RunFolder, batch_size: int, cell: tuple[int, int]) -> str:
    batch = run.frame[run.frame["batch_size"] == batch_size]
    key, title = f"roofline-{run.letter}-b{batch_size}", f"Share of bandwidth, batch {batch_size}"
    text = "{:.0%} of a plain read"
    chart = head_chart(key, title, batch, "roofline_share", text, run.heads, cell)
    chart.axes.axhline(1.0, color=GREY, linestyle=":", linewidth=1.2)
    chart.axes.set_ylim(0, max(1.2, 1.15 * run.frame["roofline_share"].max()))
    chart.axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return chart.html()


def first_of_each_size(run: RunFolder) -> pd.DataFrame:
    """A row a head and `tp_size`, for figures that no batch size changes."""
    frame = run.frame.sort_values("tp_size", kind="stable")
    groups = frame.groupby(["head", "tp_size"])["workspace_bytes_per_rank"]
    frame = frame.assign(workspace_bytes_per_rank=groups.transform("max"))
    return frame.drop_duplicates(["tp_size", "head"])


def memory_section(run: RunFolder) -> Section:
    """Weights, peak and workspace by head and `tp_size`."""
    frame = first_of_each_size(run)
    notes = [
        "Weights: of the rank that holds most. Peak: most that a rank allocated while it loaded "
        "the head and ran it once."
    ]
    if frame["workspace_bytes_per_rank"].notna().any():
        notes.append("Workspace: most that a step allocates beyond weights, over batch sizes.")
    reasons = set(frame.loc[frame["peak_bytes_per_rank"].isna(), "peak_reason"])
    notes += [f"Peaks are missing because {reason}." for reason in sorted(reasons, key=str)]
    charts = []
    titles = {"weight": "Weights of a rank", "peak": "Peak of a rank while loading"}
    for place, (key, title) in enumerate(titles.items(), start=1):
        column = f"{key}_bytes_per_rank"
        known = frame[frame[column].notna()]
        if len(known):
            known = known.assign(measured=True, megabytes=known[column] / 1e6)
            name, text, cell = f"memory-{key}-{run.letter}", "{:,.1f} MB", (place, 2)
            chart = head_chart(name, title, known, "megabytes", text, run.heads, cell)
            log_numbers(chart.axes)
            chart.axes.set_ylabel("MB")
            charts.append(chart.html())
    legend = head_legend(run.heads)
    return Section(
        "memory", "Memory of a rank", notes, table_frame(frame, "memory"), charts, 2, legend
    )


def fidelity_section(run: RunFolder) -> Section:
    """Agreement with the dense head; the chart shows each head's worst `tp_size`."""
    title = "Agreement with the dense head"
    frame = first_of_each_size(run)
    frame = frame[frame["top1_agreement"].notna()]
    if frame.empty:
        why = (
            "a synthetic model has no test states"
            if run.first.synthetic
            else "the run took no test states (--max-states 0)"
        )
        return Section("fidelity", title, missing=why)
    notes = [
        "Recall@1 with its 95 % Wilson interval. The dense argmax is computed in float32 with ties "
        "to the smaller id. The worst of many sources is chosen after the fact: one miss of 20 "
        "states is 5 %."
    ]
    rounding = [name for name in run.heads if name in HEADS and HEADS[name].rounds_logits]
    if rounding:
        notes.append(
            f"{' and '.join(rounding)}: logits are rounded to {run.first.dtype} and many tie, so "
            f"the misses are ties."
        )
    legend = [("o", "all test states"), ("hollow", "worst source of texts")]
    chart, frame = _fidelity_chart(run, frame), table_frame(frame, "fidelity")
    return Section("fidelity", title, notes, frame, [chart], 1, legend)


def _fidelity_chart(run: RunFolder, frame: pd.DataFrame) -> str:
    worst = frame.loc[frame.groupby("head", sort=False)["top1_agreement"].idxmin()]
    chart = Chart(
        f"fidelity-{run.letter}", "Recall@1 at the worst tp_size", height_px=70 + 26 * len(worst)
    )
    axes = chart.axes
    for y, row in enumerate(worst.to_dict("records")):
        style = style_of(row["head"])
        share, source = row["top1_agreement"], row["top1_agreement_worst_source"]
        low, high = row["top1_agreement_low"], row["top1_agreement_high"]
        axes.hlines(y, low, high, color=style["color"], linewidth=1.4)
        shown, label = f"{row['head']}, tp {row['tp_size']}", f"{100 * share:.2f}"
        if not pd.isna(source):
            text = f"{shown}: {100 * source:.1f} % in {row['worst_source']}"
            text += f" ({row['num_worst_source_states']:.0f} states)"
            axes.hlines(y, source, share, color=style["color"], lw=0.6, alpha=0.5)
            chart.point(source, y, text, **style | {"markerfacecolor": "white"})
            label += f" / {100 * source:.1f}"
        chart.point(share, y, f"{shown}: {100 * share:.2f} %", **style)
        axes.text(1.05, y, label, va="center", fontsize=7.5)
    axes.set_yticks(range(len(worst)), worst["head"])
    axes.set_ylim(len(worst) - 0.5, -0.5)
    axes.set_xlim(0, 1.33)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    return chart.html()


def ranges_section(run: RunFolder) -> Section:
    """Median time of each range on each rank, kernels and communication under it.

    Raises:
        UserError: the run's profile cannot be read.
    """
    title = "Ranges of a profiled run"
    profile = _profile_of(run)
    if profile is None or profile.timeline is None:
        return Section("ranges", title, missing=_no_profile(run, ""))
    frame = pd.concat(
        medians(frame).assign(capture=str(capture))
        for capture, frame in profile.timeline.groupby("capture", sort=False)
    )
    note = (
        "Medians over a capture. Tracing disturbs the times, but hardly the share of a part. "
        "Kernels and communication count for the range that launched them."
    )
    return Section(
        "ranges", title, (note, *_missing_notes(profile.timeline)), _known_columns(frame)
    )


def kernels_section(run: RunFolder) -> Section:
    """DRAM bytes, L2 hit rate and bandwidth of each kernel, by Nsight Compute.

    Raises:
        UserError: the run's profile cannot be read.
    """
    title = "Counters of a profiled run's kernels"
    profile = _profile_of(run)
    if profile is None or profile.counters is None:
        return Section("kernels", title, missing=_no_profile(run, "--counters "))
    frame = profile.counters.groupby(["kernel", "rank"], sort=False).median().reset_index()
    note = (
        "Medians over launches. Nsight Compute isolates each kernel, with a cold cache and fixed "
        "clocks: its times are not those of a step."
    )
    return Section(
        "kernels", title, (note, *_missing_notes(profile.counters)), _known_columns(frame)
    )


def _profile_of(run: RunFolder) -> Profile | None:
    folder = run.folder / PROFILE_NAME
    return _read(folder) if folder.is_dir() else None


@lru_cache(maxsize=8)
def _read(folder: Path) -> Profile:
    try:
        return read_profile(folder)
    except TraceError as error:
        raise UserError(str(error)) from error


def _no_profile(run: RunFolder, option: str) -> str:
    folder = f"{run.folder.name}/{PROFILE_NAME}"
    return f"no profile was taken: launch/profile.sh {option}--output {folder} -- launch/scale.py"


def _missing_notes(frame: pd.DataFrame) -> list[str]:
    return [f"{name} is missing because {why}." for name, why in frame.attrs["missing"].items()]


def _known_columns(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.dropna(axis="columns", how="all").reset_index(drop=True)


RESOURCE_SECTIONS = (
    fidelity_section, wire_section, device_counts_section, roofline_section, memory_section,
    ranges_section, kernels_section,
)  # fmt: skip
