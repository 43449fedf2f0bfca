"""Robustness of default indexes: synthetic output embeddings like other models' and unusual ones.

Embeddings follow published figures of Llama-3 and Qwen-3. Rows are unit directions times log-normal
norms. A direction is a sum of shared codes (clusters of clusters, as in `models.synthetic`) and
noise of its own, of a covariance whose eigenvalues fall as a power law in a random basis, plus a
common vector (anisotropy). docs/results/robustness.md says which numbers are published, where, and
which are assumed. `try_head` builds the index of one and measures its fidelity, balance and
exactness.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashhead_dist.evaluate.fidelity import evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.base import Want
from flashhead_dist.heads.registry import DEFAULT_HEAD, EmulatedHead, emulate_head
from flashhead_dist.index import IndexOptions, ensure_index, load_manifest, load_shard
from flashhead_dist.models import ModelSource
from flashhead_dist.models.base import RowStore
from flashhead_dist.states import HiddenStates

SOURCES = ("frequent", "any-token", "odd-rows", "no-token")
_VERSION = 1
_CODES = 64
_CODE_WEIGHTS = (0.55, 0.5, 0.35)
_NOISE_WEIGHT = 0.6
_TOKENS_A_CLUSTER = 32
_ROWS = 16384
_TARGET_LOGIT = 30.0
_STATE_NOISE = 0.7
_STATE_COMMON = 0.5
_COMPARED_STATES = 256
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What a made-up head is like.

    vocab_size, hidden_size: V, D. norm, norm_std: of the rows. spectrum_exponent: the k-th greatest
    eigenvalue of the rows' covariance goes as k^-exponent. common_share: share of a unit row's
    square along the common vector, which is the mean cosine of two rows. tiny_rows: of norm 1e-21,
    over all ids; zero_rows: all-zero, the last ids; duplicates: copies of other rows; huge_rows:
    `huge_factor` times as long.
    """

    name: str
    vocab_size: int
    hidden_size: int
    norm: float
    norm_std: float
    spectrum_exponent: float = 0.7
    common_share: float = 0.2
    tiny_rows: int = 0
    zero_rows: int = 0
    duplicates: int = 0
    huge_rows: int = 0
    huge_factor: float = 50.0


@dataclass(frozen=True)
class MadeHead:
    """rows bf16 `[V, D]`; common float32 `[D]`, the unit vector that all rows lean to; odd int64
    `[n]`, ids of rows that were made tiny, zero, equal to another or huge."""

    spec: HeadSpec
    rows: Tensor = field(repr=False)
    common: Tensor = field(repr=False)
    odd: Tensor = field(repr=False)

    @property
    def model(self) -> ModelSource:
        """The head as a model without a body, marked as synthetic."""
        return ModelSource(
            name=f"made-{self.spec.name}-{self.spec.vocab_size}x{self.spec.hidden_size}",
            synthetic=True,
            dtype=torch.bfloat16,
            rows=_HeldRows(self.rows),
        )


class _HeldRows(RowStore):
    """Rows that are in memory."""

    dtype, chunk_rows = torch.bfloat16, _ROWS

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.shape = (len(rows), rows.shape[1])

    def read_chunk(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop]

    def fingerprint(self) -> str:
        return f"made|{_VERSION}|{self.shape[0]}|{self.shape[1]}"


