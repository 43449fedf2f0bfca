"""Import rules: no cycles, libraries import none of ours, one caller of torch.distributed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "flashhead_kernels": ROOT / "kernels" / "flashhead_kernels",
    "flashhead_topology": ROOT / "topology" / "flashhead_topology",
    "flashhead_profiles": ROOT / "profiles" / "flashhead_profiles",
}
DIST = ROOT / "flashhead_dist"
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


@pytest.mark.parametrize("package", PACKAGES)
def test_library_packages_import_none_of_ours(package: str) -> None:
    forbidden = {"flashhead_dist", "launch", "tests", *PACKAGES} - {package}
    for path in python_files(PACKAGES[package]):
        for module in imported_modules(path):
            assert module.split(".")[0] not in forbidden, f"{path.name} imports {module}"


def module_name(path: Path) -> str:
    for root in (ROOT, *(folder.parent for folder in PACKAGES.values())):
        if path.is_relative_to(root) and (root != ROOT or path.is_relative_to(DIST)):
            parts = path.relative_to(root).with_suffix("").parts
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(path)


def imports_when_loaded(path: Path) -> Iterator[str]:
    """Modules that importing the file imports, without those under TYPE_CHECKING."""
    pending: list[ast.stmt] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Try | ast.With):
            pending += node.body
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            pending += node.body + node.orelse


def test_no_module_imports_itself_in_a_cycle() -> None:
    files = python_files(DIST) + [p for folder in PACKAGES.values() for p in python_files(folder)]
    modules = {module_name(path): path for path in files}
    assert len(modules) > 100
    graph = {
        name: set(imports_when_loaded(path)) & modules.keys() - {name}
        for name, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_import_no_head_and_no_process_group() -> None:
    for path in python_files(PACKAGES["flashhead_kernels"]):
        for module in imported_modules(path):
            assert not module.startswith(("flashhead_dist", "torch.distributed")), (path, module)


def test_only_parallel_calls_collectives() -> None:
    for path in python_files(ROOT / "flashhead_dist"):
        if path.name in {"parallel.py", "exchange.py"}:  # ranks agree on an exchange once
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
                owner = ast.unparse(node.value)
                assert owner not in {"dist", "torch.distributed"}, (
                    f"{path}:{node.lineno} calls {owner}.{node.attr}: go through parallel"
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
