"""A script on the ranks of several hosts, one agent of torchrun a host, as a user starts it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.topology.shaped.network import ShapedNetwork

_PORT = 29500


@dataclass(frozen=True)
class Ended:
    """How the agent of one host ended, and what it and its ranks wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The sentences that ranks said, without those that torchrun repeats."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Agents:
    """One agent a host, from their start until all have ended."""

    def __init__(
        self,
        network: ShapedNetwork,
        folder: Path,
        command: Sequence[str],
        *,
        ranks_per_host: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.network = network
        self._files = [
            (folder / f"stdout_{host}", folder / f"stderr_{host}")
            for host in range(network.num_hosts)
        ]
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nnodes", str(network.num_hosts), "--nproc-per-node", str(ranks_per_host)]
        torchrun += ["--master-addr", network.address(0), "--master-port", str(_PORT)]
        settings = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        } | dict(environment or {})
        self.processes = [
            network.start(
                host,
                [*torchrun, "--node-rank", str(host), *command],
                environment=settings,
                stdout=stdout,
                stderr=stderr,
            )
            for host, (stdout, stderr) in enumerate(self._files)
        ]

    def stdout(self, host: int) -> str:
        """What a host's agent and ranks wrote so far."""
        return self._files[host][0].read_text()

    def stderr(self, host: int) -> str:
        """The same of their errors."""
        return self._files[host][1].read_text()

    def wait(self, timeout_s: float, hosts: Sequence[int] | None = None) -> list[Ended]:
        """Wait for the agents of `hosts`, all of them by default.

        Raises:
            TimeoutError: one of them still runs; with what all have written.
        """
        hosts = range(self.network.num_hosts) if hosts is None else hosts
        deadline = time.monotonic() + timeout_s
        while any(self.processes[host].poll() is None for host in hosts):
            if time.monotonic() > deadline:
                written = "\n".join(self.stdout(h) + self.stderr(h) for h in hosts)
                raise TimeoutError(f"agents still run after {timeout_s:g} s:\n{written}")
            time.sleep(0.1)
        return [
            Ended(self.processes[host].returncode, self.stdout(host), self.stderr(host))
            for host in hosts
        ]


def succeeded(ended: Sequence[Ended]) -> Sequence[Ended]:
    """The same, after a check that every agent ended well."""
    for host, end in enumerate(ended):
        assert end.code == 0, f"host {host} ended with {end.code}:\n{end.stdout}\n{end.stderr}"
    return ended
