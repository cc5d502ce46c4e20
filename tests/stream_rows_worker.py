"""Callers that share streams at random, each compared with its sequence alone through the fused module.

The ISA is chosen once a process, so ``test_stream_rows.py`` runs this for each of them, with ``TORCH_LSTM_QUANT_ISA`` set:
``python stream_rows_worker.py SEED SCHEDULES`` prints one line of JSON.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field

import torch
from kernel_worker import THREADS, same
from random_cells import PRESETS, Dice, random_input, random_layers, random_proj_size, random_states
from torch import Tensor

import torch_lstm_quant as tlq
from torch_lstm_quant import ops
from torch_lstm_quant.call_forms import States


@dataclass(eq=False)
class Caller:
    """A sequence, what came of it so far, and where its state is: in a row of a stream, or saved."""

    hx: States | None
    place: tuple[int, int] | None = None
    saved: bytes = b""
    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)


class Server:
    """Two streams of a module, whose callers enter, send steps and chunks, go away and come back, and leave."""

    def __init__(self, dice: Dice, module: tlq.LSTM, most_rows: int) -> None:
        self.dice, self.module = dice, module
        self.streams = [tlq.Stream(module, dice.integer(1, most_rows)) for _ in range(2)]
        self.callers: list[Caller] = []
        self.gone: list[tuple[Caller, States]] = []

    def free_rows(self, stream: int) -> list[int]:
        taken = {caller.place for caller in self.callers}
        return [row for row in range(self.streams[stream].batch_size) if (stream, row) not in taken]

    def enter(self, stream: int) -> None:
        rows = self.free_rows(stream)
        if not rows:
            return
        hx = random_states(self.dice, self.module.cells(), 1) if self.dice.chance(0.3) else None
        row = int(self.dice.one_of(rows))  # type: ignore[call-overload]
        self.streams[stream].reset(hx, rows=[row])
        self.callers.append(Caller(hx, (stream, row)))

    def go_on(self, stream: int) -> None:
        """A step or a chunk of some callers, of none, or of every row."""
        here = [caller for caller in self.callers if caller.place is not None and caller.place[0] == stream]
        share = float(self.dice.one_of([0.2, 0.5, 1.0]))  # type: ignore[arg-type]
        chosen = [here[i] for i in torch.randperm(len(here), generator=self.dice.generator) if self.dice.chance(share)]
        steps = 1 if self.dice.chance(0.6) else self.dice.integer(0, 6)
        x = random_input(self.dice, steps, len(chosen), self.module.input_size)
        for i, caller in enumerate(chosen):
            if caller.x and self.dice.chance(0.4):  # stands still, so that steps go on by what changed
                x[:, i] = caller.x[-1][-1:]
        rows: object = [caller.place[1] for caller in chosen if caller.place is not None]
        form = self.dice.one_of(["list", "tensor", "strided", "tuple"])
        if form == "tensor":
            rows = torch.tensor(rows, dtype=torch.int64)
        elif form == "strided":
            rows = torch.tensor(rows, dtype=torch.int64).repeat_interleave(2)[::2]
        elif form == "tuple":
            rows = tuple(rows)  # type: ignore[arg-type]
        one, flat = self.streams[stream], steps == 1 and self.dice.chance(0.7)
        if len(chosen) == one.batch_size and self.dice.chance(0.7):
            chosen.sort(key=lambda caller: caller.place or (0, 0))
            rows = None
        out = torch.empty(*x.shape[:2], one.proj_size or one.hidden_size)
        out = out[0] if flat else out
        y = one(x[0] if flat else x, out if self.dice.chance(0.3) else None, rows=rows)  # type: ignore[arg-type]
        y = y[None] if flat else y
        for i, caller in enumerate(chosen):
            if steps:
                caller.x.append(x[:, i])
                caller.y.append(y[:, i])

    def go_away(self, stream: int) -> None:
        for caller in self.callers:
            if caller.place is not None and caller.place[0] == stream and self.dice.chance(0.3):
                file = io.BytesIO()
                torch.save(self.streams[stream].save(rows=[caller.place[1]]), file)
                caller.saved, caller.place = file.getvalue(), None

    def come_back(self, stream: int) -> None:
        for caller in self.callers:
            rows = self.free_rows(stream)
            if caller.place is None and rows and self.dice.chance(0.7):
                row = int(self.dice.one_of(rows))  # type: ignore[call-overload]
                saved = torch.load(io.BytesIO(caller.saved), weights_only=True)
                self.streams[stream].restore(saved, rows=torch.tensor([row]))
                caller.place = stream, row

    def leave(self, stream: int) -> None:
        for caller in list(self.callers):
            if caller.place is not None and caller.place[0] == stream and self.dice.chance(0.3):
                self.gone.append((caller, self.streams[stream].state(rows=[caller.place[1]])))
                self.callers.remove(caller)

    def run(self, actions: int) -> None:
        for _ in range(actions):
            action = self.dice.one_of([self.enter, self.enter, *[self.go_on] * 5, self.go_away, self.come_back, self.leave])
            action(self.dice.integer(0, 1))  # type: ignore[operator]
        for stream in (0, 1):
            self.come_back(stream)
            for caller in self.callers:
                if caller.place is not None and caller.place[0] == stream:
                    self.gone.append((caller, self.streams[stream].state(rows=[caller.place[1]])))


def compare(seed: int) -> tuple[int, int]:
    """How many values one random schedule gave, and how many of them differ from those of each caller alone."""
    dice = Dice(seed)
    large = dice.chance(0.3)
    input_size, hidden_size = (dice.integer(1, 150 if large else 40) for _ in range(2))
    preset = dice.one_of([None, *PRESETS])
    sizes = input_size, hidden_size, dice.integer(1, 3), 1
    layers = random_layers(dice, *sizes, preset, random_proj_size(dice, hidden_size))  # type: ignore[arg-type]
    module = tlq.LSTM(layers)
    server = Server(dice, module, int(dice.one_of([1, 3, 8, 40])))  # type: ignore[call-overload]
    server.run(dice.integer(5, 60))
    compared = differing = 0
    for caller, state in server.gone:
        if not caller.x:
            continue
        want, want_state = module(torch.cat(caller.x)[:, None], caller.hx)
        for one, other in zip((torch.cat(caller.y), *state), (want[:, 0], *want_state), strict=True):
            compared += one.numel()
            differing += int((~same(one, other)).sum())
    return compared, differing


def main(seed: int, schedules: int) -> None:
    compared, failed = dict.fromkeys(THREADS, 0), []
    for threads in THREADS:
        torch.set_num_threads(threads)
        for i in range(seed, seed + schedules):
            count, wrong = compare(i)
            compared[threads] += count
            if wrong:
                failed.append(f"seed {i}, {threads} threads: {wrong} values")
    print(json.dumps({"isa": ops.isa_active(), "compared": compared, "failed": failed}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
