"""The loops of `cpu_sampling`, compiled by numba; conventions of `cpu_loops`.

Sums run in an order that the number of terms alone decides, and logarithms and exponentials are
written out, not the C library's: a loop over them becomes vector code, and a rank's share of the
groups changes no bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashhead_kernels.cpu_loops import jit, pack_key, scan_cluster, score_slots, select_slots
from flashhead_kernels.llvm_vectors import bfloat16_value, float_bits
from flashhead_kernels.noise import NEVER_ONE
from flashhead_kernels.sampling import BELOW, HALF_WAY

_WORD = 0xFFFFFFFF
_STEP0, _STEP1 = 0x9E3779B9, 0xBB67AE85
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_UNIT = np.float32(2**-32)
_NEVER_ONE = np.float32(NEVER_ONE)
_ROOT_HALF_BITS = np.int32(0x3F3504F3)
_LOG2_HIGH, _LOG2_LOW = np.float32(6.9313812256e-01), np.float32(9.0580006145e-06)
_LOG2_E, _LEAST_EXPONENT = np.float32(1.4426950408889634), np.float32(-87)
_E2, _E3, _E4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_E5, _E6, _E7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)
# log(1 + f) for f within sqrt(1/2) - 1 .. sqrt(2) - 1, the coefficients of FreeBSD's e_logf.c.
_L1, _L2 = np.float32(0.66666662693), np.float32(0.40000972152)
_L3, _L4 = np.float32(0.28498786688), np.float32(0.24279078841)


@jit
def log(x: float) -> Any:
    """Natural logarithm of a positive, normal float32, to about one unit in the last place."""
    exponent = (float_bits(x) - _ROOT_HALF_BITS) >> np.int32(23)
    scale = bfloat16_value(np.uint16((np.int32(127) - exponent) << np.int32(7)))
    f = x * scale - _ONE
    s = f / (_TWO + f)
    z = s * s
    w = z * z
    rest = z * (_L1 + w * _L3) + w * (_L2 + w * _L4)
    half = _HALF * f * f
    k = np.float32(exponent)
    return s * (half + rest) + k * _LOG2_LOW - half + f + k * _LOG2_HIGH


@jit
def exp(x: float) -> Any:
    """Exponential of a float32 that is not positive; below -87 that of -87 (1.6e-38)."""
    y: Any = max(x, _LEAST_EXPONENT)
    k = np.rint(y * _LOG2_E)
    r = (y - k * _LOG2_HIGH) - k * _LOG2_LOW
    # Taylor's polynomial: its next term is below 2^-24 for |r| <= log(2) / 2.
    p = _ONE + r * (_ONE + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7))))))
    return p * bfloat16_value(np.uint16((np.int32(k) + np.int32(127)) << np.int32(7)))


@jit
def _two_rounds(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> Any:
    # The product of two 32-bit words wraps in int64, but its bits are right.
    low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
    c0 = ((high >> 32) & _WORD) ^ c1 ^ (k0 & _WORD)
    c2 = ((low >> 32) & _WORD) ^ c3 ^ (k1 & _WORD)
    c1, c3 = high & _WORD, low & _WORD
    low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
    c0 = ((high >> 32) & _WORD) ^ c1 ^ ((k0 + _STEP0) & _WORD)
    c2 = ((low >> 32) & _WORD) ^ c3 ^ ((k1 + _STEP1) & _WORD)
    return c0, high & _WORD, c2, low & _WORD


@jit
def from_word(word: int) -> Any:
    """Noise float32 of a Philox word, which the greatest word makes greatest."""
    v = min((np.float32(word ^ _WORD) + _HALF) * _UNIT, _NEVER_ONE)
    u = _ONE - v
    # What rounding took from u is given back: log1p(-v).
    return -log(((u - _ONE) + v) / u - log(u))


@jit
def add_noise(
    seed: int, items: Any, position: int, sequence: int, domain: int, values: Any
) -> None:
    """Add the noise of `items [n]` (int32) to float32 `values [n]`; seed: int64, its 64 bits."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    position, sequence, domain = position & _WORD, sequence & _WORD, domain & _WORD
    # Counted from 0, and rounds written out: only then does the loop become vector code.
    for i in range(values.shape[0]):
        c = _two_rounds(np.int64(items[i]) & _WORD, position, sequence, domain, k0, k1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 2 * _STEP0, k1 + 2 * _STEP1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 4 * _STEP0, k1 + 4 * _STEP1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 6 * _STEP0, k1 + 6 * _STEP1)
        c = _two_rounds(c[0], c[1], c[2], c[3], k0 + 8 * _STEP0, k1 + 8 * _STEP1)
        values[i] += from_word(c[0])


