"""System files: a figure without its source, a damaged file and a file in the way are refused.

Each refusal was seen to fail with its check taken out of `system_document` or `systems`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from flashhead_topology.systems import (
    Level,
    Source,
    System,
    SystemFileError,
    levels_within,
    list_systems,
    load_link,
    load_system,
    save_system,
)

MEASURED = Source("measured", "launch/calibrate.py", relative_error=0.04)
NODE = Level("shared_memory", 2, 6e-5, 4e-10, sources=dict.fromkeys(
    ("alpha_s", "beta_s_per_byte"), MEASURED))  # fmt: skip
NETWORK = Level("ethernet", 8, 3e-4, 8e-9, base_s=1e-5, sources=dict.fromkeys(
    ("alpha_s", "beta_s_per_byte", "base_s"), MEASURED))  # fmt: skip
BOX = System(
    name="box-2",
    device="a CPU",
    memory_bandwidth_bytes_per_s=24e9,
    launch_s=1e-5,
    levels=(NODE, NETWORK),
    description="two cores a host, four hosts",
    sources=dict.fromkeys(("memory_bandwidth_bytes_per_s", "launch_s"), MEASURED),
)


def edited(folder: Path, edit: dict[str, object]) -> Path:
    """A file of BOX with top-level keys replaced, or removed where the value is None."""
    path = folder / "box.yaml"
    save_system(BOX, path)
    document = yaml.safe_load(path.read_text()) | edit
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    return path


def test_a_saved_system_is_read_back_equal(tmp_path: Path) -> None:
    save_system(BOX, tmp_path / "sub" / "box.yaml")
    assert load_system(tmp_path / "sub" / "box.yaml") == BOX
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["box.yaml"]


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_text("mine")
    with pytest.raises(SystemFileError, match=r"box\.yaml is there already"):
        save_system(BOX, path)
    assert path.read_text() == "mine"
    save_system(BOX, path, overwrite=True)
    assert load_system(path) == BOX


def test_a_figure_without_a_source_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SystemFileError, match="peak_flop_per_s of box-2 has no source"):
        save_system(replace(BOX, peak_flop_per_s=1e12), tmp_path / "box.yaml")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemFileError, match="cannot write"):
        save_system(BOX, tmp_path / "file" / "box.yaml")


def test_a_link_is_read_by_name(tmp_path: Path) -> None:
    path = edited(tmp_path, {"levels": [{"link": "nvlink_4", "ranks": 4}]})
    (level,) = load_system(path).levels
    assert level == load_link("nvlink_4", 4)
    assert level.ranks == 4
    assert level.sources["alpha_s"].source


@pytest.mark.parametrize("written", ["1e-6", 1e-6, "1.0e-06"])
def test_numbers_without_a_point_are_numbers(tmp_path: Path, written: object) -> None:
    """YAML 1.1 gives 1e-6 as a string."""
    entry = {"value": written, "kind": "assumed", "source": "a guess"}
    assert load_system(edited(tmp_path, {"launch_s": entry})).launch_s == 1e-6


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        ({"launch_s": 1e-6}, "launch_s must be {value, kind, source}"),
        ({"launch_s": {"value": 1e-6, "kind": "assumed"}}, "launch_s must be"),
        ({"launch_s": {"value": 1e-6, "kind": "guess", "source": "x"}}, "'guess' is none of"),
        ({"launch_s": {"value": 1e-6, "kind": "assumed", "source": " "}}, "source is empty"),
        ({"launch_s": {"value": -1, "kind": "assumed", "source": "x"}}, "cannot be below 0"),
        ({"launch_s": {"value": ".nan", "kind": "assumed", "source": "x"}}, "give a number"),
        ({"launch_s": {"value": float("nan"), "kind": "assumed", "source": "x"}}, "finite"),
        ({"launch_s": {"value": True, "kind": "assumed", "source": "x"}}, "give a number"),
        ({"launch_s": None}, "launch_s is missing"),
        ({"memory_bandwidth_bytes_per_s": None}, "memory_bandwidth_bytes_per_s is missing"),
        ({"memory_share": {"value": 1.2, "kind": "assumed", "source": "x"}}, "share lies between"),
        ({"schema_version": 2}, "schema_version is 2"),
        ({"name": None}, "name is None"),
        ({"name": "two words"}, "'two words' must be of letters"),
        ({"nvlink": 8}, "'nvlink' is unknown"),
        ({"levels": {"name": "a"}}, "levels must be a list"),
        ({"levels": [{"name": "a", "ranks": 1}]}, "alpha_s is missing"),
        ({"levels": [{"link": "nvlink_4", "ranks": "many"}]}, "ranks of a level is 'many'"),
        ({"levels": [{"link": "string", "ranks": 8}]}, "no link named 'string'"),
        ({"levels": [{"link": "nvlink_4", "ranks": 8}] * 2}, "each must join more"),
        ({"levels": [{"link": "nvlink_4", "ranks": 1}]}, "joins 1 ranks"),
    ],
)
def test_a_file_that_is_no_system_is_refused(
    tmp_path: Path, edit: dict[str, object], complaint: str
) -> None:
    path = edited(tmp_path, edit)
    with pytest.raises(SystemFileError) as caught:
        load_system(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"name: [", "is not YAML in line 1"),
        (b"- a list", "holds no mapping"),
        (b"", "holds no mapping"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "box.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemFileError, match=complaint) as caught:
        load_system(path)
    assert "box.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(SystemFileError, match=r"no system named 'h1000'.*h100"):
        load_system("h1000")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemFileError, match=r"cannot read .*none\.yaml"):
        load_system(tmp_path / "none.yaml")


@pytest.mark.parametrize(("ranks", "names"), [(1, 0), (2, 1), (3, 2), (8, 2)])
def test_a_group_crosses_the_levels_that_it_needs(ranks: int, names: int) -> None:
    assert BOX.levels_for(ranks) == (NODE, NETWORK)[:names]
    assert levels_within(BOX.levels, ranks) == (NODE, NETWORK)[:names]


@pytest.mark.parametrize(("ranks", "complaint"), [(0, "at least one"), (9, "more than the 8")])
def test_a_group_that_the_system_does_not_join_is_refused(ranks: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BOX.levels_for(ranks)


@pytest.mark.parametrize("name", list_systems())
def test_every_shipped_figure_says_where_it_is_from(name: str) -> None:
    system = load_system(name)
    assert system.name == name
    assert system.max_ranks == 1024
    for holder in (system, *system.levels):
        figures = {field.name for field in fields(holder) if is_figure(holder, field.name)}
        assert figures == set(holder.sources), holder.name
        for source in holder.sources.values():
            published = source.kind in ("data sheet", "published", "measured")
            assert source.source.startswith("https://") or not published
            assert source.note or source.kind != "derived"


def is_figure(holder: System | Level, name: str) -> bool:
    """Whether the field holds a figure that is not left at its default."""
    value, default = getattr(holder, name), type(holder).__dataclass_fields__[name].default
    return isinstance(value, float) and value != default


def test_shipped_systems_cover_what_the_model_is_asked_for() -> None:
    names = list_systems()
    for gpu in ("l40", "a100", "h100", "h200", "b200"):
        assert {f"{gpu}-infiniband", f"{gpu}-ethernet"} <= set(names)
    inner = {load_system(name).levels[0].name for name in names}
    assert inner == {"pcie_4", "nvlink_3", "nvlink_4", "nvlink_5"}


def test_newer_and_faster_parts_have_the_better_figures() -> None:
    """A slipped exponent in a file would show here: mutated 2.70e-12 to 2.70e-11, it did."""
    bandwidths = [
        load_system(f"{gpu}-infiniband").memory_bandwidth_bytes_per_s
        for gpu in ("l40", "a100", "h100", "h200", "b200")
    ]
    assert bandwidths == sorted(bandwidths)
    assert 1.5 < bandwidths[2] / bandwidths[1] < 2
    betas = [
        load_link(name, 8).beta_s_per_byte
        for name in ("pcie_4", "nvlink_3", "nvlink_4", "nvlink_5")
    ]
    assert betas == sorted(betas, reverse=True)
    assert 1.3 < betas[1] / betas[2] < 2
    assert 1.3 < betas[2] / betas[3] < 2.2
    networks = ("infiniband_ndr_x8", "roce_400g_x8", "infiniband_hdr_x8", "roce_100g_x8")
    wide = [load_link(name, 1024).beta_s_per_byte for name in networks]
    assert wide == sorted(wide)
    tcp, rdma = load_link("ethernet_100g_x1", 1024), load_link("roce_100g_x8", 1024)
    assert tcp.alpha_s > 5 * rdma.alpha_s
    assert 4 < tcp.beta_s_per_byte / rdma.beta_s_per_byte < 10
