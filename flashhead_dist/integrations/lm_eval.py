"""FlashHead as a model of lm-eval, for its own tasks and those of a user.

https://github.com/EleutherAI/lm-evaluation-harness

    python -m flashhead_dist.integrations.lm_eval run --model flashhead --tasks arc_easy --limit 50
    python -m flashhead_dist.integrations.lm_eval run --model flashhead \\
        --model_args pretrained=MODEL,index=INDEX,likelihood=dense --tasks gsm8k,ifeval

Takes the same command line as `lm_eval`, which does not know the model by itself. Texts come from
the retrieval head through `replace_head`; docs/guides/evaluation.md says what likelihoods are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashhead_dist.errors import UserError
from flashhead_dist.heads.base import HIDDEN_DTYPES, Head
from flashhead_dist.heads.dense import IndexScan
from flashhead_dist.heads.sampling import token_log_probs
from flashhead_dist.index import ensure_index
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import open_model

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    _MISSING = f"lm-eval cannot be imported ({error}): pip install -e '.[lm-eval]'"
    if __name__ == "__main__":
        print(f"error: {_MISSING}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    raise UserError(_MISSING) from error

Likelihood = Literal["closed_form", "dense"]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in HIDDEN_DTYPES}
_ROWS_AT_ONCE = 64
_Request = tuple[Any, list[int], list[int]]


@register_model("flashhead")  # type: ignore[untyped-decorator, unused-ignore]
class FlashHeadLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A transformers model whose output head retrieves.

    `generate_until` is lm-eval's own over `model.generate`. `loglikelihood` runs the body once over
    context and continuation and scores the continuation's tokens only.
    """

    def __init__(
        self,
        pretrained: str = "",
        index: str = "",
        num_probes: int | None = None,
        alpha: float | None = None,
        likelihood: Likelihood = "closed_form",
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        """pretrained: HF folder, .gguf file or hub id; the built-in model where empty. index: its
        folder; the cached default where empty. num_probes, alpha: the index's own where None.

        likelihood: `closed_form`, what this head samples from, or `dense`, the softmax over all
            logits, from the rows of the index. A continuation is greedy by the same head.
        options: of `lm_eval.models.huggingface.HFLM`.

        Raises:
            UserError: an option that is unknown, a model or an index that cannot be read.
        """
        if likelihood not in get_args(Likelihood):
            raise UserError(
                f"likelihood {likelihood!r} is unknown: choose from "
                f"{', '.join(get_args(Likelihood))}"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size {batch_size!r} is not served: give a number from 1")
        if dtype not in _DTYPES:
            raise UserError(f"dtype {dtype!r} is not served: choose from {', '.join(_DTYPES)}")
        source = open_model(pretrained or None)
        body, tokenizer = source.load_body(_DTYPES[dtype])
        folder = Path(index) if index else ensure_index(source)
        # Without a device lm-eval names cuda, whether there is one or not.
        body = body.to((device or "cuda") if torch.cuda.is_available() else "cpu")
        super().__init__(
            pretrained=body, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **options
        )
        # After HFLM's constructor, which ties weights.
        replace_head(self.model, folder, num_probes=num_probes, alpha=alpha)
        rows = self.model.retrieval_head.logit_rows
        self._head: Head = rows.head
        if likelihood == "dense":
            self._head = IndexScan(rows.head.tp, rows.head.index)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results; the head among it."""
        head = self.model.retrieval_head.logit_rows.head
        return {
            "head": head.name,
            "num_probes": head.num_probes,
            "index_hash": head.index.manifest.index_hash,
            "likelihood_head": self._head.name,
            "model_dtype": str(self.model.dtype),
        }

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of log P of each continuation's tokens, and whether each is the greedy one."""
        size = override_bs or int(self.batch_size)
        # Longest first: the peak of memory comes at once.
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="likelihoods") as bar:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                found = self._answer([requests[i] for i in batch])
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(batch))
        return answers

    def _answer(self, requests: Sequence[_Request]) -> list[tuple[float, bool]]:
        fed = [self._fed(context, continuation) for _, context, continuation in requests]
        width = max(len(tokens) for tokens in fed)
        # Padded on the right without a mask: attention is causal.
        token_ids = torch.zeros(len(fed), width, dtype=torch.int64)
        for row, tokens in enumerate(fed):
            token_ids[row, : len(tokens)] = torch.tensor(tokens)
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=token_ids.to(self.device), use_cache=False).last_hidden_state
        answers = []
        for row, (_, _, continuation) in enumerate(requests):
            stop = len(fed[row])
            states = hidden[row, stop - len(continuation) : stop]
            wanted = torch.tensor(continuation, device=states.device)
            log_probs, greedy = self._score(states, wanted)
            answers.append((float(log_probs.sum()), bool((greedy == wanted).all())))
        return answers

    def _fed(self, context: list[int], continuation: list[int]) -> list[int]:
        """What the body reads: all but the last token, the end of it where it is too long.

        Raises:
            UserError: a continuation that does not fit the model by itself.
        """
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context "
                f"of {self.max_length}: shorten it, or give a larger max_length"
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    def _score(self, states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """log P float64 `[n]` of `token_ids` int64 `[n]`, and the greedy tokens int64 `[n]`."""
        log_probs, greedy = [], []
        for first in range(0, len(states), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            some = states[part].contiguous()
            log_probs.append(
                token_log_probs(
                    self._head, some, token_ids[part], contract=self.model.retrieval_head.contract
                )
            )
            greedy.append(self._head(some).token_ids[:, 0])
        return torch.cat(log_probs).double(), torch.cat(greedy)


def main() -> int:
    """lm-eval's own command line, with the model `flashhead`; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
