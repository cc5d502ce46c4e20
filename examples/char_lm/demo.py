"""Quantizes a trained character language model in every preset and shows what was gained and lost.

Everything runs on one thread. Speeds are those of this machine and of this minute: compare them with each other only.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import data
import torch
from measure import characters_per_second, exactness, size_on_disk
from model import CharLM, bits_per_character, load, sample
from parts import signal_to_noise, values_of_parts
from picture import draw
from torch import Tensor, nn

import torch_lstm_quant as tlq

PRESETS = {
    "int8": tlq.LSTMQConfig.int8(),
    "int8_gates16": tlq.LSTMQConfig.int8_gates16(),
    "fixed16": tlq.LSTMQConfig.fixed16(),
    "all_int8": tlq.LSTMQConfig.all_int8(),
}
ALLOWED_LOSS = {"int8": 0.005, "int8_gates16": 0.01}
"""Bits per character that these presets may lose."""

FLOAT32 = tlq.LSTMQConfig(hx=None, cx=None)
"""No part is quantized."""

GRAPH = "FX reference (int8)"
TABLE_NOTE = """\
Bits: on {characters:,} characters of files held out from training. Speed: one text of {long:,} characters ({short} for the
FX reference, as it is slow) through the whole model on one thread; the median of 9 rounds."""
EXACTNESS_NOTE = """\
Largest: the largest difference, in steps of the hidden state's grid. The graph multiplies matrices in float32, whose rounding
depends on the machine. Step by step: each step starts from the fused LSTM's states. Running on: from the graph's own, over
256 characters, so that one value rounded the other way changes what follows it."""
PROMPT = "def read(self, size=-1):\n    "
PICTURE = Path(__file__).parents[2] / "build" / "char_lm_parts.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to write the picture (default: %(default)s)")
    picture = parser.parse_args().picture
    torch.set_num_threads(1)

    model = load()
    print(f"A character language model with {model.lstm}, trained on the sources of Python's standard library.\n")
    batches = data.calibration_batches()
    fused, graphs = {}, {}
    for name, qconfig in PRESETS.items():
        print(f"tlq.quantize(model, batches, qconfig=tlq.LSTMQConfig.{name}())", flush=True)
        with warnings.catch_warnings(record=True) as losses:
            fused[name] = tlq.quantize(model, batches, qconfig=qconfig, backend="fused", progress=True)
            graphs[name] = tlq.quantize(model, batches, qconfig=qconfig, backend="reference", progress=False)
        for message in {str(loss.message): None for loss in losses}:  # both calls calibrate, and warn of the same
            print(f"Warning: {message}")

    show_table({"float32": model, "quantize_dynamic": dynamic(model), GRAPH: graphs["int8"], **fused})
    show_exactness(model, fused, graphs)
    show_samples(model, fused["int8"])
    show_parts(model, fused, graphs, batches, picture)


def dynamic(model: CharLM) -> nn.Module:
    """PyTorch's own quantized LSTM, the linear layer left in float32 as in all the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successors
        return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)


def show_table(models: dict[str, nn.Module]) -> None:
    """Bits per character, bytes and speed of each model; the graph is so slow that its speed is taken on a shorter text."""
    text = data.held_out(64, 1025)
    long, short = text[:1000, :1], text[:50, :1]
    speeds = characters_per_second({name: (m, short if name == GRAPH else long) for name, m in models.items()}, rounds=9)
    bits = {name: bits_per_character(m, text) for name, m in models.items()}
    print(f"\n{'':<22}{'bits per':>10}{'lost':>10}{'model':>12}{'characters':>13}{'times':>10}")
    print(f"{'':<22}{'character':>10}{'':>10}{'bytes':>12}{'per second':>13}{'float32':>10}")
    for name, m in models.items():
        lost, ratio = bits[name] - bits["float32"], speeds[name] / speeds["float32"]
        print(f"{name:<22}{bits[name]:>10.4f}{lost:>10.4f}{size_on_disk(m):>12,}{speeds[name]:>13,.0f}{ratio:>10.2f}")
    print(TABLE_NOTE.format(characters=text[1:].numel(), long=len(long), short=len(short)))
    for name, allowed in ALLOWED_LOSS.items():
        lost = bits[name] - bits["float32"]
        verdict = "met" if lost <= allowed else "MISSED"
        print(f"Target: {name} within {allowed} bits per character of float32: {verdict} ({lost:+.4f}).")


def show_exactness(model: CharLM, fused: dict[str, nn.Module], graphs: dict[str, nn.Module]) -> None:
    """Every value of the fused LSTMs on held-out text, against the integer reference and against the FX reference graph."""
    with torch.no_grad():
        x = model.embedding(data.held_out(16, 256))
    columns = "{:<20}{:>12}{:>12}{:>14}{:>11}{:>11}{:>16}{:>11}"
    print(f"\n{'fused LSTM against':<20}{'integer reference':>24}{'FX graph, step by step':>36}{'FX graph, running on':>27}")
    print(columns.format("", "compared", "unequal", "compared", "unequal", "largest", "unequal", "largest"))
    found = {name: exactness(m.lstm, graphs[name].lstm, x) for name, m in fused.items()}
    for name, one in found.items():
        integers, step, running = one.integers, one.graph_each_step, one.graph_running
        counts = (integers.compared, integers.unequal, step.compared, step.unequal, step.steps, running.unequal, running.steps)
        print(columns.format(name, *(f"{count:,}" for count in counts)))
    print(EXACTNESS_NOTE)
    compared, unequal = (sum(getattr(one.integers, field) for one in found.values()) for field in ("compared", "unequal"))
    print(f"Of {compared:,} values, {unequal:,} are unequal to the integer reference.")


def show_samples(model: CharLM, quantized: nn.Module) -> None:
    """What both models write after the same prompt, with the same random numbers."""
    of_float, of_fused = sample(model, PROMPT), sample(quantized, PROMPT)
    same = next((i for i, (a, b) in enumerate(zip(of_float, of_fused, strict=True)) if a != b), len(of_float))
    print(f"\nText that both models write (the first {same} of {len(of_float)} characters are the same):")
    for name, text in (("float32", of_float), ("int8, fused", of_fused)):
        print(f"\n--- {name} ---\n{PROMPT}{text}")


def show_parts(
    model: CharLM, fused: dict[str, nn.Module], graphs: dict[str, nn.Module], batches: list[Tensor], picture: Path
) -> None:
    """The error of each part of the cell, as a picture."""
    with torch.no_grad():
        x = model.embedding(data.held_out(8, 256))
    unquantized = tlq.quantize(model, batches[:1], qconfig=FLOAT32, backend="reference", progress=False)
    wanted = values_of_parts(unquantized.lstm, x)
    results = {}
    for name in ("int8", "all_int8"):
        ratios = signal_to_noise(values_of_parts(graphs[name].lstm, x), wanted)
        results[name] = (ratios, fused[name].lstm.cells()[0][0].qparams)
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, picture)
    print(f"\nThe error of each part of the cell: {picture}")


if __name__ == "__main__":
    main()
