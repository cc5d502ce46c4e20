"""Trains the demo's model for a short while with the rounding of ``all_int8()`` in place, and shows what that recovers.

``all_int8()`` has 8 bits everywhere, the cell state too, which this model does not bear. (``int8()`` needs no training.)
Two things help: ranges of the cell state that leave out its rare extremes, and training with the rounding. The model is
trained to give what the float32 model gives for the same text; the text that is evaluated is held out. It takes a minute or
two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import data
import torch
from measure import exactness
from model import CharLM, State, bits_per_character, load
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
)

import torch_lstm_quant as tlq

AVERAGE = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, dtype=torch.uint8, quant_min=0, quant_max=255)
"""8 bits from the average least to the average greatest value of a step."""

QCONFIG = tlq.LSTMQConfig.all_int8(qat=True).replace(fgate_cx=AVERAGE, fgate_cx_igate_cgate=AVERAGE)

BATCHES, STREAMS, STEPS = 100, 32, 32
LEARNING_RATE, WARM_UP, LARGEST_GRADIENT = 1e-3, 20, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=BATCHES, help="to train on (default: %(default)s)")
    batches = parser.parse_args().batches
    torch.set_num_threads(1)  # sums of several threads differ in their last bits from run to run
    torch.manual_seed(0)

    model = load()
    calibration = data.calibration_batches()
    calibrated = tlq.quantize(model, calibration, tlq.LSTMQConfig.all_int8(), progress=False)
    prepared = prepare(model, calibration)
    narrowed = tlq.convert(prepared.eval())
    started = time.time()
    text = data.streams(data.read(data.source_files(held_out=False)), STREAMS)
    for batch, loss in enumerate(train(prepared, model, text[: batches * STEPS])):
        if (batch + 1) % 20 == 0:
            print(f"batch {batch + 1}: {loss:.4f} nats from float32, {time.time() - started:.0f} seconds", flush=True)
    trained = tlq.convert(prepared.eval())

    held_out = data.held_out(64, 1025)
    models = {
        "float32": model,
        "calibrated": calibrated,
        "with narrower ranges": narrowed,
        "and trained": trained,
        "the same, fake-quantized": prepared,
    }
    bits = {name: bits_per_character(m, held_out) for name, m in models.items()}
    lost = {name: of_name - bits["float32"] for name, of_name in bits.items()}
    print(f"\n{'all_int8()':<26}{'bits per character':>20}{'lost':>10}")
    for name in bits:
        print(f"{name:<26}{bits[name]:>20.4f}{lost[name]:>10.4f}")
    for name in ("with narrower ranges", "and trained"):
        print(f"{name}: {1 - lost[name] / lost['calibrated']:.0%} of what calibrating loses is recovered")
    show_exactness(trained, prepared)


def prepare(model: CharLM, calibration: list[Tensor]) -> nn.Module:
    """The model with fake quantizes, whose ranges are those of the calibration from now on."""
    prepared = tlq.prepare_qat(model, QCONFIG)
    prepared.apply(disable_fake_quant)  # what is cut to the ranges of the first steps would not show those of the others
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    return prepared.apply(enable_fake_quant).apply(disable_observer)


def train(prepared: nn.Module, model: nn.Module, text: Tensor) -> Iterator[float]:
    """Train on streams ``[T, B]``, STEPS at a time, the states carried along, and yield the losses.

    The loss is the divergence of what ``prepared`` predicts from what ``model`` does: it says more than the next character.
    """
    pieces = text.split(STEPS)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda batch: _learning_rate(batch, len(pieces)))
    state: State | None = None
    wanted_state: State | None = None
    for characters in pieces:
        with torch.no_grad():
            wanted, wanted_state = model(characters, wanted_state)
        logits, (h, c) = prepared(characters, state)
        state = h.detach(), c.detach()
        predicted, wanted = (values.flatten(0, 1).log_softmax(1) for values in (logits, wanted))
        loss = nn.functional.kl_div(predicted, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prepared.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _learning_rate(batch: int, total: int) -> float:
    """The part of LEARNING_RATE that a batch takes: up, then down to nothing."""
    return min(1.0, (batch + 1) / WARM_UP) * (1.0 - batch / total)


def show_exactness(trained: nn.Module, prepared: nn.Module) -> None:
    """The fused LSTM against the integer reference, and against what was trained."""
    with torch.no_grad():
        x = trained.embedding(data.held_out(16, 256))
    found = exactness(trained.lstm, prepared.lstm, x)
    print(f"Of {found.integers.compared:,} values, {found.integers.unequal} are unequal to the integer reference.")
    step = found.graph_each_step
    print(
        f"Stepping from the same states, {step.unequal:,} of {step.compared:,} are unequal to the fake-quantized LSTM's, by "
        f"{step.steps} step(s) of the hidden state's grid at most."
    )


if __name__ == "__main__":
    main()
