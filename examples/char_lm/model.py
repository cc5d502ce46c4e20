"""The character-level language model of the demo: embedding, LSTM, linear."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from data import ALPHABET, decode, encode
from torch import Tensor, nn

State = tuple[Tensor, Tensor]

CHECKPOINT = Path(__file__).with_name("char_lm.pt")
"""The weights that ``train.py`` wrote, in float16: half the bytes, and the same bits per character."""


class CharLM(nn.Module):
    """Predicts the next character from those before it."""

    def __init__(self, hidden_size: int = 384, embedding_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size)
        self.linear = nn.Linear(hidden_size, len(ALPHABET))

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Characters ``[T, B]`` and the state that they are read in to logits ``[T, B, len(ALPHABET)]`` and the next state."""
        output, state = self.lstm(self.embedding(characters), state)
        return self.linear(output), state


def save(model: CharLM, path: Path) -> None:
    torch.save({name: weight.half() for name, weight in model.state_dict().items()}, path)


def load(path: Path = CHECKPOINT) -> CharLM:
    """The model of a checkpoint, in float32 and in evaluation mode."""
    weights = torch.load(path, weights_only=True)
    model = CharLM(hidden_size=weights["lstm.weight_hh_l0"].shape[1], embedding_size=weights["embedding.weight"].shape[1])
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor) -> float:
    """Of every character of streams ``[T + 1, B]`` but the first, each stream read from the zero state on."""
    logits, _ = model(text[:-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten()).item() / math.log(2)


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int = 400, temperature: float = 0.6) -> str:
    """Characters drawn one after the other from what the model predicts."""
    random = torch.Generator().manual_seed(0)
    logits, state = model(encode(prompt)[:, None])
    written = []
    for _ in range(length):
        character = torch.multinomial((logits[-1, 0] / temperature).softmax(0), 1, generator=random)
        written.append(character)
        logits, state = model(character[:, None], state)
    return decode(torch.cat(written))
