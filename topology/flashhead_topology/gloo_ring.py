"""Time of gloo's ring over TCP, by following its messages.

Why a formula of `2 (P - 1)` steps is not enough: gloo sends a segment only once the receiver's
notice for it is there (`gloo/transport/tcp/pair.cc`: `Pair::send` waits for a remote pending
receive), two segments are under way at a time (`gloo/allreduce.cc`, `gloo/allgather.cc`), and a
notice waits behind data on its way out of the host. So a step costs two messages one way, and the
two chains of segments hide delay behind bandwidth only in part. With fewer elements than segments
most notices are early, and a step costs one message.

A rank's program, as gloo's: in iteration i it waits for what it posted in iteration i - 2, posts
the receive (a notice leaves for the sender), and posts the send. Messages of a host leave one after
another on its link, each for `beta_s_per_byte` a byte, and arrive `alpha_s` after their last byte
has left.

All ranks enter together. Where they do not, more can be lost than the time between them: an
all-gather posts its send before its receive, so that a rank that comes late to a waiting neighbour
sends a whole segment ahead of its own notice. Two ranks then take 3 / 2 of the bandwidth's time.

Letters: P ranks of the ring. Units: seconds and bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

NOTICE_BYTES = 130
"""A notice on the wire: gloo's preamble of 64 bytes in one segment with TCP/IP/Ethernet headers."""

MAX_SEGMENT_BYTES = 1 << 20
"""`kMaxSegmentSize` of gloo/allreduce.h."""

_LARGEST_FOLLOWED = 64
"""Above this many ranks a ring is followed as if all its ranks did the same at the same time."""


@dataclass(frozen=True)
class Hop:
    """From one rank to the next: delay of a message, time a byte, and whose link it leaves by."""

    alpha_s: float
    beta_s_per_byte: float
    link: int


Phase = Sequence[tuple[int, ...]]
"""Iterations of one phase; of each the bytes that every rank sends to the next one."""


