"""The call forms of the table of ways out: models that call an LSTM so, their inputs, the integer reference as a module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, PackedSequence_, pack_padded_sequence, pad_packed_sequence

import torch_lstm_quant as tlq
from torch_lstm_quant import reference

I, H, P = 5, 8, 3  # noqa: E741
PACKED_PARTS = ("packed.data", "packed.batch_sizes", "packed.sorted_indices", "packed.unsorted_indices")
EXAMPLE, OTHER = (6, 3), (9, 4)  # steps and rows: what is traced with, and what is run as well

States = tuple[Tensor, Tensor]


def no_states(rnn: Any, x: Any) -> Any:
    return rnn(x)


def none_for_states(rnn: Any, x: Any) -> Any:
    return rnn(x, None)


def with_states(rnn: Any, x: Any, h: Tensor, c: Tensor) -> Any:
    return rnn(x, (h, c))


def by_keywords(rnn: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    return rnn(input=x, hx=(h, c))


def transposed(rnn: Any, x: Tensor) -> Any:
    return rnn(x.transpose(0, 1))


def features_strided(rnn: Any, x: Tensor) -> Any:
    return rnn(x[..., ::2])


def carried_over(rnn: Any, x: Tensor) -> Any:
    return rnn(x, rnn(x)[1])


def lengths(rnn: Any, x: Tensor, lengths: Tensor) -> Any:
    return rnn(x, lengths=lengths)


def lengths_and_states(rnn: Any, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Any:
    return rnn(x, (h, c), lengths=lengths)


def packed_inside(rnn: Any, x: Tensor, lengths: Tensor) -> Any:
    output, states = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output), states


def packed_from_parts(rnn: Any, data: Tensor, batch_sizes: Tensor, order: Tensor, restored: Tensor) -> Any:
    output, states = rnn(PackedSequence(data, batch_sizes, order, restored))
    return output.data, states


def three_steps(rnn: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    for _ in range(3):
        h, c = rnn(x, (h, c))
    return h, c


@dataclass(frozen=True)
class Form:
    """How an LSTM is made and called.

    Args:
        call: calls ``rnn`` with the model's inputs.
        axes: of each input, by letters: T steps, B rows, I features, J of which every other is used, H units, P the size of a
            projection, S cells with a state; ``lengths`` and ``packed`` are a tensor of lengths and a ``PackedSequence``.
        options: of ``nn.LSTM`` or ``nn.LSTMCell``.
        kind: which of these.
        sizes: steps and rows of the calls: the first is what exporters and tracers see.
        context: in which the calls are made.
        requires_grad: of the inputs.
        calibrate: the call with which to calibrate, where nn.LSTM has none like ``call``.
    """

    call: Callable[..., Any]
    axes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    kind: type[nn.Module] = nn.LSTM
    sizes: tuple[tuple[int, int], ...] = (EXAMPLE, OTHER)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    requires_grad: bool = False
    calibrate: Callable[..., Any] | None = None

    def inputs(self, steps: int, rows: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(steps + rows)
        return tuple(self._input(axes, steps, rows, generator) for axes in self.axes)

    def _input(self, axes: str, steps: int, rows: int, generator: torch.Generator) -> Any:
        if axes == "lengths":
            return torch.randint(1, steps + 1, (rows,), generator=generator)
        if axes.startswith("packed"):
            return self._packed(axes, steps, rows)
        cells = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        sizes = {"T": steps, "B": rows, "I": I, "J": 2 * I - 1, "H": H, "P": P, "S": cells}
        values = torch.randn([sizes[axis] for axis in axes], generator=generator)
        return values.requires_grad_(self.requires_grad)

    def _packed(self, axes: str, steps: int, rows: int) -> Any:
        """A packed sequence, the same for each of its parts."""
        generator = torch.Generator().manual_seed(steps + rows)
        x, some = torch.randn(steps, rows, I, generator=generator), torch.randint(1, steps, (rows,), generator=generator)
        some[rows // 2] = steps
        packed = pack_padded_sequence(x, some, enforce_sorted=False)
        return packed if axes == "packed" else getattr(packed, axes.removeprefix("packed."))

    def dynamic_shapes(self, prefix: str = "") -> tuple[Any, ...]:
        """That steps and rows are free, for ``torch.export``."""
        steps, rows = torch.export.Dim(f"{prefix}steps"), torch.export.Dim(f"{prefix}rows")
        named = {"T": steps, "B": rows, "N": torch.export.Dim(f"{prefix}total")}
        return tuple(self._dynamic(axes, named) for axes in self.axes)

    def _dynamic(self, axes: str, named: dict[str, Any]) -> Any:
        parts = [{0: named[axis]} for axis in "NTBB"]  # of a packed sequence
        if axes == "packed":
            return PackedSequence_(*parts)
        if axes in PACKED_PARTS:
            return parts[PACKED_PARTS.index(axes)]
        if axes == "lengths":
            return {0: named["B"]}
        fixed = {"T"} if len({steps for steps, _ in self.sizes}) == 1 else set()
        return {i: named[axis] for i, axis in enumerate(axes) if axis in named.keys() - fixed}


LSTM_FORMS: dict[str, Form] = {
    "states not given": Form(no_states, ("TBI",)),
    "states None": Form(none_for_states, ("TBI",)),
    "states given": Form(with_states, ("TBI", "SBH", "SBH")),
    "by keywords": Form(by_keywords, ("TBI", "SBH", "SBH")),
    "batch_first": Form(no_states, ("BTI",), {"batch_first": True}),
    "batch_first, states": Form(with_states, ("BTI", "SBH", "SBH"), {"batch_first": True}),
    "unbatched": Form(no_states, ("TI",)),
    "unbatched, states": Form(with_states, ("TI", "SH", "SH")),
    "unbatched, batch_first, bidirectional": Form(no_states, ("TI",), {"batch_first": True, "bidirectional": True}),
    "bidirectional": Form(no_states, ("TBI",), {"bidirectional": True}),
    "3 layers": Form(no_states, ("TBI",), {"num_layers": 3}),
    "2 layers, bidirectional, batch_first, states": Form(
        with_states, ("BTI", "SBH", "SBH"), {"num_layers": 2, "bidirectional": True, "batch_first": True}
    ),
    "bias=False": Form(no_states, ("TBI",), {"bias": False}),
    "dropout": Form(no_states, ("TBI",), {"num_layers": 2, "dropout": 0.5}),
    "proj_size": Form(no_states, ("TBI",), {"proj_size": P}),
    "proj_size, 2 layers, bidirectional, batch_first, states": Form(
        with_states,
        ("BTI", "SBP", "SBH"),
        {"proj_size": P, "num_layers": 2, "bidirectional": True, "batch_first": True},
    ),
    "states of one call to the next": Form(carried_over, ("TBI",)),
    "one step": Form(with_states, ("TBI", "SBH", "SBH"), sizes=((1, 3), (1, 4))),
    "no rows (B=0)": Form(with_states, ("TBI", "SBH", "SBH"), sizes=(EXAMPLE, (6, 0))),
    "no steps (T=0)": Form(with_states, ("TBI", "SBH", "SBH"), sizes=(EXAMPLE, (0, 3))),
    "rows not contiguous": Form(transposed, ("BTI",)),
    "features not contiguous": Form(features_strided, ("TBJ",)),
    "PackedSequence given": Form(no_states, ("packed",)),
    "PackedSequence given, states": Form(with_states, ("packed", "SBH", "SBH")),
    "PackedSequence of parts that are given": Form(packed_from_parts, PACKED_PARTS),
    "PackedSequence made in forward": Form(packed_inside, ("TBI", "lengths")),
    "lengths=": Form(lengths, ("TBI", "lengths"), calibrate=no_states),
    "lengths=, states, bidirectional": Form(
        lengths_and_states, ("TBI", "lengths", "SBH", "SBH"), {"bidirectional": True}, calibrate=no_states
    ),
    "input requires a gradient, eval()": Form(no_states, ("TBI",), requires_grad=True),
    "input requires a gradient, no_grad()": Form(no_states, ("TBI",), requires_grad=True, context=torch.no_grad),
    "inference_mode()": Form(no_states, ("TBI",), context=torch.inference_mode),
    "autocast()": Form(no_states, ("TBI",), context=lambda: torch.autocast("cpu")),
}

CELL_FORMS: dict[str, Form] = {
    "states not given": Form(no_states, ("BI",), kind=nn.LSTMCell),
    "states given": Form(with_states, ("BI", "BH", "BH"), kind=nn.LSTMCell),
    "by keywords": Form(by_keywords, ("BI", "BH", "BH"), kind=nn.LSTMCell),
    "unbatched": Form(no_states, ("I",), kind=nn.LSTMCell),
    "unbatched, states": Form(with_states, ("I", "H", "H"), kind=nn.LSTMCell),
    "bias=False": Form(no_states, ("BI",), {"bias": False}, nn.LSTMCell),
    "a loop over steps": Form(three_steps, ("BI", "BH", "BH"), kind=nn.LSTMCell),
    "no rows (B=0)": Form(with_states, ("BI", "BH", "BH"), kind=nn.LSTMCell, sizes=(EXAMPLE, (6, 0))),
    "features not contiguous": Form(features_strided, ("BJ",), kind=nn.LSTMCell),
    "inference_mode()": Form(no_states, ("BI",), kind=nn.LSTMCell, context=torch.inference_mode),
    "autocast()": Form(no_states, ("BI",), kind=nn.LSTMCell, context=lambda: torch.autocast("cpu")),
}

FORMS = {
    **{f"LSTM: {name}": form for name, form in LSTM_FORMS.items()},
    **{f"LSTMCell: {name}": form for name, form in CELL_FORMS.items()},
}


class Model(nn.Module):
    """An LSTM that is called in some form. Tracers want inputs by name, so there is a class for each number of them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        form = FORMS[name]
        torch.manual_seed(0)
        self.rnn, self.call = form.kind(I, H, **form.options), form.call


