"""Maximum of the ranks' packed keys in one kernel, through memory that every rank can write.

Each rank owns a buffer of int64 words that its peers reach by address:

    words[0 : SIGNAL_STRIDE P]     signals: word SIGNAL_STRIDE r is set by rank r alone
    then [NUM_BUFFERS, P, capacity] slots: slot [b, r] is written by rank r alone

Round e (1, 2, ...; counted in device memory, which the kernel itself advances):

    1. Store own keys in slot [e mod 2, rank] of every peer; then, behind a barrier of the program,
       one release at system scope of the number e into own signal word at every peer.
    2. Acquire own signal words until each peer's is at least e; behind a second barrier, read the
       peers' slots [e mod 2] and take the maximum with own keys, which never left the registers.

Why this is enough:
- Arrival. A program's stores happen before its barrier, the barrier before the release, and release
  is cumulative, so who acquires e sees all the keys of round e.
- Skew. A rank leaves round e only after every peer has sent e. It can therefore be one round
  ahead and no more: a signal reads e or e + 1 while a peer waits for e (hence "at least"), and
  the keys of e + 1 lie in the other buffer.
- Reuse. Slots of round e are overwritten in round e + 2. Before that the writer has acquired e + 1
  from the reader, which sent it in a later kernel than the one that read e. Two buffers are thus
  as safe as a barrier after each round, and one is not (the tests show a wrong key).
- Nothing is ever reset: signals only grow, and 63 bits of rounds do not run out.

Signals are set and polled by atomics, as Triton has no acquiring load: GPUs must have native
atomics between them (see `flashhead_dist.symmetric`).

Rounds of one exchange must follow each other in one stream (or graph), and every rank must give the
same number of keys. A peer that never comes leaves the others waiting, as it does in NCCL.

The pattern is that of the barriers in torch's symmetric memory (release and acquire at system
scope) that its one-shot all-reduce stands between. Signals have words of their own, not torch's
signal pads: those are 32 bits and must return to zero for `handle.barrier()`. NCCL LL's pairs of 32
bits of data and 32 of flag would save the system fence, at the price of an order across kernels
that the PTX model does not promise.

Runs in Triton's interpreter between processes that share memory; compiled for sm_90. Not run on
a GPU yet: `kernels/stress_exchange.py` does that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashhead_kernels.keys import NUM_BUFFERS, SIGNAL_STRIDE, padded
from flashhead_kernels.triton_reduce import key_id, key_logit

NUM_WARPS = 4
_EMPTY_KEY: tl.constexpr = tl.constexpr(-(2**63))
_STRIDE: tl.constexpr = tl.constexpr(SIGNAL_STRIDE)
_BUFFERS: tl.constexpr = tl.constexpr(NUM_BUFFERS)


@triton.jit
def _words(addresses_ptr, rank):
    """Pointer to the words of rank(s) `rank`."""
    return tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int64))


@triton.jit
def _slot(words, epoch, rank, TP_SIZE: tl.constexpr, CAPACITY: tl.constexpr):
    """Pointer to the first key of the slot in which `rank` writes in round `epoch`."""
    buffer = epoch % _BUFFERS
    return words + TP_SIZE * _STRIDE + (buffer * TP_SIZE + rank) * CAPACITY


@triton.jit
def _send(addresses_ptr, keys, used, epoch, rank, TP_SIZE: tl.constexpr, CAPACITY: tl.constexpr):
    """Store own keys at every peer, each rank beginning with the next, to spread the traffic."""
    lanes = tl.arange(0, CAPACITY)
    for step in tl.static_range(1, TP_SIZE):
        peer = (rank + step) % TP_SIZE
        slot = _slot(_words(addresses_ptr, peer), epoch, rank, TP_SIZE, CAPACITY)
        tl.store(slot + lanes, keys, mask=used)


@triton.jit
def _signal(addresses_ptr, epoch, rank, TP_SIZE: tl.constexpr, TP_PADDED: tl.constexpr):
    """Release `epoch` at every peer."""
    peers = tl.arange(0, TP_PADDED)
    others = (peers < TP_SIZE) & (peers != rank)
    words = tl.load(addresses_ptr + peers, mask=others, other=0).to(tl.pointer_type(tl.int64))
    epochs = tl.zeros([TP_PADDED], tl.int64) + epoch
    tl.atomic_xchg(words + rank * _STRIDE, epochs, mask=others, sem="release", scope="sys")


@triton.jit
def _wait(addresses_ptr, epoch, rank, TP_SIZE: tl.constexpr, TP_PADDED: tl.constexpr):
    """Acquire the signals of all peers until each has reached `epoch`."""
    peers = tl.arange(0, TP_PADDED)
    others = (peers < TP_SIZE) & (peers != rank)
    signals = _words(addresses_ptr, rank) + peers * _STRIDE
    nothing = tl.zeros([TP_PADDED], tl.int64)
    missing = TP_SIZE - 1
    while missing > 0:
        seen = tl.atomic_add(signals, nothing, mask=others, sem="acquire", scope="sys")
        missing = tl.sum((others & (seen < epoch)).to(tl.int32))


@triton.jit
def _collect(addresses_ptr, keys, used, epoch, rank, TP_SIZE: tl.constexpr, CAPACITY: tl.constexpr):
    """Maximum of own keys and the peers' slots here, read past the first-level cache."""
    lanes = tl.arange(0, CAPACITY)
    words = _words(addresses_ptr, rank)
    for step in tl.static_range(1, TP_SIZE):
        slot = _slot(words, epoch, (rank + step) % TP_SIZE, TP_SIZE, CAPACITY)
        theirs = tl.load(slot + lanes, mask=used, other=_EMPTY_KEY, volatile=True)
        keys = tl.maximum(keys, theirs)
    return keys


