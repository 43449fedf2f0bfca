"""Nsight Compute's tables: units, missing metrics, and what is no table of kernels."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from flashhead_profiles.readers import read_ncu
from flashhead_profiles.traces import TraceError

HEADER = '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum"'
MORE = ',"dram__bytes_write.sum","lts__t_sector_hit_rate.pct"'
WHOLE = f"""==PROF== Disconnected
{HEADER}{MORE}
"","","ns","byte","byte","%"
"0","dots_kernel","10,000","40,000,000","2,000,000","25"
"1","one, with a comma","n/a","1","1","0"
"""


def write(folder: Path, text: str, name: str = "counters_rank3.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_times_bytes_hits_and_bandwidth_in_base_units(tmp_path: Path) -> None:
    frame = read_ncu(write(tmp_path, WHOLE))
    row = frame.iloc[0]
    assert (row["kernel"], row["rank"], row["time_us"]) == ("dots_kernel", 3, 10)
    assert (row["dram_read_bytes"], row["dram_written_bytes"]) == (40e6, 2e6)
    assert row["l2_hit_rate"] == 0.25
    assert row["achieved_bytes_per_s"] == pytest.approx(4.2e12)
    assert frame.attrs["missing"] == {}
    # What ncu could not measure is no zero.
    assert frame.iloc[1][["time_us", "achieved_bytes_per_s"]].isna().all()


def test_columns_and_rows_in_another_order_give_the_same_table(tmp_path: Path) -> None:
    """Columns between those that are read, and kernels not in the order of their launches."""
    names = ["Process ID", "lts__t_sector_hit_rate.pct", "Kernel Name", "Device", "ID"]
    names += ["dram__bytes_write.sum", "dram__bytes_read.sum", "gpu__time_duration.sum"]
    lines = [
        ["", "%", "", "", "", "byte", "byte", "ns"],
        ["9", "0", "one, with a comma", "0", "10", "1", "1", "n/a"],
        ["9", "25", "dots_kernel", "0", "2", "2,000,000", "40,000,000", "10,000"],
    ]
    text = "\n".join(",".join(f'"{value}"' for value in line) for line in [names, *lines])
    shuffled = read_ncu(write(tmp_path, text + "\n"))
    pd.testing.assert_frame_equal(shuffled, read_ncu(write(tmp_path, WHOLE)))


def test_a_metric_that_was_not_collected_is_missing(tmp_path: Path) -> None:
    text = f'{HEADER}\n"","","us","byte"\n"0","dots_kernel","10","40"\n'
    frame = read_ncu(write(tmp_path, text), rank=0)
    assert frame["l2_hit_rate"].isna().all()
    assert frame["achieved_bytes_per_s"].isna().all()
    assert set(frame.attrs["missing"]) == {"dram_written_bytes", "l2_hit_rate"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("==ERROR== no kernels were profiled\n", "no table of kernels"),
        (f'{HEADER}\n"","","ns","byte"\n', "holds no kernel"),
        (WHOLE.replace('"byte","byte"', '"Mbyte","byte"'), "print-units base"),
    ],
)
def test_what_is_no_table_of_ours_is_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        read_ncu(write(tmp_path, text))


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nothing\.csv"):
        read_ncu(tmp_path / "nothing.csv")
