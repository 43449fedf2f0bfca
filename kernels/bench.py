"""Time the head kernels on a GPU: FlashHead beside dense heads and the published operations.

    python kernels/bench.py                    all models, tp sizes and batch sizes, on the GPU
    python kernels/bench.py --models gemma-3-270m --tp-sizes 1 --batch-sizes 1 --json
    python kernels/bench.py --device cpu --synthetic 4096,64 --iters 5     the same code on a CPU

Ways to the greedy token of one rank's shard, interleaved, on synthetic weights that are rotated
past the cache. Each way is checked against its definition before it is timed. A way that gives a
wrong token or fails is left out, the others are measured, and the exit code is 1. A token whose
logit ties with the best within the rounding of the sum is counted and right.

    flashhead               the project's kernel, one launch or two as it chooses
    flashhead_two_launches  centroid scores first, then candidates (where the device has both)
    dense_fused             the project's dense kernel: rows scored and reduced in one scan
    dense_torch             torch.nn.functional.linear and max
    published_eager         FlashHead as published (arXiv 2603.14591) in eager torch: C = V/16
                            unit-norm centroids, p = C/16 probes, matmul, topk, gather, bmm, argmax
    published_graph         the same in a CUDA graph, where torch can capture it

A figure at tp P is rank 0's work out of P on one device; nothing is exchanged. Written into --out:
kernels.csv, kernels.md (to be committed) and environment.json.

Exit codes: 0, 1 for a way that failed, 2 for a mistake or a device out of memory, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench_cell import Bench, Measurement, measure_shard
from bench_shapes import GROUPS, MODELS, SCALE_GROUP, SMALLEST_VOCABULARY, Shape
from bench_ways import DENSE_TORCH, FLASHHEAD, PUBLISHED_EAGER
from flashhead_dist.bench.environment import software_versions, source_commit
from flashhead_dist.progress import progress
from flashhead_kernels import launch_choice
from flashhead_kernels.dispatch import ops_for
from flashhead_kernels.timing import clock_of
from flashhead_topology.probe import probe_machine

_ROOT = Path(__file__).resolve().parent.parent
_INTERRUPTED = 130
CSV_NAME, MARKDOWN_NAME, ENVIRONMENT_NAME = "kernels.csv", "kernels.md", "environment.json"
TARGET_DEVICE = "H200"
_BANDWIDTH_FACTOR, _FIXED_US = 1.5, 4.0
_TARGET_RATIOS = {DENSE_TORCH: 5.0, PUBLISHED_EAGER: 3.0}


class MistakeError(Exception):
    """What the user can correct, in one sentence."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", metavar="NAME,NAME", help=f"default: all, {','.join(MODELS)}")
    parser.add_argument("--synthetic", metavar="V,D", help="a shape of your own in their place")
    parser.add_argument("--tp-sizes", type=_integers, default=[1, 2, 4, 8], metavar="N,N")
    parser.add_argument(
        "--batch-sizes", type=_integers, default=[1, 2, 4, 8, 16, 32], metavar="N,N"
    )
    parser.add_argument("--iters", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: docs/results/<GPU>, on a CPU runs/kernels"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


_integers.__name__ = "comma-separated integers"  # argparse names it so where it fails


def choose_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """The shapes asked for; raises MistakeError."""
    if arguments.synthetic is None:
        names = list(MODELS) if arguments.models is None else arguments.models.split(",")
        for name in names:
            if name not in MODELS:
                raise MistakeError(f"--models holds {name!r}: give some of {','.join(MODELS)}")
        return [MODELS[name] for name in dict.fromkeys(names)]
    if arguments.models is not None:
        raise MistakeError("--models and --synthetic exclude each other: give one of them")
    match = re.fullmatch(r"(\d+),(\d+)", arguments.synthetic)
    if match is None:
        raise MistakeError(
            f"--synthetic {arguments.synthetic} is not V,D: give two integers such as 4096,64"
        )
    vocab_size, hidden_size = int(match[1]), int(match[2])
    if vocab_size < SMALLEST_VOCABULARY:
        raise MistakeError(
            f"--synthetic has a vocabulary of {vocab_size}: give {SMALLEST_VOCABULARY} or more"
        )
    if hidden_size < 1 or hidden_size % SCALE_GROUP:
        raise MistakeError(
            f"--synthetic has a hidden size of {hidden_size}: give a multiple of {SCALE_GROUP}"
        )
    return [Shape(f"synthetic-{vocab_size}-{hidden_size}", vocab_size, hidden_size)]


def check(arguments: argparse.Namespace) -> None:
    """Refuse numbers and devices that cannot be served; raises MistakeError."""
    for flag, numbers in (
        ("--iters", [arguments.iters]),
        ("--tp-sizes", arguments.tp_sizes),
        ("--batch-sizes", arguments.batch_sizes),
    ):
        if min(numbers) < 1:
            raise MistakeError(f"{flag} holds {min(numbers)}: give 1 or more")
    if max(arguments.tp_sizes) > GROUPS:
        raise MistakeError(
            f"--tp-sizes holds {max(arguments.tp_sizes)}: give {GROUPS} or less, one group a rank"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise MistakeError(
            "torch finds no CUDA device: run this on a machine with an NVIDIA GPU and a CUDA build "
            "of torch, or give --device cpu to run the same code on the CPU"
        )


def make_folder(arguments: argparse.Namespace, name: str) -> Path:
    """The folder for files, made before anything is timed; raises MistakeError."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    where = Path("runs", "kernels") if arguments.device == "cpu" else Path("docs", "results")
    folder: Path = arguments.out or _ROOT / where / slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MistakeError(
            f"{folder} cannot be made ({error.strerror}): give another --out"
        ) from error
    return folder


def device_name(device: str) -> str:
    """Name of the GPU, or of the CPU and its threads, which labels every figure."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{probe_machine().cpu_model} (CPU, {torch.get_num_threads()} threads)"


def measure(
    bench: Bench, shapes: Sequence[Shape], arguments: argparse.Namespace, found: list[Measurement]
) -> None:
    """Measure all cells into `found`, so that what ends it early leaves the earlier ones."""
    tp_sizes, batch_sizes = sorted(set(arguments.tp_sizes)), sorted(set(arguments.batch_sizes))
    total = len(shapes) * len(tp_sizes) * len(batch_sizes)
    with progress("kernels", total=total, unit="cells") as advance:
        for shape in shapes:
            for tp_size in tp_sizes:
                # Not extend: what ends it early must leave these.
                for one in measure_shard(bench, shape, tp_size, batch_sizes, advance):
                    found.append(one)


def judge(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The targets for each model at tp 1 and batch 1: `text`, and `met`, None on another device."""
    verdicts: list[dict[str, Any]] = []
    single = frame[(frame["tp_size"] == 1) & (frame["batch_size"] == 1)]
    for model, rows in single.groupby("model", sort=False):
        by_way = rows.set_index("way").to_dict("index")
        own = by_way.get(FLASHHEAD)
        if own is None:
            continue
        limit_us = _BANDWIDTH_FACTOR * own["read_bytes"] / own["copy_gb_per_s"] / 1e3 + _FIXED_US
        text = f"flashhead {own['median_us']:.1f} us, target at most 1.5 x bytes / copy bandwidth"
        found = [(f"{text} + 4 us = {limit_us:.1f} us", own["median_us"] <= limit_us)]
        for way, least in _TARGET_RATIOS.items():
            if way in by_way:
                ratio = by_way[way]["times_flashhead"]
                text = f"{ratio:.1f} times as fast as {way}, target {least:.0f}"
                found.append((text, ratio >= least))
        for text, met in found:
            judged = TARGET_DEVICE in own["device"]
            outcome = ("MET" if met else "MISSED") if judged else "not judged"
            text = f"{model}, tp 1, batch 1: {text}: {outcome}"
            verdicts.append({"text": text, "met": bool(met) if judged else None})
    return verdicts


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: flashhead's figures, and how many times as long every other way takes."""
    cell = ["model", "tp_size", "batch_size"]
    own = frame[frame["way"] == FLASHHEAD].set_index(cell)
    table = own[["median_us", "p10_us", "p90_us"]].round(1)
    table["read_MB"] = (own["read_bytes"] / 1e6).round(1)
    table["of_copy_%"] = (100 * own["share_of_copy"]).round(0)
    others = frame[frame["way"] != FLASHHEAD]
    ratios = others.pivot(index=cell, columns="way", values="times_flashhead").round(2)
    return table.join(ratios, how="left").reset_index()


def markdown(frame: pd.DataFrame, environment: Mapping[str, Any], lines: Sequence[str]) -> str:
    """A page with environment, verdicts and table, to be committed as it is."""
    table = summary(frame)
    rows = [table.columns, ["---"] * len(table.columns), *table.fillna("").astype(str).to_numpy()]
    versions = environment["versions"]
    incomplete = [] if environment["complete"] else ["INCOMPLETE: the run ended early.", ""]
    return "\n".join(
        [
            f"# Head kernels on {environment['device']}",
            "",
            *incomplete,
            f"Driver {environment['driver']}, torch {versions.get('torch')}, triton "
            f"{versions.get('triton', 'none')}, {environment['operations']}, commit "
            f"{environment['commit']}, {environment['time_utc'][:10]}. {environment['timing']}",
            "SYNTHETIC weights. A figure at tp P is one rank's work. Last columns: how many times "
            "as long as flashhead a way takes.",
            "",
            *(f"- {line}" for line in lines),
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    )


def make_environment(
    bench: Bench, arguments: argparse.Namespace, *, complete: bool
) -> dict[str, Any]:
    """What the figures depend on. complete: all cells were measured."""
    on_gpu = bench.clock.device.type == "cuda"
    timing = (
        f"CUDA events around graph replays; weights rotated past {bench.clock.cache_bytes:,} bytes "
        f"of cache."
        if on_gpu
        else "CPU: wall clock, no graphs, caches not emptied: it shows that the code runs, not how "
        "fast a GPU is."
    )
    return {
        "device": bench.device_name,
        "driver": _driver() if on_gpu else "none",
        "cache_bytes": bench.clock.cache_bytes,
        "operations": bench.ops.__name__,
        "launches": launch_choice.table.choices(),
        "timing": timing,
        "versions": software_versions(),
        "commit": source_commit(),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": complete,
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def report(
    bench: Bench, found: Sequence[Measurement], environment: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Print and write what was measured; returns the JSON document. OSError: not written."""
    frame = pd.DataFrame([one.as_dict() for one in found])
    verdicts = judge(frame)
    checked, ties = frame["num_checked"].sum(), frame["num_ties"].sum()
    notes = [*bench.notes, *(f"FAILED: {failure}" for failure in bench.failures)]
    notes.append(f"{checked:,} tokens were checked, {ties:,} of them ties within rounding")
    lines = [*notes, *(verdict["text"] for verdict in verdicts)]
    print(f"{bench.device_name}: SYNTHETIC weights, ONE rank's work")
    print(summary(frame).to_string(index=False, na_rep=""))
    print(*lines, sep="\n")
    texts = {
        CSV_NAME: frame.to_csv(index=False),
        MARKDOWN_NAME: markdown(frame, environment, lines),
        ENVIRONMENT_NAME: json.dumps(environment, indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"written: {', '.join(str(folder / name) for name in texts)}")
    return {
        "environment": environment,
        "notes": notes,
        "failures": bench.failures,
        "verdicts": verdicts,
        "results": frame.to_dict("records"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    arguments = _parser().parse_args(argv)
    try:
        shapes = choose_shapes(arguments)
        check(arguments)
        ops = ops_for(arguments.device)
        name = device_name(arguments.device)
        folder = make_folder(arguments, name)
    except (MistakeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clock = clock_of(torch.device(arguments.device))
    bench = Bench(name, clock, ops, arguments.iters, seed=0)
    found: list[Measurement] = []
    errors, code, complete = bench.failures, 0, False
    try:
        measure(bench, shapes, arguments, found)
        complete = True
    except KeyboardInterrupt:
        errors, code = [*bench.failures, "interrupted"], _INTERRUPTED
    except torch.OutOfMemoryError:
        remedy = "the device is out of memory: give fewer --batch-sizes or larger --tp-sizes"
        errors, code = [*bench.failures, remedy], 2
    finally:
        # A kernel that fails keeps its traceback; what was measured before it is written first.
        if found:
            environment = make_environment(bench, arguments, complete=complete)
            try:
                document = report(bench, found, environment, folder)
            except OSError as error:
                refused = f"{folder} cannot be written ({error.strerror}): give another --out"
                errors, code = [*errors, refused], 2
            else:
                if arguments.json:
                    print(json.dumps(document))
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    return code or (1 if bench.failures else 0)


if __name__ == "__main__":
    sys.exit(main())
