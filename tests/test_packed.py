"""Rows of different lengths: packed as nn.LSTM takes them, or padded with ``lengths``, each as if it were alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from isa_runs import run_on
from packed_worker import alone
from random_cells import Dice, random_input, random_layers
from test_call_forms import assert_same, assert_within_a_step, step_of
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import torch_lstm_quant as tlq
from torch_lstm_quant import ops
from torch_lstm_quant.call_forms import States
from torch_lstm_quant.qparams import pack_grids

CALLS = int(os.environ.get("PACKED_TEST_CALLS", 25))
T, B, I, H = 6, 4, 5, 8  # noqa: E741
LENGTHS = torch.tensor([3, 6, 1, 4])
SORTED = torch.tensor([6, 4, 3, 1])


@pytest.mark.parametrize("isa", ops.isas_built())
def test_every_row_is_as_if_alone(isa: str) -> None:
    assert run_on(isa, "packed_worker.py", CALLS) == {"isa": isa, "threads": [1, 2], "failed": []}


def fused(*, layers: int = 2, directions: int = 2, batch_first: bool = False) -> tlq.LSTM:
    return tlq.LSTM(random_layers(Dice(1), I, H, layers, directions, "int8"), batch_first=batch_first)


def states(layers: int = 2, directions: int = 2) -> States:
    shape = layers * directions, B, H
    return random_input(Dice(2), *shape), random_input(Dice(3), *shape)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(seed))


class PacksInside(nn.Module):
    """A model that packs what it is given, and pads what it gives."""

    def __init__(self, enforce_sorted: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.enforce_sorted = nn.LSTM(I, H, **options), enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor, hx: States | None = None) -> Any:
        first = self.lstm.batch_first
        packed = pack_padded_sequence(x, lengths, first, self.enforce_sorted)
        output, hx = self.lstm(packed, hx)
        return pad_packed_sequence(output, first, total_length=T)[0], hx


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sorted": {"enforce_sorted": True},
    "two directions": {"bidirectional": True},
    "layers, directions, batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "three layers": {"num_layers": 3, "enforce_sorted": True, "dropout": 0.2},
}


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_models_that_pack_inside(name: str, with_states: bool) -> None:
    options = OPTIONS[name]
    model = PacksInside(**options).eval()
    lengths = SORTED if options.get("enforce_sorted") else LENGTHS
    cells = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = tuple(torch.randn(cells, B, H, generator=torch.Generator().manual_seed(7)).tanh() for _ in range(2))

    def batch(seed: int) -> tuple[Any, ...]:
        x = noise(seed)
        x = x.transpose(0, 1) if options.get("batch_first") else x
        return (x, lengths, hx) if with_states else (x, lengths)

    batches = [batch(seed) for seed in range(2)]
    quantized, ref = (tlq.quantize(model, batches, backend=backend) for backend in ("fused", "reference"))
    want, (want_h, want_c) = model(*batches[1])
    got, (got_h, got_c) = quantized(*batches[1])
    assert_within_a_step((got, (got_h, got_c)), ref(*batches[1]), step_of(quantized))
    for one, other in ((got, want), (got_h, want_h), (got_c, want_c)):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 0.05


@pytest.mark.parametrize("enforce_sorted", [False, True])
@torch.no_grad()
def test_packed_sequences_from_outside(enforce_sorted: bool) -> None:
    packed = pack_padded_sequence(noise(), SORTED if enforce_sorted else LENGTHS, enforce_sorted=enforce_sorted)
    lstm = nn.LSTM(I, H, 2, bidirectional=True).eval()
    hx = tuple(0.1 * torch.randn(4, B, H, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    want, want_states = lstm(packed, hx)
    for backend in ("fused", "reference"):
        got, got_states = tlq.quantize(nn.Sequential(lstm), [packed], backend=backend)[0](packed, hx)
        assert type(got) is PackedSequence
        assert torch.equal(got.batch_sizes, want.batch_sizes)
        for one, other in ((got.sorted_indices, want.sorted_indices), (got.unsorted_indices, want.unsorted_indices)):
            assert one is other if one is None or other is None else torch.equal(one, other)
        for one, other in ((got.data, want.data), *zip(got_states, want_states, strict=True)):
            assert one.shape == other.shape
            assert (one - other).abs().max() < 0.02


def test_calibration_does_not_see_padding() -> None:
    x = noise()
    rows = [x[:length, row] for row, length in enumerate(LENGTHS.tolist())]
    x[torch.arange(T)[:, None] >= LENGTHS] = 1e6
    config = tlq.LSTMQConfig.int8_gates16()
    by_batch = tlq.quantize(PacksInside(bidirectional=True), [(x, LENGTHS)], config)
    by_rows = tlq.quantize(nn.Sequential(PacksInside(bidirectional=True).lstm), [pack_sequence([row]) for row in rows], config)
    for one, other in zip(by_batch.lstm.cells()[0], by_rows[0].cells()[0], strict=True):
        assert one.qparams.x == other.qparams.x
        # the float sums of a batch and of a row may differ in the last bit
        torch.testing.assert_close(pack_grids(one.qparams), pack_grids(other.qparams), rtol=1e-5, atol=0)


def test_a_packed_model_trains_and_converts() -> None:
    model = tlq.prepare(PacksInside(num_layers=2, bidirectional=True, dropout=0.5), tlq.LSTMQConfig.int8(qat=True)).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(noise(), LENGTHS)[0].square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    fused, ref = (tlq.convert(model.eval(), backend=backend) for backend in ("fused", "reference"))
    with torch.no_grad():
        assert_within_a_step(fused(noise(), LENGTHS), ref(noise(), LENGTHS), step_of(fused))


@pytest.mark.parametrize("kind", ["tensor", "int32", "list", "tuple", "array"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_of_a_padded_batch(batch_first: bool, kind: str) -> None:
    module, x, hx = fused(batch_first=batch_first), noise(), states()
    lengths: Any = LENGTHS
    lengths = {"int32": LENGTHS.int(), "list": LENGTHS.tolist(), "tuple": tuple(LENGTHS), "array": LENGTHS.numpy()}.get(
        kind, lengths
    )
    rows = [alone(fused(), x, hx, row, length) for row, length in enumerate(LENGTHS.tolist())]
    want, want_h, want_c = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    output, (h, c) = module(x.transpose(0, 1) if batch_first else x, hx, lengths)
    assert_same((output.transpose(0, 1) if batch_first else output, h, c), (want, want_h, want_c))


def test_lengths_that_leave_steps_out_or_nothing_out() -> None:
    module, x = fused(), noise()
    output, (h, c) = module(x, lengths=[2] * B)
    want, (want_h, want_c) = module(x[:2])
    assert_same((output[:2], h, c), (want, want_h, want_c))
    assert not output[2:].any()
    assert_same(module(x, lengths=[T] * B), module(x))
    assert module(x[:, :0], lengths=[])[0].shape == (T, 0, 2 * H)


def test_inputs_of_any_strides() -> None:
    module, x = fused(), noise()
    want = module(x, lengths=LENGTHS)
    assert_same(module(x.transpose(0, 1).contiguous().transpose(0, 1), lengths=LENGTHS), want)
    assert_same(module(x.repeat_interleave(2, 2)[:, :, ::2], lengths=LENGTHS), want)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    wide = packed._replace(data=torch.cat([packed.data, packed.data], 1)[:, :I])
    assert_same(pad_packed_sequence(module(wide)[0])[0], want[0])


def test_packed_integers() -> None:
    module = fused(directions=1)
    packed = pack_padded_sequence(noise(), LENGTHS, enforce_sorted=False)
    grid = module.cells()[0][0].qparams.x
    integers = packed._replace(data=grid.quantize(packed.data).to(torch.uint8))
    output, (h, _) = module.forward_integers(integers)
    want, (want_h, _) = module(packed)
    grids = [layer[0].qparams.ogate_cy for layer in module.cells()]
    assert torch.equal(grids[-1].dequantize(output.data), want.data)
    assert all(torch.equal(grid.dequantize(one), other) for grid, one, other in zip(grids, h, want_h, strict=True))


PACKED = pack_padded_sequence(noise(), LENGTHS, enforce_sorted=False)
STATE = torch.zeros(4, B, H)


def broken(**parts: Any) -> PackedSequence:
    """With parts that PackedSequence's own constructor would refuse or change."""
    return PackedSequence._make({**PACKED._asdict(), **parts}.values())