class Model1(Model):
    def forward(self, x: Any) -> Any:
        return self.call(self.rnn, x)


class Model2(Model):
    def forward(self, x: Any, lengths: Any) -> Any:
        return self.call(self.rnn, x, lengths)


class Model3(Model):
    def forward(self, x: Any, h: Any, c: Any) -> Any:
        return self.call(self.rnn, x, h, c)


class Model4(Model):
    def forward(self, x: Any, lengths_or_sizes: Any, h: Any, c: Any) -> Any:
        return self.call(self.rnn, x, lengths_or_sizes, h, c)


def float_model(name: str) -> Model:
    form = FORMS[name]
    return {1: Model1, 2: Model2, 3: Model3, 4: Model4}[len(form.axes)](name).eval()


def fused_model(name: str) -> Any:
    form, model = FORMS[name], float_model(name)
    batches = [form.inputs(*EXAMPLE), form.inputs(*OTHER)]
    if form.calibrate is not None:
        model.rnn = tlq.quantize(model.rnn, [batch[0] for batch in batches])
        return model
    with torch.no_grad():
        return tlq.quantize(model, batches)


def reference_model(fused: Any) -> Any:
    """The same model with the integer reference in place of the fused module."""
    model = copy.copy(fused)
    model._modules = {"rnn": (ReferenceCell if isinstance(fused.rnn, tlq.LSTMCell) else ReferenceLSTM)(fused.rnn)}
    return model


