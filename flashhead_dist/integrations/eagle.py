"""EAGLE drafts: a model that continues a target's own last hidden states, its training and use.

One layer of the target's kind reads, at each position t, the target's hidden state h[t] beside the
embedding of the token chosen from it, x[t + 1], and predicts h[t + 1]; an output head over that
state proposes x[t + 2]. From there it continues from its own predictions. The head is the target's,
dense or retrieval, over all tokens or over fewer. Li et al., "EAGLE", arXiv 2401.15077, section
4.1; both inputs are scaled to unit rms first, as in EAGLE-3 (arXiv 2503.01840).

Decoding, in rounds: the draft proposes a chain of tokens, one forward pass of the target reads all
of them, and the target's head chooses at each place. Proposals are accepted up to the first place
where it chooses another token; its own choice follows them. So every token is the target head's
choice from the target's state after the tokens before it, and the draft affects time only
(Leviathan et al., arXiv 2211.17192, for an argmax). The same holds for sampled text where the noise
of a token is keyed by its position: see `heads.sampling`.

Letters: `B` sequences, `L` positions, `D` hidden size.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache

from flashhead_dist.decode.body import new_cache, record_past
from flashhead_dist.decode.loop import Choose
from flashhead_dist.errors import UserError
from flashhead_dist.states.collect import run_body
from flashhead_dist.states.split import Passage

BATCH_TOKENS = 1024
LEARNING_RATE = 6e-4
_NOISE = 0.1
"""Uniform noise on the true states, in their rms: predicted states are not exact either."""
_STATE_WEIGHT, _TOKEN_WEIGHT = 1.0, 0.3
_WEIGHTS, _ORIGIN = "draft.safetensors", "draft.json"
_EPS = 1e-6


class EagleDraft(nn.Module):
    """The draft without a head and without an embedding of its own."""

    def __init__(self, target_config: Any) -> None:
        """target_config: the text config of the target, a transformers causal language model."""
        super().__init__()
        config = copy.deepcopy(target_config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"]
        # Its own embedding is never used.
        config.vocab_size, config.pad_token_id = 1, None
        size: int = config.hidden_size
        self.hidden_size = size
        self.fuse = nn.Linear(2 * size, size, bias=False)
        auto: Any = AutoModel
        self.decoder = auto.from_config(config)

    def start_from(self, target: Any) -> None:
        """Initialise with the target's last layer and final norm, close to passing its state on."""
        decoder = target.get_decoder()
        self.decoder.layers[0].load_state_dict(decoder.layers[-1].state_dict())
        self.decoder.norm.load_state_dict(decoder.norm.state_dict())
        with torch.no_grad():
            self.fuse.weight.mul_(0.1)
            self.fuse.weight[:, : self.hidden_size].add_(torch.eye(self.hidden_size))

    def new_cache(self) -> Any:
        """An empty KV cache for `forward`."""
        return DynamicCache(config=self.decoder.config)

    def forward(self, states: Tensor, embeddings: Tensor, cache: Any = None) -> Tensor:
        """Predicted next states `[B, L, D]`.

        states: `[B, L, D]`, the target's or predicted ones; embeddings: `[B, L, D]`, of the token
        chosen from each; cache: continued by L positions where it is given.
        """
        both = torch.cat([_unit_rms(states), _unit_rms(embeddings)], -1)
        found: Tensor = self.decoder(
            inputs_embeds=self.fuse(both), past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        return found

    def save(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write weights and `origin` (JSON: the target's name and `weight_hash`) to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        # Without the decoder's unused embedding.
        weights = {n: w for n, w in self.state_dict().items() if "embed_tokens" not in n}
        save_file(weights, folder / _WEIGHTS)
        text = json.dumps(origin | {"hidden_size": self.hidden_size}, indent=1) + "\n"
        (folder / _ORIGIN).write_text(text, encoding="utf-8")


def load_draft(folder: Path, target: Any, weight_hash: str) -> EagleDraft:
    """The draft that `EagleDraft.save` wrote for `target`, in eval mode and float32.

    weight_hash: of the target's output embedding.

    Raises:
        UserError: nothing readable there, or a draft of another target.
    """
    try:
        origin = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
        weights = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no readable draft model ({error}): train one with launch/drafts.py"
        ) from error
    if origin.get("weight_hash") != weight_hash:
        raise UserError(
            f"the draft in {folder} was trained for {origin.get('model')} with another output "
            "embedding than this model's: train one for it with launch/drafts.py"
        )
    draft = EagleDraft(target.get_decoder().config)
    missing, unexpected = draft.load_state_dict(weights, strict=False)
    if unexpected or any("embed_tokens" not in name for name in missing):
        raise UserError(
            f"the draft in {folder} has other layers than this model's: train one with "
            "launch/drafts.py"
        )
    return draft.eval()


def _unit_rms(values: Tensor) -> Tensor:
    return values * torch.rsqrt(values.float().square().mean(-1, keepdim=True) + _EPS).to(values)


class TrainingText(NamedTuple):
    """token_ids: int64 `[L]`; states: bfloat16 `[L, D]`, the target's last hidden states."""

    token_ids: Tensor
    states: Tensor


def read_states(target: Any, texts: Sequence[list[int]], *, progress: bool) -> list[TrainingText]:
    """Run the target once over every text of two tokens or more."""
    passages = [
        Passage("", "calibration", number, token_ids, list(range(len(token_ids))))
        for number, token_ids in enumerate(texts)
        if len(token_ids) > 2
    ]
    states = run_body(target, passages, device=torch.device("cpu"), progress=progress)
    return [
        TrainingText(torch.tensor(passage.token_ids), found)
        for passage, found in zip(passages, states, strict=True)
    ]


def train_draft(
    target: Any,
    texts: Sequence[TrainingText],
    *,
    num_epochs: int,
    learning_rate: float = LEARNING_RATE,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    on_batch: Callable[[float], None] | None = None,
) -> EagleDraft:
    """Train a draft of `target` in float32; deterministic for a given seed and thread count.

    The loss is EAGLE's (arXiv 2401.15077, section 4.2): smooth L1 between predicted and true
    states, and cross entropy between the target head's distributions of either. That head is
    restricted to the texts' own tokens: a large vocabulary would be most of the work.

    on_batch: called with each batch's loss.
    """
    torch.manual_seed(seed)
    draft = EagleDraft(target.get_decoder().config).float()
    draft.start_from(target)
    used = torch.unique(torch.cat([text.token_ids for text in texts]))
    rows = target.get_output_embeddings().weight.detach()[used].float()  # [U, D]
    embedding = target.get_input_embeddings()
    num_batches = num_epochs * len(list(_batches(texts, batch_tokens, seed)))
    weights = [p for name, p in draft.named_parameters() if "embed_tokens" not in name]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(num_batches, 2), pct_start=0.1
    )
    draft.train()
    for epoch in range(num_epochs):
        for batch in _batches(texts, batch_tokens, seed + epoch):
            loss = _loss(draft, embedding, rows, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            if on_batch is not None:
                on_batch(loss.item())
    return draft.eval()


def _loss(
    draft: EagleDraft, embedding: nn.Module, rows: Tensor, batch: Sequence[TrainingText]
) -> Tensor:
    """Of one batch, padded on the right: under causal attention padding reaches no token."""
    states = nn.utils.rnn.pad_sequence([t.states.float() for t in batch], batch_first=True)
    token_ids = nn.utils.rnn.pad_sequence([t.token_ids for t in batch], batch_first=True)
    lengths = torch.tensor([len(t.token_ids) for t in batch])
    real = torch.arange(states.shape[1] - 1) < (lengths - 1).unsqueeze(1)
    given, wanted = states[:, :-1], states[:, 1:][real]  # [B, L - 1, D], [n, D]
    scale = wanted.square().mean().sqrt()
    noise = (torch.rand_like(given) - 0.5) * 2 * _NOISE * scale
    with torch.no_grad():
        embeddings = embedding(token_ids[:, 1:]).float()
        truth = (wanted @ rows.T).softmax(-1)
    found = draft(given + noise, embeddings)[real]
    on_states = nn.functional.smooth_l1_loss(found / scale, wanted / scale)
    on_tokens = nn.functional.cross_entropy(found @ rows.T, truth)
    return _STATE_WEIGHT * on_states + _TOKEN_WEIGHT * on_tokens


def _batches(
    texts: Sequence[TrainingText], batch_tokens: int, seed: int
) -> Iterator[list[TrainingText]]:
    """All texts in batches of similar length, in random order."""
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(texts, key=lambda text: len(text.token_ids))
    batches: list[list[TrainingText]] = [[]]
    for text in ordered:
        if batches[-1] and (len(batches[-1]) + 1) * len(text.token_ids) > batch_tokens:
            batches.append([])
        batches[-1].append(text)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        if batches[number]:
            yield batches[number]


@dataclass
class DraftCounts:
    """Counts and seconds of speculative decoding.

    accepted_at[i]: rounds with at least i + 1 accepted proposals; proposed_at[i]: rounds with so
    many proposals. draft_s: in the draft, of which draft_head_s in its head; target_s: in the
    target's body; verify_s: in its head. passes: forward passes of the target, with the prompt's.
    """

    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    passes: int = 0
    draft_s: float = 0.0
    draft_head_s: float = 0.0
    target_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of accepted proposals; NaN without any."""
        proposed = sum(self.proposed_at)
        return sum(self.accepted_at) / proposed if proposed else float("nan")

    def count(self, proposed: int, accepted: int) -> None:
        """Add a round."""
        for counts, number in ((self.proposed_at, proposed), (self.accepted_at, accepted)):
            counts.extend([0] * (number - len(counts)))
            for i in range(number):
                counts[i] += 1

    def add(self, other: DraftCounts) -> None:
        """Add those of another text."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(value, list):
                longest = max(len(own), len(value))
                padded = [[*some, *[0] * (longest - len(some))] for some in (own, value)]
                setattr(self, name, [a + b for a, b in zip(*padded, strict=True)])
            else:
                setattr(self, name, own + value)


class DraftDecoder:
    """Speculative decoding of one sequence at a time; the text is the target's own.

    model: a transformers causal language model, of which the body is used; choose: its head.
    choose_draft: the head over the draft's states.
    """

    def __init__(self, model: Any, choose: Choose, draft: EagleDraft, choose_draft: Choose) -> None:
        self._model = model
        self._choose, self._draft, self._choose_draft = choose, draft, choose_draft

    @torch.inference_mode()
    def decode(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        num_drafts: int,
        stop_token_ids: frozenset[int] = frozenset(),
        sequence: int = 0,
    ) -> tuple[list[int], DraftCounts]:
        """Continue `prompt` until a stop token or `max_new_tokens`; new tokens and their counts.

        num_drafts: proposals a round; 0 is plain decoding. sequence: keys the noise of sampling.

        Raises:
            UserError: an empty prompt, a number out of range, or a state that cannot be rolled
                back.
        """
        if not prompt:
            raise UserError("a prompt is empty: give it at least one token, such as <bos>")
        if num_drafts < 0 or max_new_tokens < 1:
            raise UserError(
                f"{num_drafts} drafts a round and {max_new_tokens} new tokens: give 0 or more of "
                "the former and 1 or more of the latter"
            )
        counts, start_s = DraftCounts(), time.perf_counter()
        number = torch.tensor([sequence])
        decoder, embed = self._model.get_decoder(), self._model.get_input_embeddings()
        cache = new_cache(decoder.config, recording=True)
        draft_cache = self._draft.new_cache()

        def read(token_ids: Sequence[int]) -> Tensor:
            """The target's states `[L, D]` of L further tokens."""
            begin_s = time.perf_counter()
            found = decoder(
                input_ids=torch.tensor([list(token_ids)]), past_key_values=cache, use_cache=True
            )
            if counts.passes == 0:
                record_past(cache)
            counts.passes += 1
            counts.target_s += time.perf_counter() - begin_s
            states: Tensor = found.last_hidden_state[0]
            return states

        def verify(states: Tensor, position: int) -> list[int]:
            """The target's own tokens after `states [L, D]`, the first one at `position`."""
            begin_s = time.perf_counter()
            positions = torch.arange(position, position + len(states))
            chosen: list[int] = self._choose(states, positions, number.repeat(len(states))).tolist()
            counts.verify_s += time.perf_counter() - begin_s
            return chosen

        def propose(states: Tensor, token_ids: list[int], position: int, count: int) -> list[int]:
            """`count` tokens after `token_ids [n]`, which were chosen from `states [n, D]`."""
            begin_s = time.perf_counter()
            tokens, states = torch.tensor([token_ids]), states.unsqueeze(0)
            proposed: list[int] = []
            for i in range(count):
                embeddings = embed(tokens).to(states)
                states = self._draft(states, embeddings, draft_cache)[:, -1:]
                head_s = time.perf_counter()
                chosen = self._choose_draft(states[0], torch.tensor([position + i]), number)
                tokens = chosen.cpu().view(1, 1)
                counts.draft_head_s += time.perf_counter() - head_s
                proposed.append(int(tokens))
            if count > 1:
                # The next round reads the target's states and tokens instead of predicted ones.
                draft_cache.crop(1 - count)
            counts.draft_s += time.perf_counter() - begin_s
            return proposed

        states = read(prompt)
        text = verify(states[-1:], len(prompt))
        accepted_ids = [*prompt[1:], *text]
        while len(text) < max_new_tokens and text[-1] not in stop_token_ids:
            position = len(prompt) + len(text)
            # The last token of a text is never a proposal: it needs no pass of the target.
            count = min(num_drafts, max_new_tokens - len(text) - 1)
            proposed = propose(states, accepted_ids, position, count) if count else []
            states = read([text[-1], *proposed])
            chosen = verify(states, position)
            accepted = next((i for i in range(count) if proposed[i] != chosen[i]), count)
            counts.count(count, accepted)
            cache.crop(accepted - count)
            states, accepted_ids = states[: accepted + 1], chosen[: accepted + 1]
            stops = [i for i, token in enumerate(accepted_ids) if token in stop_token_ids]
            text += accepted_ids[: stops[0] + 1] if stops else accepted_ids
        counts.total_s = time.perf_counter() - start_s
        return text, counts


def frequent_token_ids(texts: Iterable[Iterable[int]], vocab_size: int, count: int) -> Tensor:
    """The `count` tokens most used in `texts`, int64 ascending; of equal use, smaller ids first.

    For a draft head over fewer tokens: the target verifies its proposals, so a missing token costs
    a round and nothing else (Zhao et al., "FR-Spec", arXiv 2502.14856). Tokenizers give small ids
    to frequent pieces, which suits what the texts do not cover.

    Raises:
        UserError: count outside 1..vocab_size.
    """
    if not 1 <= count <= vocab_size:
        raise UserError(
            f"a draft vocabulary of {count} tokens must lie between 1 and the model's {vocab_size}"
        )
    used = Counter(token for text in texts for token in text)
    ordered = sorted(range(vocab_size), key=lambda token: (-used[token], token))
    return torch.tensor(sorted(ordered[:count]))


def over_full_vocabulary(choose: Choose, token_ids: Tensor) -> Choose:
    """`choose` over a reduced vocabulary, whose token i is `token_ids[i]` (int64 `[n]`)."""

    def chosen(hidden: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        return token_ids[choose(hidden, positions, sequences).cpu()]

    return chosen
