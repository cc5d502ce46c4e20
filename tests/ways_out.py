"""The table of ways out: what is made of a model and called as the model is, and why some do not take some call forms."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from ways_out_forms import FORMS, CallForms, Form, Model, States

import torch_lstm_quant as tlq

Run = Callable[..., Any]

# One form at a time


def eager(model: Model, form: Form) -> Run:
    return model


def compiled(model: Model, form: Form) -> Run:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)


def exported(model: Model, form: Form, *, strict: bool = False) -> Run:
    shapes = form.dynamic_shapes()
    return torch.export.export(model, form.inputs(*form.sizes[0]), dynamic_shapes=shapes, strict=strict).module()


def exported_strictly(model: Model, form: Form) -> Run:
    return exported(model, form, strict=True)


def traced(model: Model, form: Form) -> Run:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, form.inputs(*form.sizes[0]), check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def copied(model: Model, form: Form) -> Run:
    return copy.deepcopy(model)


def pickled(model: Model, form: Form) -> Run:
    return saved(model, weights_only=False)


def by_state_dict(model: Model, form: Form) -> Run:
    other = with_other_biases(model)
    other.load_state_dict(saved(model.state_dict(), weights_only=True))
    return other


def by_safetensors(model: Model, form: Form) -> Run:
    other = with_other_biases(model)
    with TemporaryDirectory() as folder:
        save_file(model.state_dict(), Path(folder, "state"))
        other.load_state_dict(load_file(Path(folder, "state")))
    return other


def saved(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def with_other_biases(model: Model) -> Model:
    other = copy.deepcopy(model)
    other.load_state_dict({name: value + 1 if "bias_" in name else value for name, value in model.state_dict().items()})
    return other


class StreamedLSTM(CallForms):
    """A Stream: all rows in two chunks, or step by step those that still have steps."""

    def __init__(self, module: tlq.LSTM) -> None:
        super().__init__(module)
        self.module = module

    def batch(self, x: Tensor, hx: States | None, lengths: Tensor | None) -> tuple[Tensor, States]:
        stream = tlq.Stream(self.module, x.shape[1])
        stream.reset(hx)
        if lengths is None:
            return torch.cat([stream(chunk) for chunk in x.tensor_split(2)]), stream.state()
        output = torch.zeros(*x.shape[:2], self.module.proj_size or self.module.hidden_size)
        for step in range(int(lengths.max())):
            rows = (lengths > step).nonzero().flatten()
            output[step, rows] = stream(x[step, rows], rows=rows)
        return output, stream.state()


def streamed(model: Model, form: Form) -> Run:
    other = copy.copy(model)
    other._modules = {"rnn": StreamedLSTM(model.rnn) if form.kind is nn.LSTM else tlq.Stream(model.rnn)}
    return other


WAYS: dict[str, Callable[[Model, Form], Run]] = {
    "eager": eager,
    "compile": compiled,
    "export": exported,
    "export strict": exported_strictly,
    "jit.trace": traced,
    "deepcopy": copied,
    "pickle": pickled,
    "state_dict": by_state_dict,
    "safetensors": by_safetensors,
    "Stream": streamed,
}

# All forms at once, since a compiler takes longer to begin than for all of them


class Together(nn.Module):
    """Many models in one, each called with inputs of its own."""

    def __init__(self, names: list[str], models: list[Model]) -> None:
        super().__init__()
        self.models, self.forms = nn.ModuleList(models), [FORMS[name] for name in names]

    def forward(self, inputs: list[tuple[Any, ...]]) -> list[Any]:
        return [model(*arguments) for model, arguments in zip(self.models, inputs, strict=True)]

    def inputs(self, other: int | None = None) -> list[tuple[Any, ...]]:
        """Those that exporters see, and for the form ``other`` those that it is also called with."""
        return [form.inputs(*form.sizes[i == other]) for i, form in enumerate(self.forms)]

    def dynamic_shapes(self) -> tuple[Any]:
        return ([form.dynamic_shapes(f"form{i}_") for i, form in enumerate(self.forms)],)


def aot_inductor(model: Together, folder: Path) -> Run:
    program = torch.export.export(model, (model.inputs(),), dynamic_shapes=model.dynamic_shapes())
    # headers compiled beforehand take longer than they spare one program
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    path = str(folder / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quickly)
    return torch._inductor.aoti_load_package(package)


def onnx(model: Together, folder: Path) -> Run:
    path = str(folder / "model.onnx")
    tlq.export_onnx(model, path, (model.inputs(),), dynamic_shapes=model.dynamic_shapes())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: list[tuple[Any, ...]]) -> list[Tensor]:
        feeds = {name: value.detach().numpy() for name, value in zip(names, tensors(inputs), strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]

    return run


WAYS_TOGETHER: dict[str, Callable[[Together, Path], Run]] = {"AOTInductor": aot_inductor, "ONNX": onnx}

# Reasons


@dataclass(frozen=True)
class Reason:
    """Why a way does not take a call form.

    Args:
        text: for the table.
        error: of the fused module, as ``re`` searches it.
        torchs: of the float module, called and exported alike; None where the reason is ours.
    """

    text: str
    error: str
    torchs: str | None = None


REASONS = {
    "no steps": Reason(
        "`nn.LSTM` refuses it: `Expected sequence length to be larger than 0 in RNN`, and so does the fused one; programs of "
        "`torch.export` and `jit.trace`, without its checks, and a `Stream` give an output of no steps",
        "the sequence must have at least one step, as in nn.LSTM",
        "Expected sequence length to be larger than 0 in RNN",
    ),
    "packed export": Reason(
        "`torch.export` cannot describe its dynamic shapes (`Did not expect type ... namedtuple`); "
        "pass the parts, or `lengths=`",
        "Did not expect type .*namedtuple",
        "Did not expect type .*namedtuple",
    ),
    "packed trace": Reason(
        "`torch.jit.trace` hands the module a plain tuple in its place; pass the parts, or `lengths=`",
        "input must be a tensor, got tuple",
        "'tuple' object has no attribute 'dim'",
    ),
    "packing compiled": Reason(
        "torch's compiler leaves `pack_padded_sequence` out of its graphs (`function marked as skipped`); use `lengths=`",
        "function marked as skipped(.|\n)*pack_padded_sequence",
        "function marked as skipped(.|\n)*pack_padded_sequence|Dynamo does not support RNN",
    ),
    "packing exported": Reason(
        "torch's `pad_packed_sequence` needs numbers that exporting does not have; use `lengths=`",
        "data-dependent expression(.|\n)*pad_packed_sequence",
        "'size' failed to unpack",
    ),
    "packed ONNX": Reason(
        "ONNX has no such thing; `export_onnx` says so: pass the padded batch and `lengths`",
        "a PackedSequence cannot be written to ONNX, got one: pass the padded batch and its lengths",
    ),
    "two directions": Reason(
        "a backward direction begins at the end, which a stream does not have yet", "backward direction begins at the end"
    ),
    "a stream of no rows": Reason("a `Stream` has at least one row", "batch_size must be at least 1"),
    "a cell": Reason("a `Stream` takes an LSTM: `LSTM(cell.cells())` is one", r"LSTM\(.*cells\(\)\)"),
}

_PACKED_GIVEN = {
    **dict.fromkeys(["export", "export strict", "AOTInductor", "ONNX"], "packed export"),
    "jit.trace": "packed trace",
}
EXCEPTIONS: dict[str, dict[str, str]] = {
    "LSTM: no rows (B=0)": {"Stream": "a stream of no rows"},
    "LSTM: no steps (T=0)": dict.fromkeys([*WAYS, *WAYS_TOGETHER], "no steps"),
    "LSTM: PackedSequence given": _PACKED_GIVEN,
    "LSTM: PackedSequence given, states": _PACKED_GIVEN,
    "LSTM: PackedSequence of parts that are given": {"ONNX": "packed ONNX"},
    "LSTM: PackedSequence made in forward": {
        **dict.fromkeys(["compile", "export strict"], "packing compiled"),
        **dict.fromkeys(["export", "AOTInductor", "ONNX"], "packing exported"),
    },
    **{name: {"Stream": "a cell"} for name, form in FORMS.items() if form.kind is nn.LSTMCell},
}
EXCEPTIONS.update(
    {
        name: {**EXCEPTIONS.get(name, {}), "Stream": "two directions"}
        for name in FORMS
        if "bidirectional" in FORMS[name].options
    }
)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of nested results, in order."""
    return list(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from _tensors(item)


# The document


def table() -> str:
    """The table as the docs show it: what the tests in test_ways_out.py hold each cell to."""
    columns = [*WAYS, *WAYS_TOGETHER]
    used: list[str] = []
    lines = []
    for kind in ("LSTM", "LSTMCell"):
        lines += ["", "| " + " | ".join([f"`{kind}`", *columns]) + " |", "| --- " * (len(columns) + 1) + "|"]
        for name in [name for name in FORMS if name.startswith(f"{kind}: ")]:
            cells = []
            for column in columns:
                reason = EXCEPTIONS.get(name, {}).get(column)
                used += [reason] if reason is not None and reason not in used else []
                cells.append("yes" if reason is None else f"({used.index(reason) + 1})")
            lines.append("| " + " | ".join([re.sub(r"^\w+: ", "", name), *cells]) + " |")
    notes = [f"{i}. {REASONS[reason].text}." for i, reason in enumerate(used, start=1)]
    return "\n".join([*lines[1:], "", *notes, ""])


if __name__ == "__main__":
    print(table())
