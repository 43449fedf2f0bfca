"""Linear layers streamed by a crew: torch's numbers, the layers' own weights, a crew that rests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashhead_dist.decode.cpu_linear import StreamedLinear, stream_linears
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_kernels.crew import Crew

# A row's products in float32 (bfloat16's and float16's are exact there), rounded once.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", list(_TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1, 70), (1, 7, 70), (3, 1, 70), (0, 1, 70), (70,)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_linear_gives(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """70 columns leave six over after the steps of 64; a product that forgot them fails."""
    torch.manual_seed(0)
    linear = nn.Linear(70, 33, bias=bias, dtype=dtype)
    inputs = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        truth = nn.functional.linear(
            inputs.double(), linear.weight.double(), linear.bias.double() if bias else None
        )
        found = StreamedLinear(linear, linear.weight, Crew(2))(inputs)
    assert found.dtype is dtype
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), truth, atol=tolerance, rtol=tolerance)


def test_inputs_that_are_not_contiguous() -> None:
    linear = nn.Linear(64, 5)
    inputs = torch.randn(64, 2)[:, :1].T
    assert not inputs.is_contiguous() or inputs.stride(1) != 1
    with torch.inference_mode():
        found = StreamedLinear(linear, linear.weight, Crew(1))(inputs)
        torch.testing.assert_close(found, linear(inputs.contiguous()))


def test_only_plain_layers_change_and_keep_their_weights() -> None:
    class Odd(nn.Linear):
        """What another library makes of a linear layer."""

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 5)), Odd(5, 5),
        nn.Linear(5, 5).double(),
    )  # fmt: skip
    before = [layer.weight.clone() for layer in (model[0], model[1][0], model[1][1])]
    with compute_threads(2):
        assert stream_linears(model, model) == 3
    after = [model[0], model[1][0], model[1][1]]
    for layer, weight in zip(after, before, strict=True):
        assert isinstance(layer, StreamedLinear)
        assert torch.equal(layer.weight, weight)
        assert layer.weight.dtype is weight.dtype
    assert [type(model[2]), type(model[3])] == [Odd, nn.Linear]


def test_one_thread_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with compute_threads(1):
        assert stream_linears(model, model) == 0
    assert type(model[0]) is nn.Linear


class _Decoder(nn.Module):
    """An embedding and a layer, which notes torch's threads, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 64), nn.Linear(64, 64)
        self.threads: list[int] = []
        self.fails = False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        if self.fails:
            raise ValueError("told to fail")
        result: torch.Tensor = self.linear(self.embedding(input_ids))
        return result


def test_the_crew_is_awake_for_a_step_of_one_token_only() -> None:
    """Torch has its threads back after the step, and after one that failed."""
    decoder = _Decoder()
    with torch.inference_mode(), compute_threads(2):
        stream_linears(decoder, decoder)
        decoder(input_ids=torch.tensor([[1, 2, 3]]))
        decoder(input_ids=torch.tensor([[1]]))
        decoder(torch.tensor([[1]]))
        assert torch.get_num_threads() == 2
        decoder.fails = True
        with pytest.raises(ValueError, match="told to fail"):
            decoder(input_ids=torch.tensor([[1]]))
        assert torch.get_num_threads() == 2
    assert decoder.threads == [2, 1, 1, 1]