class CallForms(nn.Module):
    """``nn.LSTM``'s call forms, and ``lengths=``, in front of what computes a batch ``[T, B, input_size]``."""

    def __init__(self, module: tlq.LSTM) -> None:
        super().__init__()
        self.cells, self.batch_first = module.cells(), module.batch_first

    def batch(self, x: Tensor, hx: States | None, lengths: Tensor | None) -> tuple[Tensor, States]:
        raise NotImplementedError

    def forward(self, input: Any, hx: States | None = None, lengths: Tensor | None = None) -> Any:
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input)
            output, states = self.batch(x, hx, lengths)
            return pack_padded_sequence(output, lengths, enforce_sorted=input.sorted_indices is None), states
        if input.dim() == 2:
            output, (h, c) = self.batch(input[:, None], hx and (hx[0][:, None], hx[1][:, None]), None)
            return output[:, 0], (h[:, 0], c[:, 0])
        output, states = self.batch(input.transpose(0, 1) if self.batch_first else input, hx, lengths)
        return output.transpose(0, 1) if self.batch_first else output, states


class ReferenceLSTM(CallForms):
    """The integer reference, each row alone."""

    def batch(self, x: Tensor, hx: States | None, lengths: Tensor | None) -> tuple[Tensor, States]:
        steps, rows = x.shape[:2]
        directions, h_size = len(self.cells[0]), self.cells[0][0].h_size
        output = torch.zeros(steps, rows, directions * h_size)
        h, c = (torch.zeros(len(self.cells) * directions, rows, width) for width in (h_size, H))
        for row in range(rows):
            n = steps if lengths is None else int(lengths[row])
            one = slice(row, row + 1)
            states = (None, None) if hx is None else (hx[0][:, one], hx[1][:, one])
            output[:n, one], h[:, one], c[:, one] = reference.lstm(self.cells, x[:n, one], *states)
        return output, (h, c)


class ReferenceCell(nn.Module):
    """``nn.LSTMCell``'s call forms in front of the integer reference."""

    def __init__(self, module: tlq.LSTMCell) -> None:
        super().__init__()
        self.cells = module.cells()

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        rows = input.reshape(1, -1, I)
        states = (None, None) if hx is None else (state.reshape(1, -1, H) for state in hx)
        _, h, c = reference.lstm(self.cells, rows, *states)
        return h.reshape(*input.shape[:-1], H), c.reshape(*input.shape[:-1], H)
