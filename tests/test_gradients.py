"""A backward pass through a fused module raises, however it is run: else it would train what stands before by nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from random_cells import Dice, random_layers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import torch_lstm_quant as tlq

T, B, I, H = 4, 3, 7, 6  # noqa: E741
REFUSED = "a fused LSTM or LSTMCell is for inference only, got a backward pass: train before converting"

Model = Callable[[Tensor], Tensor]


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(5, I)
        self.lstm = tlq.LSTM(random_layers(Dice(0), I, H, 2, 2, "int8"))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(self.before(x))[0]
        return output


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(5, I)
        self.cell = tlq.LSTMCell(random_layers(Dice(0), I, H, 1, 1, "int8")[0][0])

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.before(x):
            state = self.cell(step, state)
        assert state is not None
        h: Tensor = state[0]
        return h


def training(model: nn.Module, x: Tensor) -> Model:
    return model.train()


def compiled(model: nn.Module, x: Tensor) -> Model:
    program: Model = torch.compile(model, fullgraph=True)
    return program


def exported(model: nn.Module, x: Tensor) -> Model:
    return torch.export.export(model, (x,)).module()


def decomposed(model: nn.Module, x: Tensor) -> Model:
    return torch.export.export(model, (x,)).run_decompositions().module()


def traced(model: nn.Module, x: Tensor) -> Model:
    """With the check of torch.jit.trace, which compares the graph with one that it takes without gradients."""
    trace: Model = torch.jit.trace(model, (x,))
    return trace


def checkpointed(model: nn.Module, x: Tensor) -> Model:
    return lambda x: checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]


def mapped(model: nn.Module, x: Tensor) -> Model:
    return lambda x: torch.vmap(model)(x[None])[0]


RUNS = [None, training, compiled, exported, decomposed, traced, checkpointed, mapped]


@pytest.fixture(params=[Sequences, Steps])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.compiler.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing and of batching, which is slow
        yield request.param().eval()


@pytest.mark.parametrize("run", RUNS)
def test_what_stands_before_is_not_trained_by_nothing(
    model: nn.Module, run: Callable[[nn.Module, Tensor], Model] | None
) -> None:
    x = torch.randn(T, B, 5)
    with torch.no_grad():
        expected = model(x)
    output = (model if run is None else run(model, x))(x)
    assert torch.equal(output, expected)
    with pytest.raises(RuntimeError, match=REFUSED):
        output.sum().backward()
    assert model.before.weight.grad is None  # type: ignore[union-attr]
    with torch.no_grad():
        assert not model(x).requires_grad


def test_a_program_that_was_saved(tmp_path: Path) -> None:
    model, x = Sequences().eval(), torch.randn(T, B, 5)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    assert torch.equal(program(x), model(x))
    with pytest.raises(RuntimeError, match=REFUSED):
        program(x).sum().backward()


@pytest.mark.parametrize("wants", [0, 1, 2])
@pytest.mark.parametrize("kind", [tlq.LSTM, tlq.LSTMCell])
def test_of_each_input(kind: type[nn.Module], wants: int) -> None:
    layers = random_layers(Dice(0), I, H, 1, 1, "int8")
    values = [torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)]
    if kind is tlq.LSTM:
        module, values = tlq.LSTM(layers), [value[None] for value in values]
    else:
        module = tlq.LSTMCell(layers[0][0])
    plain = module(values[0], tuple(values[1:]))
    values[wants].requires_grad_()
    output = module(values[0], tuple(values[1:]))
    assert torch.equal(output[0], plain[0])
    with pytest.raises(RuntimeError, match=REFUSED):
        output[0].sum().backward()


@pytest.mark.parametrize("wants", [0, 1])
def test_tensors_of_inference_mode_beside_what_requires_a_gradient(wants: int) -> None:
    module = tlq.LSTM(random_layers(Dice(0), I, H, 1, 1, "int8"))
    with torch.inference_mode():
        values = [torch.randn(T, B, I), torch.zeros(1, B, H), torch.zeros(1, B, H)]
        expected, _ = module(values[0], tuple(values[1:]))
    values[wants] = values[wants].clone().requires_grad_()
    output, _ = module(values[0], tuple(values[1:]))
    assert torch.equal(output, expected)
    with pytest.raises(RuntimeError, match=REFUSED):
        output.sum().backward()


def test_integers_have_no_gradient() -> None:
    module = tlq.LSTM(random_layers(Dice(0), I, H, 1, 1, "int8"))
    x = torch.randint(0, 255, (T, B, I), dtype=torch.uint8)
    states = torch.randint(0, 255, (1, B, H), dtype=torch.uint8), torch.randn(1, B, H, requires_grad=True)
    output, (h_n, c_n) = module.forward_integers(x, states)
    assert not output.requires_grad
    assert not h_n.requires_grad
    with pytest.raises(RuntimeError, match=REFUSED):
        c_n.sum().backward()


FORWARD_MODE = "inference only, got a call that forward mode"


@pytest.mark.parametrize("name", ["input", "h_0", "c_0"])
def test_forward_mode_is_refused(name: str) -> None:
    module = tlq.LSTM(random_layers(Dice(0), I, H, 1, 1, "int8"))
    tensors = {"input": torch.randn(T, B, I), "h_0": torch.zeros(1, B, H), "c_0": torch.zeros(1, B, H)}
    with forward_ad.dual_level():
        x, *states = (forward_ad.make_dual(t, t) if key == name else t for key, t in tensors.items())
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            module(x, tuple(states))
        x, *states = tensors.values()
        assert torch.equal(module(forward_ad.make_dual(x, x).detach(), tuple(states))[0], module(x, tuple(states))[0])


def summed(module: tlq.LSTM) -> Model:
    return lambda x: module(x)[0].sum()  # type: ignore[no-any-return]


def test_transforms_in_forward_mode_are_refused() -> None:
    function, x = summed(tlq.LSTM(random_layers(Dice(0), I, H, 1, 1, "int8"))), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(function, (x,), (x,))
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jacfwd(function)(x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_other_transforms_are_refused_by_torch(transform: Callable[[Model], Model]) -> None:
    with pytest.raises(RuntimeError):
        transform(summed(tlq.LSTM(random_layers(Dice(0), I, H, 1, 1, "int8"))))(torch.randn(T, B, I))