BAD_PACKED = {
    "features": (broken(data=torch.zeros(14, 3)), None, ValueError, r"input_size=5\], got \[14, 3\]"),
    "rank": (broken(data=torch.zeros(14)), None, ValueError, r"input.data must be .*, got \[14\]"),
    "dtype": (PACKED.double(), None, TypeError, "input.data must be torch.float32, got torch.float64"),
    "no data": (broken(data=None), None, TypeError, "input.data must be a tensor, got NoneType"),
    "batch sizes that grow": (
        broken(batch_sizes=torch.tensor([3, 4, 3, 2, 1, 1])),
        None,
        ValueError,
        r"never grow .*, got \[3, 4, 3, 2, 1, 1\]",
    ),
    "a batch size of zero": (broken(batch_sizes=torch.tensor([4, 4, 4, 2, 0])), None, ValueError, "must be positive"),
    "too few rows": (broken(batch_sizes=torch.tensor([4, 3, 3])), None, ValueError, "the 14 rows of input.data"),
    "no steps": (broken(batch_sizes=torch.tensor([], dtype=torch.int64)), None, ValueError, r"got \[\]"),
    "dtype of batch sizes": (broken(batch_sizes=torch.ones(14).float()), None, TypeError, "got torch.float32"),
    "order": (broken(sorted_indices=torch.arange(3)), (STATE, STATE), ValueError, r"sorted_indices must be \[4\]"),
    "order before": (broken(unsorted_indices=torch.arange(5)), None, ValueError, r"unsorted_indices must be \[4\]"),
    **{
        f"{kind} in {name}{' with states' if hx else ''}": (
            broken(**{name: indices}),
            hx,
            error,
            rf"input\.{name} must {message}",
        )
        for name in ("sorted_indices", "unsorted_indices")
        for hx in (None, (STATE, STATE))
        for kind, indices, error, message in (
            ("a row that is not there", torch.tensor([0, 1, 2, 9]), ValueError, r"have each row from 0 to 3 once, got .* 9\]"),
            ("a negative row", torch.tensor([0, 1, 2, -1]), ValueError, r"have each row .* once, got \[0, 1, 2, -1\]"),
            ("a row twice", torch.tensor([0, 0, 1, 2]), ValueError, r"have each row .* once, got \[0, 0, 1, 2\]"),
            ("floats", torch.arange(4.0), TypeError, "be torch.int64 or torch.int32, got torch.float32"),
            ("bools", torch.ones(4) > 0, TypeError, "be torch.int64 or torch.int32, got torch.bool"),
            ("a list", [0, 1, 2, 3], TypeError, "be a tensor, got list"),
            ("another device", torch.arange(4, device="meta"), TypeError, "be on the cpu device, got a tensor on meta"),
            ("a sparse tensor", torch.arange(4).to_sparse(), TypeError, "be a dense tensor, got layout torch.sparse_coo"),
        )
    },
    "another order back": (
        broken(unsorted_indices=PACKED.sorted_indices.roll(1)),  # type: ignore[union-attr]
        None,
        ValueError,
        r"unsorted_indices must undo sorted_indices \[.*\], got \[",
    ),
    "negative batch sizes": (broken(batch_sizes=torch.tensor([4, 4, 4, 4, -2])), None, ValueError, "must be positive"),
    "sparse batch sizes": (broken(batch_sizes=PACKED.batch_sizes.to_sparse()), None, TypeError, "must be a dense tensor"),
    "a list of batch sizes": (broken(batch_sizes=[4, 3, 3, 2, 1, 1]), None, TypeError, "on the CPU, got list"),
    "states": (PACKED, (STATE[:, :3], STATE), ValueError, r"h_0 must be \[4, 4, 8\] .* of 4 rows, got \[4, 3, 8\]"),
    "rank of states": (PACKED, (STATE, STATE[0]), ValueError, r"c_0 must be \[4, 4, 8\]"),
    "dtype of states": (PACKED, (STATE, STATE.half()), TypeError, "c_0 must be torch.float32"),
    "packed states": (PACKED, (PACKED, STATE), TypeError, "h_0 must be a tensor, got PackedSequence"),
    "one state": (PACKED, STATE, TypeError, r"hx must be None or a tuple \(h_0, c_0\), got Tensor"),
}