# Neither a batch of one nor a tensor at an odd address may compile a second kernel, in a graph.
_UNSPECIALISED = (
    "keys_ptr", "out_ptr", "ids_ptr", "logits_ptr", "addresses_ptr", "epoch_ptr", "rank",
    "num_keys",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_UNSPECIALISED)
def exchange_kernel(
    keys_ptr,  # int64 [num_keys]
    out_ptr,  # OUT: int64 [num_keys]; may be keys_ptr
    ids_ptr,  # OUT: int64 [num_keys] where UNPACK
    logits_ptr,  # OUT: float32 [num_keys] where UNPACK
    addresses_ptr,  # int64 [TP_SIZE], of the ranks' words, as this rank maps them
    epoch_ptr,  # int64 [1], rounds so far; advanced
    rank, num_keys, TP_SIZE: tl.constexpr, TP_PADDED: tl.constexpr, CAPACITY: tl.constexpr,
    UNPACK: tl.constexpr,
):  # fmt: skip
    """One round of one rank; a grid of one program."""
    lanes = tl.arange(0, CAPACITY)
    used = lanes < num_keys
    keys = tl.load(keys_ptr + lanes, mask=used, other=_EMPTY_KEY)
    epoch = tl.load(epoch_ptr) + 1
    _send(addresses_ptr, keys, used, epoch, rank, TP_SIZE, CAPACITY)
    tl.debug_barrier()
    _signal(addresses_ptr, epoch, rank, TP_SIZE, TP_PADDED)
    _wait(addresses_ptr, epoch, rank, TP_SIZE, TP_PADDED)
    tl.debug_barrier()
    keys = _collect(addresses_ptr, keys, used, epoch, rank, TP_SIZE, CAPACITY)
    tl.store(out_ptr + lanes, keys, mask=used)
    if UNPACK:
        tl.store(ids_ptr + lanes, key_id(keys).to(tl.int64), mask=used)
        tl.store(logits_ptr + lanes, key_logit(keys), mask=used)
    tl.store(epoch_ptr, epoch)


@triton.jit(do_not_specialize=("num_keys",))
def unpack_kernel(keys_ptr, ids_ptr, logits_ptr, num_keys, BLOCK: tl.constexpr):
    """Grid of blocks: `keys.unpack_keys` of int64 keys into int64 ids and float32 logits."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = place < num_keys
    keys = tl.load(keys_ptr + place, mask=used, other=_EMPTY_KEY)
    tl.store(ids_ptr + place, key_id(keys).to(tl.int64), mask=used)
    tl.store(logits_ptr + place, key_logit(keys), mask=used)


def exchange_keys(
    keys: Tensor,
    out: Tensor,
    addresses: Tensor,
    epoch: Tensor,
    rank: int,
    capacity: int,
    unpacked: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Put the maximum over the ranks of `keys` in `out`; one launch, nothing allocated or awaited.

    keys, out: int64, contiguous, of one size from 1 to `capacity` and the same on every rank; `out`
    may be `keys`. addresses: int64 `[P]`, P at least 2, of the ranks' words as this rank maps them.
    epoch: int64 `[1]`, this rank's own, 0 before the first round. All on the rank's device.
    capacity: keys that a slot holds, a power of two, as the buffers were laid out. unpacked: int64
    ids and float32 logits of `out`'s size, contiguous, into which its keys are unpacked.

    Raises:
        ValueError: tensors of another dtype, size or layout.
    """
    _check(keys, out, capacity)
    ids, logits = unpacked or (out, out)
    exchange_kernel[(1,)](
        keys, out, ids, logits, addresses, epoch, rank, keys.numel(),
        TP_SIZE=addresses.numel(), TP_PADDED=padded(addresses.numel()), CAPACITY=capacity,
        UNPACK=unpacked is not None, num_warps=NUM_WARPS,
    )  # fmt: skip


def compile_exchange(
    keys: Tensor, addresses: Tensor, epoch: Tensor, rank: int, capacity: int
) -> None:
    """Compile what `exchange_keys` will launch with these arguments, and launch nothing."""
    logits = torch.empty(1, dtype=torch.float32, device=keys.device)
    for unpack in (False, True):
        exchange_kernel.warmup(
            keys, keys, keys, logits if unpack else keys, addresses, epoch, rank, keys.numel(),
            TP_SIZE=addresses.numel(), TP_PADDED=padded(addresses.numel()), CAPACITY=capacity,
            UNPACK=unpack, num_warps=NUM_WARPS, grid=(1,),
        )  # fmt: skip


def _check(keys: Tensor, out: Tensor, capacity: int) -> None:
    if keys.dtype != torch.int64 or out.dtype != torch.int64:
        raise ValueError(f"keys are int64, not {keys.dtype} and {out.dtype}")
    if not 1 <= keys.numel() <= capacity or out.numel() != keys.numel():
        raise ValueError(
            f"{keys.numel()} keys into {out.numel()}: an exchange takes 1 to {capacity}, in and out"
        )
    if not keys.is_contiguous() or not out.is_contiguous():
        raise ValueError("keys must be contiguous, and so must their output")
