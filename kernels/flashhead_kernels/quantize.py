"""Centroids in low precision: symmetric int4 or int8 with one scale per group of columns.

int4 stores two columns a byte. Within a scale group of `group_size` columns, byte i holds column i
in its low half and column `i + group_size / 2` in its high half, both offset by 8: a kernel unpacks
half a group with one mask and the other half with one shift, and no shuffle.

Sixteen neighbouring centroids may be stored as a tile: their bytes interleaved by four, their
scales by one. A vector then holds the same four columns of all sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

BITS = (4, 8, 16)
TILE = 16
"""Centroids in a tile."""
_INTERLEAVED_BYTES = 4


@dataclass(frozen=True)
class Projection:
    """Coordinates of hidden states that centroids of fewer columns are stored in.

        h . centroid  ~  (to_state h) . stored + h . mean

    with m < D coordinates for each stored centroid, less the mean of all centroids.

    to_state: float32 `[m, D]`; mean: float32 `[D]`, of all centroids.
    """

    to_state: Tensor
    mean: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that projecting a batch reads once."""
        return self.to_state.nbytes + self.mean.nbytes

    def to(self, device: torch.device | str) -> Projection:
        return Projection(self.to_state.to(device), self.mean.to(device))


@dataclass(frozen=True)
class QuantizedCentroids:
    """Centroids `[..., D]` in `bits` bits, or `[..., M, D]` in tiles of `tile` of the M.

    values: uint8 `[..., D/2]` (int4), int8 `[..., D]` (int8) or bfloat16 `[..., D]` (16).
    scales: float32-valued bfloat16 `[..., D/group_size]`, or None for 16 bits.
    tile: 1, or 16 where the bytes of tiles are interleaved within the same shapes.
    projection: of hidden states to the D coordinates that these are kept in (integers only), D then
        being fewer than a hidden state has; None where they are the hidden state's own.
    padding: of the M stored, how many at the end fill the last tile up and are no centroids.
    """

    values: Tensor
    scales: Tensor | None
    bits: int
    group_size: int
    hidden_size: int
    tile: int = 1
    projection: Projection | None = None
    padding: int = 0

    @property
    def num_clusters(self) -> int:
        """M without the padding."""
        return self.values.shape[-2] - self.padding

    @property
    def nbytes(self) -> int:
        """Bytes that scoring every centroid once reads, scales and projection included."""
        stored = self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)
        real = stored // self.values.shape[-2] * self.num_clusters if self.padding else stored
        return real + (self.projection.nbytes if self.projection else 0)

    def to(self, device: torch.device | str) -> QuantizedCentroids:
        scales = None if self.scales is None else self.scales.to(device)
        projection = None if self.projection is None else self.projection.to(device)
        return replace(self, values=self.values.to(device), scales=scales, projection=projection)

    def integers(self) -> Tensor:
        """The stored integers `[..., D]` as int8 (4 and 8 bits only)."""
        if self.bits == 16:
            raise ValueError("16-bit centroids hold no integers")
        values = self.values if self.tile == 1 else _untile(self.values, _INTERLEAVED_BYTES)
        values = values[..., : self.num_clusters, :] if self.padding else values
        if self.bits == 8:
            return values
        halves = _split(values, self.group_size // 2)
        low = (halves & 0xF).to(torch.int8) - 8
        high = (halves >> 4).to(torch.int8) - 8
        return torch.cat([low, high], dim=-1).flatten(-2)

    def dequantize(self) -> Tensor:
        """Return float32 centroids `[..., D]`."""
        if self.scales is None:
            return self.values.float()
        scales = self.scales if self.tile == 1 else _untile(self.scales, 1)
        scales = scales[..., : self.num_clusters, :] if self.padding else scales
        grouped = _split(self.integers().float(), self.group_size)
        return (grouped * scales.float().unsqueeze(-1)).flatten(-2)


def quantize_centroids(centroids: Tensor, bits: int, group_size: int = 64) -> QuantizedCentroids:
    """Quantize float `centroids [..., D]`, rounding to nearest.

    The scale of a group is its largest magnitude over 7 (int4) or 127 (int8), rounded up to a
    bfloat16 so that no value clips; a group of zeros has scale 0.

    Raises:
        ValueError: bits not 4, 8 or 16; a group size that does not divide D or, for int4, is odd;
            centroids that are not finite.
    """
    hidden_size = centroids.shape[-1]
    if bits not in BITS:
        raise ValueError(f"centroid bits must be one of {BITS}, got {bits}")
    if not bool(torch.isfinite(centroids).all()):
        raise ValueError("centroids must be finite: the output embedding holds NaN or inf")
    if bits == 16:
        return QuantizedCentroids(centroids.to(torch.bfloat16), None, 16, hidden_size, hidden_size)
    scales = centroid_scales(centroids, bits, group_size)
    limit = integer_limit(bits)
    grouped = _split(centroids.float(), group_size)
    divisor = scales.float().unsqueeze(-1)
    quotient = torch.where(divisor > 0, grouped / divisor, torch.zeros_like(grouped))
    integers = quotient.round_().clamp_(-limit, limit).to(torch.int8)
    return pack_centroids(integers.flatten(-2), scales, bits)


def integer_limit(bits: int) -> int:
    """Largest magnitude of a stored integer: 7 for int4, 127 for int8."""
    return 7 if bits == 4 else 127


def centroid_scales(centroids: Tensor, bits: int, group_size: int) -> Tensor:
    """Scales bfloat16 `[..., D/group_size]` with which no value of `centroids [..., D]` clips.

    Raises:
        ValueError: a group size that does not divide D or is odd.
    """
    hidden_size = centroids.shape[-1]
    if group_size < 2 or group_size % 2 or hidden_size % group_size:
        raise ValueError(
            f"group size {group_size} must be even and divide the hidden size {hidden_size}"
        )
    largest = _split(centroids.float(), group_size).abs().amax(-1)
    return _round_up_bfloat16(largest / integer_limit(bits))


def pack_centroids(integers: Tensor, scales: Tensor, bits: int) -> QuantizedCentroids:
    """Store int8 `integers [..., D]` (see `integer_limit`) with `scales [..., D/group_size]`."""
    hidden_size = integers.shape[-1]
    group_size = hidden_size // scales.shape[-1]
    if bits == 8:
        return QuantizedCentroids(integers, scales, 8, group_size, hidden_size)
    offset = _split((integers + 8).to(torch.uint8), group_size)
    half = group_size // 2
    low, high = offset[..., :half], offset[..., half:]
    return QuantizedCentroids((low | (high << 4)).flatten(-2), scales, 4, group_size, hidden_size)


def tile_centroids(centroids: QuantizedCentroids, *, pad: bool = False) -> QuantizedCentroids:
    """Interleave `centroids [..., M, D]` in tiles; as they are where tiles do not fit.

    They fit integers whose M is a multiple of 16, or is padded to one, and whose scale groups take
    whole four bytes.
    """
    if centroids.tile == TILE or centroids.scales is None:
        return centroids
    padding = -centroids.values.shape[-2] % TILE
    if centroids.group_size * centroids.bits // 8 % _INTERLEAVED_BYTES or (padding and not pad):
        return centroids
    rows = (0, 0, 0, padding)
    return replace(
        centroids,
        values=_tile(functional.pad(centroids.values, rows), _INTERLEAVED_BYTES),
        scales=_tile(functional.pad(centroids.scales, rows), 1),
        tile=TILE,
        padding=padding,
    )


def project_states(hidden_states: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """Coordinates float32 `[B, m]` of `hidden_states [B, D]`, and `h . mean` float32 `[B]`.

    One row at a time: a matrix product may add in an order that depends on the number of rows.
    """
    table = torch.cat([projection.to_state, projection.mean.unsqueeze(0)])
    products = [(table * hidden).sum(1) for hidden in hidden_states.float()]
    if not products:
        empty = hidden_states.new_empty((0, len(table)), dtype=torch.float32)
        return empty[:, :-1], empty[:, -1]
    both = torch.stack(products)
    return both[:, :-1], both[:, -1]


def quantize_hidden_states(hidden_states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round `hidden_states [B, D]` to int8, with a float32 scale for each `group_size` columns.

    Integer centroids are scored by integer dot products: exact, so any order of summation will do.

    Returns:
        `(integers int8 [B, D], scales float32 [B, D / group_size])`.
    """
    batch, hidden_size = hidden_states.shape
    grouped = hidden_states.float().reshape(batch, hidden_size // group_size, group_size)
    scales = grouped.abs().amax(-1) / 127
    divisor = scales.unsqueeze(-1)
    quotient = torch.where(divisor > 0, grouped / divisor, torch.zeros_like(grouped))
    return quotient.round().clamp(-127, 127).to(torch.int8).flatten(-2), scales


def _tile(values: Tensor, width: int) -> Tensor:
    """Interleave `values [..., M, n]` by `width` elements within each sixteen of M."""
    count, size = values.shape[-2:]
    pieces = values.reshape(*values.shape[:-2], count // TILE, TILE, size // width, width)
    return pieces.transpose(-3, -2).reshape(values.shape)


def _untile(values: Tensor, width: int) -> Tensor:
    """The inverse of `_tile`."""
    count, size = values.shape[-2:]
    pieces = values.reshape(*values.shape[:-2], count // TILE, size // width, TILE, width)
    return pieces.transpose(-3, -2).reshape(values.shape)


def _split(values: Tensor, size: int) -> Tensor:
    """View the last dimension of `values` as `[..., n, size]`."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def _round_up_bfloat16(values: Tensor) -> Tensor:
    """Round non-negative float32 `values` up to bfloat16."""
    bits = values.contiguous().view(torch.int32)
    return (((bits + 0xFFFF) >> 16).to(torch.int16)).view(torch.bfloat16)
