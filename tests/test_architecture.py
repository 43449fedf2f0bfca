"""The floors of the house: who may import whom, and what may call torch.distributed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {
    "flashhead_kernels": ROOT / "kernels" / "flashhead_kernels",
    "flashhead_topology": ROOT / "topology" / "flashhead_topology",
    "flashhead_profiles": ROOT / "profiles" / "flashhead_profiles",
}
# From the top floor down: a part imports from parts behind it in this list only.
FLOORS = [
    "report", "serving", "generation", "tune", "evaluate", "integrations", "measure", "decode",
    "heads", "index", "hidden_states", "collectives", "collective_calls", "model_source",
    "progress", "errors",
]  # fmt: skip
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor", "reduce_scatter",
    "broadcast", "all_gather_object", "broadcast_object_list", "send", "recv", "barrier",
}  # fmt: skip


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", GROUND)
def test_the_ground_floor_knows_nobody(package: str) -> None:
    strangers = {"flashhead_dist", "launch", "tests", *GROUND} - {package}
    for path in python_files(GROUND[package]):
        for module in imported_modules(path):
            assert module.split(".")[0] not in strangers, f"{path.name} imports {module}"


def floor_of(path: Path) -> str:
    part = path.relative_to(ROOT / "flashhead_dist").parts[0]
    return part.removesuffix(".py")


def test_floors_import_downwards() -> None:
    files = [p for p in python_files(ROOT / "flashhead_dist") if floor_of(p) != "__init__"]
    assert len(files) > 20
    for path in files:
        own = floor_of(path)
        assert own in FLOORS or own == "corpus", f"{own} has no floor in this test"
        for module in imported_modules(path):
            parts = module.split(".")
            assert parts[0] not in {"launch", "tests"}, f"{path} imports {module}"
            if parts[0] != "flashhead_dist" or len(parts) == 1 or own == "corpus":
                continue
            other = parts[1]
            if other != own and other in FLOORS:
                assert FLOORS.index(own) < FLOORS.index(other), f"{path} imports {module}"


def test_only_collectives_exchanges_between_ranks() -> None:
    for path in python_files(ROOT / "flashhead_dist"):
        if floor_of(path) in {"collectives", "collective_calls"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
                owner = ast.unparse(node.value)
                assert owner not in {"dist", "torch.distributed"}, (
                    f"{path}:{node.lineno} calls {owner}.{node.attr}: go through collectives"
                )


def test_source_folders_are_not_import_packages() -> None:
    for folder in ("launch", "kernels", "topology", "profiles"):
        assert not (ROOT / folder / "__init__.py").exists()


_WHAT_IS_KERNELS = """
import importlib, json, os, sys
from pathlib import Path
import transformers.utils.import_utils as detection

def seen_from(place):
    os.chdir(place)  # sys.path starts with the current folder, as under python -c and -m
    sys.modules.pop("kernels", None)
    importlib.invalidate_caches()
    detection.is_kernels_available.cache_clear()
    available = detection.is_kernels_available()
    try:
        file = importlib.import_module("kernels").__file__
    except ImportError:
        file = None
    return [available, file]

site, *places = map(Path, sys.argv[1:])
without = [seen_from(place) for place in places]
metadata = site / "kernels-1.dist-info" / "METADATA"
metadata.parent.mkdir()
version = detection.KERNELS_MIN_VERSION
metadata.write_text(f"Metadata-Version: 2.1\\nName: kernels\\nVersion: {version}\\n")
sys.path.insert(1, str(site))
print(json.dumps([without, [seen_from(place) for place in places]]))
"""


def test_transformers_sees_the_same_kernels_package_from_here_as_from_elsewhere(
    tmp_path: Path,
) -> None:
    """The folder `kernels/` must not stand in for the Hugging Face package of that name."""
    site, elsewhere, shadowing = (tmp_path / name for name in ("site", "elsewhere", "shadowing"))
    installed, wrong = site / "kernels" / "__init__.py", shadowing / "kernels" / "__init__.py"
    elsewhere.mkdir()
    for file in (installed, wrong):
        file.parent.mkdir(parents=True)
        file.write_text("")
    places = [str(site), str(elsewhere), str(ROOT), str(shadowing)]
    done = subprocess.run(
        [sys.executable, "-c", _WHAT_IS_KERNELS, *places],
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    without, having = json.loads(done.stdout)
    assert without[1] == without[0]
    assert having[0] == [True, str(installed)]
    assert having[1] == having[0]
    # A folder of that name with an __init__.py does shadow it: the comparison can fail.
    assert having[2] == [True, str(wrong)]


def test_files_hold_one_idea() -> None:
    for folder in ("flashhead_dist", "kernels", "topology", "profiles", "launch"):
        for path in python_files(ROOT / folder):
            if "corpus" not in path.parts:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_no_folder_of_tests_is_passed_over(request: pytest.FixtureRequest) -> None:
    """pytest skips a folder named `dist` in silence unless told otherwise."""
    skipped = request.config.getini("norecursedirs")
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir()]
    assert len(folders) > 3
    for folder in folders:
        assert not any(folder.match(pattern) for pattern in skipped), folder
