"""What a model does with logits after its output head, found by asking it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashhead_dist.errors import UserError
from flashhead_kernels.logits import FinalLogits


@torch.no_grad()
def measure_final_logits(model: Any, linear: nn.Linear) -> FinalLogits:
    """Soft-capping between `linear`, the model's output head, and `model(...).logits`.

    One forward pass of one token, in which known values stand for the head's. The cap is the
    config's `final_logit_softcapping` (Gemma 2); without it the values must come out as they are.

    Raises:
        UserError: the head is not used once, on last hidden states, or anything else is done.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    asked = torch.linspace(-50.0, 50.0, linear.out_features, dtype=torch.float32)
    inputs: list[tuple[int, ...]] = []

    def answer(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(tuple(given[0].shape))
        return asked.to(output.device).expand(output.shape)

    handle = linear.register_forward_hook(answer)
    training = model.training
    model.eval()
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        # Offloaded, a model has no device of its own, and moves what it is given.
        device = "cpu" if model.device.type == "meta" else model.device
        token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        said = model(input_ids=token, use_cache=False).logits.float().cpu().reshape(-1)
    finally:
        handle.remove()
        model.train(training)
        if cap is not None:
            config.final_logit_softcapping = cap
    once = inputs == [(1, 1, linear.in_features)] and len(said) == len(asked)
    # The values may have been rounded to bfloat16 on their way.
    if not once or not torch.allclose(said, asked, rtol=1e-2, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} does more with its output head's logits than soft-cap them, "
            "which a retrieval head does not follow: keep its own head"
        )
    return FinalLogits(softcap=cap or 0.0)