@pytest.mark.parametrize("name", BAD_PACKED)
def test_packed_sequences_that_are_refused(name: str) -> None:
    input, hx, error, message = BAD_PACKED[name]
    with pytest.raises(error, match=message):
        fused()(input, hx)


@pytest.mark.parametrize("name", ["features", "batch sizes that grow", "states"])
def test_the_observed_lstm_refuses_them_too(name: str) -> None:
    input, hx, error, message = BAD_PACKED[name]
    observed = tlq.prepare(nn.LSTM(I, H, 2, bidirectional=True))
    with pytest.raises(error, match=message):
        observed(input, hx)


BAD_LENGTHS = {
    "zero": ([3, 0, 1, 4], ValueError, "from 1 to the 6 steps of input, got 0 to 4"),
    "negative": ([3, -1, 1, 4], ValueError, "got -1 to 4"),
    "beyond the steps": (torch.tensor([3, 7, 1, 4]), ValueError, "got 1 to 7"),
    "too few": ([3, 6, 1], ValueError, r"lengths must be \[4\], one for each row of input, got \[3\]"),
    "too many": (torch.ones(5).long(), ValueError, r"got \[5\]"),
    "a column": (torch.ones(4, 1).long(), ValueError, r"got \[4, 1\]"),
    "floats": ([3.0, 6.0, 1.0, 4.0], TypeError, "lengths must be integers, as a tensor or a sequence, got"),
    "a float tensor": (LENGTHS.float(), TypeError, "lengths must be integers, got torch.float32"),
    "bools": (LENGTHS > 1, TypeError, "got torch.bool"),
    "a set": ({3, 6, 1, 4}, TypeError, "lengths must be integers, as a tensor or a sequence, got {1, 3, 4, 6}"),
    "keys": ({3: 0, 6: 0, 1: 0, 4: 0}, TypeError, "lengths must be integers, as a tensor or a sequence, got {3: 0"),
    "sparse": (LENGTHS.to_sparse(), TypeError, "lengths must be a dense tensor, got torch.sparse_coo"),
    "beyond int64": ([3, 1 << 63, 1, 4], ValueError, f"from 1 to the 6 steps of input, got 1 to {1 << 63}"),
    "far below": ([3, -(1 << 70), 1, 4], ValueError, f"got -{1 << 70} to 4"),
    "beyond int64 in a tensor": (
        torch.tensor([3, 1 << 63, 1, 4], dtype=torch.uint64),
        ValueError,
        f"got 1 to {1 << 63}",
    ),
    "tensors that are no scalars": ([torch.tensor([3]), 6, 1, 4], TypeError, r"got \[tensor\(\[3\]\), 6, 1, 4\]"),
    "without values": ([torch.tensor(3, device="meta")] * 4, TypeError, "lengths must be integers, as a tensor or a sequence"),
    "bytes": (bytes([3, 6, 1, 4]), TypeError, "lengths must be integers, as a tensor or a sequence, got b"),
    "a bool among them": ([3, 6, True, 4], TypeError, "lengths must be integers, as a tensor or a sequence, got"),
    "a number": (3, TypeError, "lengths must be integers, as a tensor or a sequence, got 3"),
    "words": ("3614", TypeError, "got '3614'"),
    "on another device": (LENGTHS.to("meta"), TypeError, "lengths must be on the CPU"),
}


