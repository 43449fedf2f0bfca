"""launch/profile.sh: what it runs under which tool, and the torch.profiler route for real."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashhead_profiles.readers import read_profile

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "launch" / "profile.sh"
SCRIPT = """
import sys
from flashhead_profiles import ranges
from flashhead_profiles.ranges import annotate

with annotate(ranges.STEP):
    pass
for number in range(3):
    with annotate(ranges.CAPTURE, 2):
        with annotate(ranges.STEP, number), annotate(ranges.HEAD, 1, "flashhead"):
            pass
print("given", *sys.argv[1:])
"""
# Stands in for both tools: says what it was given, runs the rest, and leaves a report.
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
out=$(printf '%s\\n' "$@" | grep -oP -- '--output=\\K.*' || true)
[[ -n $out ]] || while (($#)); do [[ $1 == --export ]] && out=$2; shift; done
case "$(basename "$0") $(tail -1 "$CALLS" | cut -d' ' -f2)" in
    "nsys export") cp "$SQLITE" "$out" ;;
    "ncu --import") cat "$COUNTERS" ;;
    "nsys profile") : >"${out/\\%q\\{RANK\\}/$RANK}.nsys-rep" ;;
    *) : >"${out/\\%q\\{RANK\\}/$RANK}.ncu-rep" ;;
esac
"""
COUNTERS = (
    "==PROF== Connected to process 1\n"
    '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",'
    '"lts__t_sector_hit_rate.pct"\n'
    '"","","ns","byte","byte","%"\n'
    '"0","dots_kernel","20000","22,000,000","1000","12.5"\n'
    '"1","dots_kernel","22000","22,000,000","1000","12.5"\n'
)

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(*given: str | Path, tools: Path | None = None, **environment: str) -> tuple[int, str, str]:
    # Of the machine's own PATH only what has none of NVIDIA's tools.
    path = os.pathsep.join([*([str(tools)] if tools else []), "/usr/bin", "/bin"])
    done = subprocess.run(
        ["bash", PROFILE, *given],
        env=os.environ | {"PATH": path, "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("nsys", "ncu"):
        (folder / name).write_text(TOOL)
        (folder / name).chmod(0o755)
    return folder


def test_torch_profiler_traces_every_ranks_captures_and_prints_them(
    tmp_path: Path, script: Path
) -> None:
    out = tmp_path / "out"
    given = ("--torch", "--captures", "2", "--output", out, "--nproc-per-node", "2", "--", script)
    code, stdout, stderr = run(*given, "--heads", "flashhead")
    assert code == 0, stderr
    assert sorted(path.name for path in out.iterdir()) == [
        *("tp2_1_rank0.json", "tp2_1_rank1.json", "tp2_2_rank0.json", "tp2_2_rank1.json")
    ]
    assert stdout.count("given --heads flashhead") == 2
    assert "capture tp2_2" in stdout
    # The step before the first capture is warm-up.
    (row,) = [line for line in stdout.splitlines() if "step" in line and "│    1 │" in line][:1]
    assert row.split("│")[4].strip() == "1"
    assert "kernels_us is missing" in stdout


def test_two_nodes_bear_global_ranks_and_are_read_together(tmp_path: Path, script: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(number: int) -> tuple[int, str, str]:
        place = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1")
        given = ("--torch", "--captures", "1", "--output", tmp_path / f"node{number}", *place)
        return run(*given, "--master-port", str(port), "--", script)

    with ThreadPoolExecutor(2) as pool:
        for code, _, stderr in pool.map(node, (0, 1)):
            assert code == 0, stderr
    for number in (0, 1):
        (report,) = (tmp_path / f"node{number}").iterdir()
        assert report.name == f"tp2_1_rank{number}.json"
        report.rename(tmp_path / "node0" / report.name)
    timeline = read_profile(tmp_path / "node0").timeline
    assert timeline is not None
    assert set(timeline["rank"]) == {0, 1}


@pytest.mark.parametrize(("tool", "option"), [("nsys", []), ("ncu", ["--counters"])])
def test_a_missing_tool_is_said_with_the_way_without_it(
    tmp_path: Path, script: Path, tool: str, option: list[str]
) -> None:
    if any(Path(folder, tool).exists() for folder in ("/usr/bin", "/bin")):
        pytest.skip(f"{tool} is installed")
    given = (*option, "--output", tmp_path / "out", "--nproc-per-node", "2", "--", script)
    code, _, stderr = run(*given, "--iters", "3")
    assert code == 2
    assert f"{tool} is not on the PATH" in stderr
    assert f"launch/profile.sh --torch --nproc-per-node 2 -- {script} --iters 3" in stderr


def test_nsys_wraps_every_rank_with_a_report_and_leaves_warm_up_out(
    tmp_path: Path, script: Path, tools: Path
) -> None:
    from tests.profiles.test_nsys import write

    calls, out = tmp_path / "calls", tmp_path / "out"
    code, stdout, stderr = run(
        *(
            "--output",
            out,
            "--nnodes",
            "1",
            "--nproc-per-node",
            "2",
            "--",
            script,
            "--tp-sizes",
            "2",
        ),
        tools=tools,
        CALLS=str(calls),
        SQLITE=str(write(tmp_path / "report.sqlite")),
    )
    assert code == 0, stderr
    profiles = [line for line in calls.read_text().splitlines() if "nsys profile" in line]
    assert len(profiles) == 2
    for wanted in (
        "--trace=cuda,nvtx",
        "--cuda-graph-trace=node",
        "--capture-range=nvtx --nvtx-capture=capture@flashhead",
        "--capture-range-end=repeat:4",
        f"--output={out}/rank%q{{RANK}}",
        f"{script} --tp-sizes 2",
    ):
        assert wanted in profiles[0]
    assert sorted(path.name for path in out.glob("*.sqlite")) == ["rank0.sqlite", "rank1.sqlite"]
    assert "head/centroids" in stdout


def test_counters_come_from_nsight_compute_by_kernel(
    tmp_path: Path, script: Path, tools: Path
) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    (tmp_path / "counters.csv").write_text(COUNTERS)
    code, stdout, stderr = run(
        *("--counters", "--output", out, "--", script),
        tools=tools,
        CALLS=str(calls),
        COUNTERS=str(tmp_path / "counters.csv"),
    )
    assert code == 0, stderr
    asked = calls.read_text().splitlines()[0]
    for wanted in ("dram__bytes_read.sum", "lts__t_sector_hit_rate.pct", "flashhead@capture/"):
        assert wanted in asked
    # It would wait for a peer that ncu does not replay with it.
    assert "exchange_kernel" not in asked
    assert "dots_kernel" in stdout
    assert "21.0" in stdout


def test_mistakes_are_sentences(tmp_path: Path, script: Path) -> None:
    for given, says in (
        (("--torch",), "no script was given"),
        (("--torch", "--", tmp_path / "none.py"), "there is no script"),
        (("--captures", "0", "--", script), "--captures is 0"),
    ):
        code, _, stderr = run(*given)
        assert code == 2
        assert says in stderr
        assert "Traceback" not in stderr
    code, stdout, _ = run("--help")
    assert code == 0
    assert "--counters" in stdout
    assert "set -euo" not in stdout


def test_mistakes_in_tracing_one_rank_are_sentences(tmp_path: Path, script: Path) -> None:
    (tmp_path / "file").write_text("")
    for given, says in (
        (("--traces", tmp_path / "file", script), "name another --traces"),
        (("--traces", tmp_path / "out", tmp_path / "none.py"), "there is no script"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "launch" / "trace.py", *given], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr
