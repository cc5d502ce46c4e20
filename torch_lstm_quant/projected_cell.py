"""torch.ao's LSTM cell with the projection of ``nn.LSTM``'s ``proj_size``, which torch.ao's own has not."""

from __future__ import annotations

from torch import Tensor, nn
from torch.ao.nn.quantizable import LSTMCell


class ProjectedLSTMCell(LSTMCell):
    """``forward(x, (h, c)) -> (h, c)`` with ``h`` ``[B, proj_size]``: what torch.ao's cell gives for h goes through ``hy``.

    Args:
        input_size, hidden_size, proj_size, bias: as in ``nn.LSTM``.
        split_gates: as in torch.ao's cell.
    """

    def __init__(self, input_size: int, hidden_size: int, proj_size: int, *, bias: bool, split_gates: bool) -> None:
        super().__init__(input_size, hidden_size, bias, split_gates=split_gates)
        if isinstance(self.hgates, nn.ModuleDict):
            for gate in self.hgates:
                self.hgates[gate] = nn.Linear(proj_size, hidden_size, bias)
        else:
            self.hgates = nn.Linear(proj_size, 4 * hidden_size, bias)
        self.hy = nn.Linear(hidden_size, proj_size, bias=False)

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ogate_cy, cy = super().forward(x, hidden)
        return self.hy(ogate_cy), cy
