"""Trains the demo's model on the sources of Python's standard library and writes its checkpoint.

The demo does not need this: the checkpoint is in the repository. It takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import data
import torch
from model import CHECKPOINT, CharLM, State, bits_per_character, save
from torch import Tensor, nn

EPOCHS, STREAMS, STEPS = 3, 32, 128
LEARNING_RATE, WARM_UP, LARGEST_GRADIENT = 3e-3, 200, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums of several threads differ in their last bits from run to run
    torch.manual_seed(0)
    random.seed(0)
    model = CharLM()
    started = time.time()
    for epoch in train(model, arguments.epochs, started):
        save(model, arguments.output)
        bits = bits_per_character(model, data.held_out(64, 1025))
        print(f"epoch {epoch}, held-out text: {bits:.4f} bits per character, {minutes(started)}", flush=True)


def train(model: CharLM, epochs: int, started: float) -> Iterator[int]:
    """Truncated backpropagation: the streams are read in pieces of STEPS characters, and the state is carried along.

    Yields the number of each epoch when it is done.
    """
    files = data.source_files(held_out=False)
    total = epochs * (len(data.read(files)) // STREAMS // STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, total))
    step = 0
    for epoch in range(epochs):
        random.shuffle(files)
        state: State | None = None
        for characters, following in pieces(data.streams(data.read(files), STREAMS)):
            logits, state = model(characters, state)
            state = (state[0].detach(), state[1].detach())
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                bits = loss.item() / math.log(2)
                print(f"step {step} of {total}: {bits:.3f} bits per character, {minutes(started)}", flush=True)
        yield epoch + 1


def learning_rate(step: int, total: int) -> float:
    """The part of LEARNING_RATE that a step takes: a linear rise, then half a cosine down to nothing."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))


def pieces(text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(characters, the characters that follow them), each ``[STEPS, STREAMS]``."""
    starts = range(0, len(text) - STEPS, STEPS)
    return [(text[start : start + STEPS], text[start + 1 : start + STEPS + 1]) for start in starts]


def minutes(started: float) -> str:
    return f"{(time.time() - started) / 60:.1f} minutes"


if __name__ == "__main__":
    main()
