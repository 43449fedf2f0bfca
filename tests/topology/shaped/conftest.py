"""Shaped networks for tests; skipped with the reason where none can be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.topology.shaped.network import Link, ShapedNetwork, compile_relay, obstacle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.network)


@pytest.fixture(scope="session")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The relay, compiled."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    return compile_relay(tmp_path_factory.mktemp("relay"))


@pytest.fixture
def network(relay: Path) -> Callable[..., ShapedNetwork]:
    """`network(num_hosts, delay_us=..., rate_mbit=...)`, to be used as a context manager."""

    def make(num_hosts: int, *, delay_us: float, rate_mbit: float) -> ShapedNetwork:
        return ShapedNetwork(relay, num_hosts, Link(delay_us, rate_mbit))

    return make
