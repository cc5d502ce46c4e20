"""Calls around torch's dispatcher, as compiled from csrc/direct.cpp.

Addresses are those of contiguous memory that stays while it is used. None is returned for arguments that are not taken.
"""

from collections.abc import Sequence

from torch import Tensor

def bind_layers(packed: Tensor, address: int, size: int, exchange_api: object, /) -> object: ...
def lstm(layers: object, x: object, hx: object, cx: object, /) -> tuple[Tensor, Tensor, Tensor] | None: ...
def lstm_cell(layers: object, x: object, hx: object, cx: object, /) -> tuple[Tensor, Tensor] | None: ...

class Stream:
    """What ``torch_lstm_quant.Stream`` derives from.

    Calls that it does not take go to the method ``_run_unusual(x, out, rows)``. ``rows`` are numbers of rows; None: all.
    """

    def _bind(self, packed: Tensor, address: int, size: int, exchange_api: object, rows: int, /) -> None: ...
    def __call__(self, x: Tensor, out: Tensor | None = None, *, rows: Sequence[int] | Tensor | None = None) -> Tensor: ...
    def _run(self, x: object, out: object, rows: object, /) -> Tensor | None: ...
    def _set_state(
        self, hx_address: int, cx_address: int, h_values: int, c_values: int, rows: list[int] | None, /
    ) -> None: ...
    def _copy_state(
        self, h_n_address: int, c_n_address: int, h_values: int, c_values: int, rows: list[int] | None, /
    ) -> None: ...
