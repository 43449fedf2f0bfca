"""On the default model: real texts part where one dense decoding says, and the KL is exact."""

from __future__ import annotations

import pytest
import torch

from flashhead_dist.decode.prompts import held_out_prompts
from flashhead_dist.evaluate.divergence import evaluate_divergence
from flashhead_dist.evaluate.texts import TextDecoder, compare_texts, first_difference
from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.registry import build_head
from flashhead_dist.index import ensure_index
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_dist.states import collect_hidden_states

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model() -> ModelSource:
    return open_model()


def test_a_weak_head_parts_where_the_dense_states_say(model: ModelSource) -> None:
    """A quarter of the probes, so that most of ten texts part within 32 tokens."""
    decoder = TextDecoder(model, max_new_tokens=32, batch_size=10)
    (batch,) = decoder.batches(held_out_prompts(10))
    texts = decoder.dense_texts(batch)
    head = build_head(
        "flashhead", tp=TensorParallel.single(), model=model, index_dir=ensure_index(model),
        num_probes=128,
    )  # fmt: skip
    records = compare_texts(head, texts, decoder.stop_token_ids, key="k", label="l")
    real, _ = decoder.decode(batch, head)
    places = [first_difference(left, right) for left, right in zip(texts.token_ids, real,
                                                                    strict=True)]  # fmt: skip
    assert places == [record.first_difference for record in records]
    assert sum(place is not None for place in places) >= 3


def test_the_divergence_is_the_sum_over_the_vocabulary(model: ModelSource) -> None:
    states = collect_hidden_states(model)[1].states[::4000].contiguous()
    head = build_head(
        "flashhead", tp=TensorParallel.single(), model=model, index_dir=ensure_index(model)
    )
    found = evaluate_divergence(head, model, states, progress=False)
    own = closed_form(head, states).unnormalized().double().log_softmax(1)
    logits = torch.cat([
        states.float() @ model.read_rows(start, start + 16384).float().T
        for start in range(0, model.vocab_size, 16384)
    ], dim=1).double()  # fmt: skip
    dense = logits.log_softmax(1)
    expected = (dense.exp() * (dense - own)).sum(1)
    torch.testing.assert_close(found.kl, expected, rtol=1e-3, atol=1e-4)