_EMPTY = np.int64(-(2**63))
_NONE = np.float32(-np.inf)
_ZERO, _BELOW, _HALF_WAY = np.float32(0), np.float32(BELOW), np.float32(HALF_WAY)
_LEAST = np.float32(-1e30)


@jit
def probe_and_keep(
    first: int, last: int, query: Any, batch: int, size: int, values: Any, scales: Any,
    group_size: int, tile: int, spread: Any, bias: Any, clusters: int, probes: int, rows: Any,
    token_ids: Any, tokens: int, pinned_rows: Any, pinned_ids: Any, pinned: int, groups: int,
    means: Any, logits: Any, ids: Any,
) -> None:  # fmt: skip
    """Probe groups `first..last` as `cpu_loops.probe_groups` does, keeping what it scores.

    means: `[B, N, M]`; logits, ids: `[B, N, probes * S + pinned]`. All flat.
    """
    ordered = np.empty(clusters, np.int32)
    scores = np.empty(clusters, np.float32)
    slots = np.empty((last - first) * probes + 1, np.int64)
    slots[(last - first) * probes] = -1
    unused = np.full(1, _EMPTY, np.int64)
    width = probes * tokens + pinned
    for b in range(batch):
        for group in range(first, last):
            at, base = (b * groups + group) * clusters, group * clusters
            score_slots(
                values, base, base + clusters, scales, query, b, query[5], group_size, tile, means,
                at,
            )  # fmt: skip
            for slot in range(clusters):
                means[at + slot] += query[4][b]
                score = means[at + slot] + bias[b] * spread[base + slot]
                only_pads = spread[base + slot] < 0
                scores[slot] = spread[base + slot] if only_pads else score
                if only_pads:
                    means[at + slot] = _NONE
            chosen = slots[(group - first) * probes : (group - first + 1) * probes]
            select_slots(scores, probes, ordered, chosen)
            for i in range(probes):
                means[at + chosen[i]] = _NONE
                chosen[i] += base
        # All groups are scored by now, so that the scan of rows can look ahead across groups.
        for group in range(first, last):
            out = (b * groups + group) * width
            for i in range(probes):
                place = (group - first) * probes + i
                scan_cluster(
                    slots[place], slots[place + 1], rows, token_ids, tokens, query[0], b, size, 1,
                    unused, 0, logits, out + i * tokens,
                )  # fmt: skip
                for j in range(tokens):
                    ids[out + i * tokens + j] = token_ids[slots[place] * tokens + j]
            if pinned:
                scan_cluster(
                    group, -1, pinned_rows, pinned_ids, pinned, query[0], b, size, 1, unused, 0,
                    logits, out + probes * tokens,
                )  # fmt: skip
                for j in range(pinned):
                    ids[out + probes * tokens + j] = pinned_ids[group * pinned + j]


@jit
def cap(values: Any, softcap: float, inverse_temperature: float, out: Any) -> None:
    """`FinalLogits.without_noise` of flat float32 `values`, one at a time."""
    for i in range(values.shape[0]):
        capped = values[i]
        if softcap > 0:
            capped = softcap * np.float32(math.tanh(values[i] / softcap))
        out[i] = capped * inverse_temperature


@jit
def norms(states: Any, scale: float, out: Any) -> None:
    """`scale * |h|` of each of flat `states [B, D]` into float32 `out [B]`."""
    size = states.shape[0] // out.shape[0]
    for b in range(out.shape[0]):
        squares = 0.0
        for i in range(b * size, (b + 1) * size):
            squares += states[i] * np.float64(states[i])
        out[b] = np.float32(scale * math.sqrt(squares))