@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_lengths_that_are_refused(name: str) -> None:
    lengths, error, message = BAD_LENGTHS[name]
    with pytest.raises(error, match=message):
        fused()(noise(), lengths=lengths)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_lengths_in_other_kinds_of_tensors() -> None:
    quantized = torch.quantize_per_tensor(LENGTHS.float(), 1.0, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"lengths must be integers, got torch\.quint8"):
        fused()(noise(), lengths=quantized)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([LENGTHS], layout=layout)
        with pytest.raises(TypeError, match="lengths must be a dense tensor, got a nested one"):
            fused()(noise(), lengths=nested)


def test_lengths_of_what_has_none() -> None:
    with pytest.raises(ValueError, match="lengths must be None, got"):
        fused()(PACKED, lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"input must be 3-D, got 2-D \[6, 5\]"):
        fused()(noise()[:, 0], lengths=[6])


OP = torch.ops.torch_lstm_quant.lstm.default
SIZES = H, 2, 2


def test_opcheck() -> None:
    blob, (h0, c0) = fused().packed(), states()
    torch.library.opcheck(OP, (PACKED.data, h0, c0, blob, *SIZES, None, None, PACKED.batch_sizes))
    torch.library.opcheck(OP, (PACKED.data, None, None, blob, *SIZES, None, None, PACKED.batch_sizes))
    torch.library.opcheck(OP, (noise(), h0, c0, blob, *SIZES, None, None, None, LENGTHS))
    torch.library.opcheck(OP, (noise(), None, None, blob, *SIZES, torch.int32, None, None, LENGTHS))


