"""The shipped errors of the cost model: read as reports read them, installed with the package."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_errors_are_shipped_with_where_they_are_from() -> None:
    document = yaml.safe_load(files("flashhead_topology").joinpath("validation.yaml").read_text())
    assert document["source"].startswith("make bench-network, ")
    assert set(document["operations"]) == {"all_reduce", "all_gather", "small"}
    for found in document["operations"].values():
        assert 0 < found["mean_relative_error"] < 1
        assert found["points"] >= 8
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]["package-data"]["flashhead_topology"]
    assert "validation.yaml" in shipped