@jit
def weigh_clusters(
    first: int, last: int, means: Any, counts: Any, log_of: Any, spread: Any, scored: Any,
    norms: Any, shrinkage: float, softcap: float, inverse_temperature: float, clusters: int,
    mass: Any,
) -> None:  # fmt: skip
    """Log masses of the clusters of `first..last` of the `B * N` groups.

    counts: int64 `[N, M]`, tokens of each cluster, whose logarithm is `log_of[count]`; spread:
    float32 `[N, M]`; scored: `[B, N]`; norms: |h| / T, float32 `[B]`; mass:
    `[B, N, M]`. All flat.
    """
    groups = spread.shape[0] // clusters
    for place in range(first, last):
        at, base = place * clusters, place % groups * clusters
        mean, own = means[at : at + clusters], mass[at : at + clusters]
        spare, count = spread[base : base + clusters], counts[base : base + clusters]
        norm, known = norms[place // groups], scored[place] - _BELOW
        if softcap > 0:
            for i in range(clusters):
                t = np.float32(math.tanh(mean[i] / softcap))
                x = norm * max(spare[i], _ZERO) * (np.float32(1) - t * t)
                estimate = softcap * t * inverse_temperature + log_of[count[i]]
                shrunk = shrinkage * x / (x + _HALF_WAY) * max(known - estimate, _ZERO)
                exists = mean[i] > _NONE and count[i] > 0
                own[i] = estimate + shrunk if exists else _NONE
        else:
            for i in range(clusters):
                x = norm * max(spare[i], _ZERO)
                estimate = mean[i] * inverse_temperature + log_of[count[i]]
                # -inf, of a cluster without mass, must not meet its infinite gap.
                gap = max(known - max(estimate, _LEAST), _ZERO)
                shrunk = shrinkage * x / (x + _HALF_WAY) * gap
                own[i] = estimate + shrunk if estimate > _NONE else _NONE


@jit
def sum_groups(first: int, last: int, mass: Any, clusters: int, group_mass: Any) -> None:
    """Log mass of `first..last` of the `B * N` groups."""
    terms = np.empty(clusters, np.float32)
    for place in range(first, last):
        own = mass[place * clusters : (place + 1) * clusters]
        greatest = _NONE
        for i in range(clusters):
            greatest = max(greatest, own[i])
        if greatest == _NONE:
            group_mass[place] = _NONE
            continue
        for i in range(clusters):
            terms[i] = exp(own[i] - greatest)
        group_mass[place] = greatest + log(_sum(terms))


@jit
def _sum(terms: Any) -> Any:
    """Sum by halves, in place: vector code in a fixed order."""
    count = terms.shape[0]
    while count > 1:
        half = (count + 1) // 2
        low, high = terms[:half], terms[half:count]
        for i in range(count - half):
            low[i] += high[i]
        count = half
    return terms[0]


@jit
def best_noisy(
    first: int, last: int, chunks: int, chunk: int, final: Any, width: int, token_ids: Any,
    shared: bool, row_of: Any, seed: int, positions: Any, sequences: Any, keys: Any,
) -> None:  # fmt: skip
    """Keys `[n, chunks]` (flat) of pieces `first..last` of the `n * chunks` of all draws."""
    noisy = np.empty(chunk, np.float32)
    for piece in range(first, last):
        draw, start = piece // chunks, piece % chunks * chunk
        count = min(chunk, width - start)
        row = row_of[draw]
        ids = token_ids[start : start + count]
        if not shared:
            ids = token_ids[row * width + start : row * width + start + count]
        own = noisy[:count]
        own[:] = final[row * width + start : row * width + start + count]
        add_noise(seed, ids, positions[draw], sequences[draw], 0, own)
        best = _EMPTY
        for i in range(count):
            if ids[i] >= 0:
                best = max(best, pack_key(own[i], ids[i]))
        keys[piece] = best


@jit
def best_groups(
    first: int, last: int, mass: Any, group_mass: Any, group_ids: Any, clusters: int, row_of: Any,
    seed: int, positions: Any, sequences: Any, values: Any, chosen: Any,
) -> None:  # fmt: skip
    """The best groups of draws `first..last`, and a cluster of each; group_ids: int32 `[N]`."""
    groups = group_ids.shape[0]
    noisy, within = np.empty(groups, np.float32), np.empty(clusters, np.float32)
    numbers = np.empty(clusters, np.int32)
    for draw in range(first, last):
        row, position, sequence = row_of[draw], positions[draw], sequences[draw]
        noisy[:] = group_mass[row * groups : (row + 1) * groups]
        add_noise(seed, group_ids, position, sequence, 1, noisy)
        group = np.argmax(noisy)
        values[draw] = noisy[group]
        at = (row * groups + group) * clusters
        within[:] = mass[at : at + clusters]
        for i in range(clusters):
            numbers[i] = group_ids[group] * clusters + i
        add_noise(seed, numbers, position, sequence, 2, within)
        chosen[draw] = group * clusters + np.argmax(within)


@jit
def noise_of(items: Any, seed: int, positions: Any, sequences: Any, domain: int, out: Any) -> None:
    """Noise of `items [n, m]` (int32) into `out [n, m]`."""
    for draw in range(items.shape[0]):
        out[draw] = 0
        add_noise(seed, items[draw], positions[draw], sequences[draw], domain, out[draw])