def all_reduce_phases(num_bytes: int, ranks: int, element_bytes: int = 8) -> list[Phase]:
    """Reduce-scatter and all-gather of `num_bytes` over P = `ranks`, by gloo's segments.

    A segment holds whole elements: with fewer elements than `2 P` most segments are empty.
    """
    limit = element_bytes * max(1, MAX_SEGMENT_BYTES // element_bytes)
    number = _round_up(max(-(-num_bytes // limit), 2 * ranks), ranks)
    segment = _round_up(-(-num_bytes // number), element_bytes)
    per_rank = number // ranks

    def length(index: int) -> int:
        return max(0, min(segment, num_bytes - (index % number) * segment))

    # gloo's ring runs towards lower ranks; position q stands for rank -q, so that it runs upwards.
    def phase(first: int) -> Phase:
        return [
            tuple(length((first - q) % ranks * per_rank + i) for q in range(ranks))
            for i in range(number - per_rank)
        ]

    return [phase(1), phase(0)]


def all_gather_phases(num_bytes: int, ranks: int) -> list[Phase]:
    """The ring of a gathered buffer of `num_bytes`: each rank's part goes round in two halves."""
    part = num_bytes // ranks
    halves = (part // 2, part - part // 2)
    return [[(halves[i % 2],) * ranks for i in range(2 * (ranks - 1))]]


def barrier_s(hops: Sequence[Hop]) -> float:
    """gloo's dissemination barrier, all ranks entering together: two messages a round."""
    rounds = (len(hops) - 1).bit_length()
    return rounds * 2 * max(hop.alpha_s + NOTICE_BYTES * hop.beta_s_per_byte for hop in hops)


def ring_s(phases: Sequence[Phase], hops: Sequence[Hop]) -> float:
    """Seconds from all ranks' entry into `phases` until the last one is through.

    Args:
        hops: of each rank to the next one, and of the last to the first.
    """
    if (len(set(hops)) == 1 and _symmetric(phases)) or len(hops) > _LARGEST_FOLLOWED:
        slowest = max(hops, key=lambda hop: (hop.alpha_s, hop.beta_s_per_byte))
        alone = [Hop(slowest.alpha_s, max(hop.beta_s_per_byte for hop in hops), 0)]
        return _Ring([[(max(sizes),) for sizes in phase] for phase in phases], alone).run()
    return _Ring(phases, hops).run()


def _symmetric(phases: Sequence[Phase]) -> bool:
    return all(min(sizes) == max(sizes) for phase in phases for sizes in phase)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass
class _Rank:
    """Where one rank stands: what it has posted, and what has arrived."""

    phase: int = 0
    iteration: int = 0
    noticed: set[tuple[int, int]] = field(default_factory=set)
    posted: set[tuple[int, int]] = field(default_factory=set)
    sent: set[tuple[int, int]] = field(default_factory=set)
    received: set[tuple[int, int]] = field(default_factory=set)


class _Ring:
    """The messages of one run in the order in which they happen. A ring of one is its own peer."""

    def __init__(self, phases: Sequence[Phase], hops: Sequence[Hop]) -> None:
        self._phases, self._hops = phases, hops
        self._ranks = [_Rank() for _ in hops]
        self._free_s = dict.fromkeys((hop.link for hop in hops), 0.0)
        self._events: list[tuple[float, int, str, int, tuple[int, int]]] = []
        self._count = 0
        self._end_s = 0.0

    def run(self) -> float:
        for rank in range(len(self._ranks)):
            self._advance(rank, 0.0)
        while self._events:
            now_s, _, kind, rank, step = heapq.heappop(self._events)
            state = self._ranks[rank]
            if kind == "notice":
                state.noticed.add(step)
                if step in state.posted:
                    self._transmit(rank, step, now_s)
            elif kind == "sent":
                state.sent.add(step)
            else:
                state.received.add(step)
            self._advance(rank, now_s)
        return self._end_s

    def _advance(self, rank: int, now_s: float) -> None:
        """Run the rank's program until it has to wait."""
        state = self._ranks[rank]
        while state.phase < len(self._phases):
            phase = self._phases[state.phase]
            before = (state.phase, state.iteration - 2)
            if before[1] >= 0 and not self._through(rank, before):
                return
            if state.iteration < len(phase):
                self._post(rank, (state.phase, state.iteration), now_s)
            state.iteration += 1
            if state.iteration == len(phase) + 2:
                state.phase, state.iteration = state.phase + 1, 0
        self._end_s = max(self._end_s, now_s)

    def _through(self, rank: int, step: tuple[int, int]) -> bool:
        state = self._ranks[rank]
        received = step in state.received or not self._bytes(self._before(rank), step)
        return received and (step in state.sent or not self._bytes(rank, step))

    def _post(self, rank: int, step: tuple[int, int], now_s: float) -> None:
        sender = self._before(rank)
        if self._bytes(sender, step):
            # A notice goes against the ring, by this rank's own link and the hop's delay.
            hop, link = self._hops[sender], self._hops[rank].link
            left_s = self._leave(link, NOTICE_BYTES * hop.beta_s_per_byte, now_s)
            self._at(left_s + hop.alpha_s, "notice", sender, step)
        if self._bytes(rank, step):
            self._ranks[rank].posted.add(step)
            if step in self._ranks[rank].noticed:
                self._transmit(rank, step, now_s)

    def _transmit(self, rank: int, step: tuple[int, int], now_s: float) -> None:
        hop = self._hops[rank]
        left_s = self._leave(hop.link, self._bytes(rank, step) * hop.beta_s_per_byte, now_s)
        self._at(left_s, "sent", rank, step)
        self._at(left_s + hop.alpha_s, "data", (rank + 1) % len(self._ranks), step)

    def _leave(self, link: int, takes_s: float, now_s: float) -> float:
        self._free_s[link] = max(self._free_s[link], now_s) + takes_s
        return self._free_s[link]

    def _at(self, time_s: float, kind: str, rank: int, step: tuple[int, int]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, kind, rank, step))

    def _bytes(self, rank: int, step: tuple[int, int]) -> int:
        return self._phases[step[0]][step[1]][rank]

    def _before(self, rank: int) -> int:
        return (rank - 1) % len(self._ranks)