BAD_OPERATOR_CALLS = {
    "both": ((PACKED.data, PACKED.batch_sizes, LENGTHS), "takes batch_sizes or lengths, got both"),
    "padded with batch sizes": ((noise(), PACKED.batch_sizes, None), "x must have two dimensions .* got 3"),
    "packed with lengths": ((PACKED.data, None, LENGTHS), "x must have three dimensions"),
    "batch sizes that grow": ((PACKED.data, PACKED.batch_sizes.flip(0), None), "got 2 at step 2 after 1"),
    "sum of batch sizes": ((PACKED.data[1:], PACKED.batch_sizes, None), "add up to the 13 rows of the packed input, got more"),
    "dtype of batch sizes": ((PACKED.data, PACKED.batch_sizes.int(), None), "batch_sizes must be int64, got int32"),
    "lengths too long": ((noise(), None, LENGTHS + 1), "lengths must be from 1 to the 6 steps of the input, got 7 for row 1"),
    "lengths of zero": ((noise(), None, LENGTHS - 1), "got 0 for row 2"),
    "number of lengths": ((noise(), None, LENGTHS[1:]), r"lengths must be \[4\], got \[3\]"),
    "dtype of lengths": ((noise(), None, LENGTHS.float()), "lengths must be int64, got float32"),
}


@pytest.mark.parametrize("name", BAD_OPERATOR_CALLS)
def test_operator_calls_that_are_refused(name: str) -> None:
    (x, batch_sizes, lengths), message = BAD_OPERATOR_CALLS[name]
    with pytest.raises(RuntimeError, match=message):
        OP(x, None, None, fused().packed(), *SIZES, None, None, batch_sizes, lengths)


class WithLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fused(batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.lstm(x * 2, lengths=lengths)


@torch.no_grad()
def test_lengths_are_compiled_and_exported() -> None:
    model, x = WithLengths().eval(), noise().transpose(0, 1)
    want = model(x, LENGTHS)
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(x, LENGTHS), want)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    for strict in (False, True):
        shapes = {"x": {0: batch, 1: time}, "lengths": {0: batch}}
        exported = torch.export.export(model, (x, LENGTHS), dynamic_shapes=shapes, strict=strict).module()
        assert_same(exported(x, LENGTHS), want)
        other, lengths = torch.randn(3, 9, I), torch.tensor([9, 2, 5])
        assert_same(exported(other, lengths), model(other, lengths))
        with pytest.raises(RuntimeError, match="lengths must be from 1 to the 9 steps"):
            exported(other, lengths + 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_packing_inside_is_compiled_and_traced_as_far_as_torch_does() -> None:
    batch = noise(), LENGTHS
    model = tlq.quantize(PacksInside(bidirectional=True).eval(), [batch])
    want = model(*batch)
    # torch's compiler leaves pack_padded_sequence out of its graphs
    assert_same(torch.compile(model, backend="aot_eager")(*batch), want)
    traced = torch.jit.trace(model, batch)
    assert_same(traced(*batch), want)
    other = noise(1), torch.tensor([2, 2, 6, 5])
    assert_same(traced(*other), model(*other))
