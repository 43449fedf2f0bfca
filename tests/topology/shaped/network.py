"""Hosts of one machine joined by links of set rate and delay, and commands run on them.

A host is a process of `unshare` with a network, process and host name of its own: what runs on it
sees no process of another host and reaches it only over the link. `relay.c` joins the hosts. Both
read their standard input and end when it is closed, so that nothing is left behind by a test that
was killed; nothing has a name that a second network could take.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_TOOLS = ("cc", "unshare", "nsenter")
_START_S = 10.0


def obstacle() -> str | None:
    """Why no network can be made here; None where it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install gcc and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: load the kernel's module tun"
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def compile_relay(folder: Path) -> Path:
    """Compile `relay.c` into `folder` and return the program."""
    program = folder / "relay"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", program, HERE / "relay.c"], check=True)
    return program


_UNSHARE = [
    "unshare",
    "--net",
    "--pid",
    "--uts",
    "--mount",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
# Reno is in every kernel; others, BBR above all, pace what they send by what an application that
# computes between messages has sent before.
_HOST_SHELL = """
echo reno > /proc/sys/net/ipv4/tcp_congestion_control &&
echo {name} > /proc/sys/kernel/hostname && echo up && exec cat
"""


@dataclass(frozen=True)
class Link:
    """What joins a host to all others: one-way delay, and rate each way; 0 is no limit."""

    delay_us: float
    rate_mbit: float


class ShapedNetwork:
    """`num_hosts` hosts with the same link each; a context manager.

    Host i is named `host<i>` and has address `10.77.0.<i + 1>` on its interface eth0.
    """

    def __init__(self, relay: Path, num_hosts: int, link: Link) -> None:
        self.num_hosts = num_hosts
        self._program, self._link = relay, link
        self._hosts: list[subprocess.Popen[str]] = []
        self._relay: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> ShapedNetwork:
        try:
            for host in range(self.num_hosts):
                shell = ["sh", "-c", _HOST_SHELL.format(name=f"host{host}")]
                self._hosts.append(_talking([*_UNSHARE, *shell]))
                _expect(self._hosts[-1], "up")
            inits = [str(self._init_pid(host)) for host in range(self.num_hosts)]
            self._relay = _talking([str(self._program), *inits])
            _expect(self._relay, "ready")
            for host in range(self.num_hosts):
                self.shape(host, self._link)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that runs on the hosts, the hosts and their links."""
        for process in [*self._hosts, *self._started]:
            # The end of a process namespace's first process is the end of all others in it.
            process.kill()
        for process in [*self._hosts, *self._started, *filter(None, [self._relay])]:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(timeout=_START_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._hosts, self._started, self._relay = [], [], None

    def address(self, host: int) -> str:
        """The host's address on the link."""
        return f"10.77.0.{host + 1}"

    def shape(self, host: int, link: Link) -> None:
        """Give one host another link from now on."""
        answer = self._ask(f"shape {host} {link.delay_us} {link.rate_mbit}")
        assert answer == "ok", answer

    def stats(self) -> dict[str, int]:
        """Frames and bytes that the links took so far, and frames that were dropped."""
        words = self._ask("stats").split()
        return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: Path,
        stderr: Path,
    ) -> subprocess.Popen[str]:
        """Start a command on a host; the caller waits for it, and `close` ends it at the latest."""
        enter = ["nsenter", "--target", str(self._init_pid(host))]
        enter += ["--net", "--pid", "--uts", "--mount", f"--wdns={Path.cwd()}", "--"]
        with stdout.open("w") as out, stderr.open("w") as err:
            process = subprocess.Popen(
                [*enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                env=os.environ | dict(environment or {}),
            )
        self._started.append(process)
        return process

    def pids(self, host: int) -> list[int]:
        """Processes on a host but its first, as the test sees them."""
        first = self._init_pid(host)
        space = Path(f"/proc/{first}/ns/pid").readlink()
        return [pid for pid, other in _process_spaces() if other == space and pid != first]

    @contextmanager
    def stopped(self, host: int) -> Iterator[None]:
        """SIGSTOP for all that runs on a host, as if its machine stood still; and on again."""
        for pid in self.pids(host):
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in self.pids(host):
                os.kill(pid, signal.SIGCONT)
            for process in self._started:
                # nsenter stops itself where its child is stopped.
                process.send_signal(signal.SIGCONT)

    def _init_pid(self, host: int) -> int:
        pid = self._hosts[host].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _ask(self, command: str) -> str:
        assert self._relay is not None
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.write(command + "\n")
        self._relay.stdin.flush()
        return self._relay.stdout.readline().strip()


def _talking(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    if said != word:
        raise RuntimeError(f"{process.args} said {said!r} where {word!r} was expected")


def _process_spaces() -> Iterator[tuple[int, Path]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), (folder / "ns" / "pid").readlink()
            except OSError:
                continue


def wait_for(condition: object, timeout_s: float, what: str) -> None:
    """Return once `condition()` holds; raise TimeoutError, naming `what`, when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come about in {timeout_s:g} s")
        time.sleep(0.05)