def make_head(spec: HeadSpec, *, seed: int = 0) -> MadeHead:
    """The head that `spec` and `seed` fix."""
    draw = torch.Generator().manual_seed(seed)
    size = spec.hidden_size
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=draw))
    scale = torch.arange(1, size + 1).float().pow(-spec.spectrum_exponent / 2)
    scale /= scale.square().sum().sqrt()
    shape = scale.unsqueeze(1) * basis.T  # standard normal numbers @ shape have the covariance
    common = torch.nn.functional.normalize(torch.randn(size, generator=draw), dim=0)
    codes = [torch.randn(_CODES, size, generator=draw) for _ in _CODE_WEIGHTS]
    codes = [
        weight * (code - code.mean(0)) for weight, code in zip(_CODE_WEIGHTS, codes, strict=True)
    ]
    rows = torch.empty(spec.vocab_size, size, dtype=torch.bfloat16)
    clusters = max(1, spec.vocab_size // _TOKENS_A_CLUSTER)
    chosen = torch.randint(_CODES, (clusters, len(codes)), generator=draw)
    sigma = (1 + (spec.norm_std / spec.norm) ** 2) ** 0.5
    log_std = (2 * torch.tensor(sigma).log()).sqrt()
    for start in range(0, spec.vocab_size, _ROWS):
        count = min(_ROWS, spec.vocab_size - start)
        # Squaring a uniform draw gives some clusters more tokens than others.
        number = (torch.rand(count, generator=draw) ** 2 * clusters).long()
        own = _NOISE_WEIGHT * torch.randn(count, size, generator=draw)
        for place, code in enumerate(codes):
            own += code[chosen[number, place]]
        unit = torch.nn.functional.normalize(own @ shape, dim=1)
        unit = (1 - spec.common_share) ** 0.5 * unit + spec.common_share**0.5 * common
        unit = torch.nn.functional.normalize(unit, dim=1)
        noise = torch.randn(count, generator=draw)
        norms = spec.norm / sigma * (log_std * noise).exp()
        rows[start : start + count] = (unit * norms.unsqueeze(1)).to(torch.bfloat16)
    return MadeHead(spec, rows, common, _make_odd(spec, rows, draw))


def _make_odd(spec: HeadSpec, rows: Tensor, draw: torch.Generator) -> Tensor:
    """Spoil rows in place as `spec` says; their ids."""
    ordinary = spec.vocab_size - spec.zero_rows
    order = torch.randperm(ordinary, generator=draw)
    counts = [spec.tiny_rows, spec.duplicates, spec.huge_rows]
    tiny, copies, huge, rest = torch.split(order, [*counts, ordinary - sum(counts)])
    if spec.tiny_rows:
        rows[tiny] = (rows[tiny].float() * (1e-21 / spec.norm)).to(rows.dtype)
    if spec.huge_rows:
        rows[huge] = (rows[huge].float() * spec.huge_factor).to(rows.dtype)
    if spec.duplicates:
        # Of few rows, so that some have many copies.
        sources = rest[torch.randint(max(1, spec.duplicates // 8), (spec.duplicates,),
                                     generator=draw)]  # fmt: skip
        rows[copies] = rows[sources]
    rows[ordinary:] = 0
    return torch.cat([tiny, copies, huge, torch.arange(ordinary, spec.vocab_size)])


LLAMA_3 = HeadSpec(
    name="llama-3", vocab_size=128_256, hidden_size=2048, norm=0.674, norm_std=0.084,
    tiny_rows=20, zero_rows=250,
)  # fmt: skip
"""Norms and rows of no norm as in Llama-3.1-8B; D as in Llama-3.2-1B."""
QWEN_3 = HeadSpec(
    name="qwen-3", vocab_size=151_936, hidden_size=1024, norm=1.275, norm_std=0.312, zero_rows=267,
)  # fmt: skip
"""Norms as in Qwen3-32B; D as in Qwen3-0.6B; 267 rows that no token has."""


def robustness_specs(divisor: int = 1, hidden_size: int | None = None) -> list[HeadSpec]:
    """The heads to try, V and the numbers of odd rows divided by `divisor`, D as given or its own.

    Raises:
        ValueError: a divisor below 1.
    """
    if divisor < 1:
        raise ValueError("the divisor must be 1 or more")
    uneven = replace(QWEN_3, name="uneven", vocab_size=151_669, zero_rows=0)
    specs = [
        LLAMA_3,
        QWEN_3,
        uneven,
        replace(uneven, name="huge-rows", huge_rows=256),
        replace(uneven, name="duplicates", duplicates=15_000),
        replace(uneven, name="zero-rows", zero_rows=15_000),
        replace(uneven, name="lean", common_share=0.6, spectrum_exponent=1.3),
        replace(
            uneven, name="all-at-once", tiny_rows=256, zero_rows=3_000, duplicates=5_000,
            huge_rows=256,
        ),
    ]  # fmt: skip
    numbers = ("vocab_size", "tiny_rows", "zero_rows", "duplicates", "huge_rows")
    return [
        replace(
            spec,
            hidden_size=hidden_size or spec.hidden_size,
            **{name: -(-getattr(spec, name) // divisor) for name in numbers},
        )
        for spec in specs
    ]


def made_states(head: MadeHead, *, count: int, seed: int = 0) -> tuple[HiddenStates, HiddenStates]:
    """(calibration, test): `4 * count` and `count` a source.

    A state points to a token's row less the rows' mean, with noise of 0.7 of its length and half of
    it along the common vector, long enough for a logit of about 30: of tokens by Zipf's law
    (`frequent`, which alone calibrate), of any token alike, of rows that were made odd (where there
    are any), and of no token, noise alone.
    """
    draw = torch.Generator().manual_seed(seed)
    size = head.spec.vocab_size
    frequency = 1.0 / torch.arange(1, size + 1, dtype=torch.float64)
    order = torch.randperm(size, generator=draw)

    def frequent(wanted: int) -> Tensor:
        total = frequency.cumsum(0)
        uniform = torch.rand(wanted, generator=draw, dtype=torch.float64) * total[-1]
        return order[torch.searchsorted(total, uniform).clamp(max=size - 1)]

    calibration = _towards(head, frequent(4 * count), draw)
    parts = {
        0: _towards(head, frequent(count), draw),
        1: _towards(head, torch.randint(size, (count,), generator=draw), draw),
    }
    if len(head.odd):
        some = head.odd[torch.randint(len(head.odd), (count,), generator=draw)]
        parts[2] = _towards(head, some, draw)
    parts[3] = _towards(head, None, draw, count)
    origin = f"made-up states for {head.model.name}, seed {seed}"
    all_frequent = torch.zeros(len(calibration), dtype=torch.int64)
    sources = torch.tensor(list(parts)).repeat_interleave(count)
    return (
        HiddenStates(calibration, all_frequent, SOURCES, f"{origin}, calibration part"),
        HiddenStates(torch.cat(list(parts.values())), sources, SOURCES, f"{origin}, test part"),
    )


def _towards(
    head: MadeHead, tokens: Tensor | None, draw: torch.Generator, count: int = 0
) -> Tensor:
    """States bf16 `[n, D]` of `tokens [n]`, or `count` of none."""
    size = head.spec.hidden_size
    number = count if tokens is None else len(tokens)
    states: Tensor = torch.randn(number, size, generator=draw) * (_STATE_NOISE / size**0.5)
    if tokens is not None:
        mean = head.rows.float().mean(0)
        rows = head.rows[tokens].float() - mean
        states += rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    states += _STATE_COMMON * torch.randn(number, 1, generator=draw) * head.common
    scaled = states * (_TARGET_LOGIT / head.spec.norm)
    return scaled.to(torch.bfloat16)


@dataclass(frozen=True)
class Trial:
    """What one made-up head gave.

    top1_logit: share of states whose best logit is the dense head's, so that a token with an equal
    row will do; top1_token: the same token as well (ties go to the smallest id). By source, and
    `worst_*`. tokens_a_cluster: fewest and most in a cluster that holds any, pads left out.
    bytes_share: of the dense head's in bf16. work_max_over_mean: by tp_size, bytes that the busiest
    rank reads over the mean. equal_tp_sizes: those whose ids and logits are tp 1's, bit for bit.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_states: int
    top1_logit: float
    top1_token: float
    worst_source: str
    worst_top1_logit: float
    top1_logit_by_source: dict[str, float]
    top1_token_by_source: dict[str, float]
    bytes_share: float
    num_clusters: int
    num_groups: int
    tokens_a_cluster: tuple[int, int]
    num_pads: int
    work_max_over_mean: dict[int, float]
    equal_tp_sizes: list[int]
    build_seconds: float


def try_head(
    spec: HeadSpec,
    *,
    options: IndexOptions | None = None,
    num_states: int = 500,
    tp_sizes: range = range(1, 9),
    progress: bool = True,
) -> Trial:
    """Make the head, build its index (kept in the cache) and evaluate it.

    num_states: test states a source.

    Raises:
        UserError: options that do not fit, or a cache that cannot be written.
    """
    head = make_head(spec)
    model = head.model
    calibration, test = made_states(head, count=num_states)
    index = ensure_index(
        model, options, device="cpu", states=lambda: (calibration, test), progress=progress
    )
    one = emulate_head(DEFAULT_HEAD, tp_size=1, model=model, index_dir=index)
    truth = dense_truth(model, test.states, progress=progress)
    fidelity = evaluate_fidelity(one, test, truth, progress=progress)
    answers = torch.cat([
        one.serve(part, Want()).logits[:, 0] for part in torch.split(test.states, _BATCH)
    ])  # fmt: skip
    same = (answers == truth.logits[:, 0]).double()
    by_source = {
        source: float(same[test.source_ids == number].mean())
        for number, source in enumerate(test.sources)
        if bool((test.source_ids == number).any())
    }
    worst = min(by_source, key=lambda source: by_source[source])
    manifest = load_manifest(index)
    shard = load_shard(index).shard
    held = shard.num_tokens[shard.num_tokens > 0]
    some = test.states[:: max(1, len(test) // _COMPARED_STATES)]
    expected = _serve(one, some)
    work, equal = {}, []
    for tp_size in tp_sizes:
        ranks = emulate_head(DEFAULT_HEAD, tp_size=tp_size, model=model, index_dir=index)
        read = [rank.read_bytes_per_row for rank in ranks.ranks]
        work[tp_size] = max(read) * len(read) / sum(read)
        if all(map(torch.equal, _serve(ranks, some), expected)):
            equal.append(tp_size)
    return Trial(
        name=spec.name,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_states=len(test),
        top1_logit=float(same.mean()),
        top1_token=fidelity.top1_agreement,
        worst_source=worst,
        worst_top1_logit=by_source[worst],
        top1_logit_by_source=by_source,
        top1_token_by_source=fidelity.top1_agreement_by_source,
        bytes_share=fidelity.bytes_share,
        num_clusters=manifest.num_clusters,
        num_groups=manifest.num_groups,
        tokens_a_cluster=(int(held.min()), int(held.max())),
        num_pads=int((shard.token_ids < 0).sum()),
        work_max_over_mean=work,
        equal_tp_sizes=equal,
        build_seconds=manifest.build_seconds,
    )


def _serve(head: EmulatedHead, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and logits float32 `[N, 10]`."""
    parts = [head.serve(part, Want(k=10)) for part in torch.split(states, _BATCH)]
    return torch.cat([p.token_ids for p in parts]), torch.cat([p.logits for p in parts])
