"""Warnings name the line of the user's that they are about, through whatever calls of this package and of torch it goes."""

from __future__ import annotations

import linecache
from collections.abc import Callable

import pytest
import torch
from converted_lstms import torchs_warnings
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import torch_lstm_quant as tlq
from torch_lstm_quant.observed import ObservedLSTM, ReferenceLSTM
from torch_lstm_quant.user_warning import warn_user

ZEROS, X = torch.zeros(6, 3, 5), torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)  # in a model
        return output


def lines_of(call: Callable[[], object], category: type[Warning], message: str) -> set[str]:
    """What stands where the warnings point."""
    with pytest.warns(category, match=message) as caught:
        call()
    found = [warning for warning in caught if warning.category is category and message in str(warning.message)]
    return {linecache.getline(warning.filename, warning.lineno).strip() for warning in found}


def prepared_by_fx(x: Tensor) -> nn.Module:
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8(), QConfigMapping())
    return prepare_fx(Model().eval(), mapping, (x,), tlq.prepare_custom_config())


@torchs_warnings
def test_dropout_while_calibrating() -> None:
    def direct() -> None:
        tlq.prepare(nn.LSTM(5, 8, 2, dropout=0.5))(X)  # direct

    def with_lengths() -> None:
        tlq.prepare(nn.LSTM(5, 8, 2, dropout=0.5))(X, lengths=[6, 2, 1])  # with lengths

    def in_a_model() -> None:
        tlq.prepare(Model())(X)

    def in_a_graph() -> None:
        prepared = prepared_by_fx(X).train()
        prepared(X)  # in a graph

    for call, line in (
        (direct, "tlq.prepare(nn.LSTM(5, 8, 2, dropout=0.5))(X)  # direct"),
        (with_lengths, "tlq.prepare(nn.LSTM(5, 8, 2, dropout=0.5))(X, lengths=[6, 2, 1])  # with lengths"),
        (in_a_model, "output, _ = self.lstm(x)  # in a model"),
        (in_a_graph, "prepared(X)  # in a graph"),
    ):
        assert lines_of(call, UserWarning, "calibrating in training mode, with dropout of 0.5") == {line}


@torchs_warnings
def test_what_a_grid_loses() -> None:
    def quantize() -> None:
        tlq.quantize(Model(), [ZEROS])  # quantize

    def convert() -> None:
        prepared = tlq.prepare(Model().eval())
        prepared(ZEROS)
        tlq.convert(prepared)  # convert

    def by_fx() -> None:
        prepared = prepared_by_fx(ZEROS)
        prepared(ZEROS)
        convert_fx(prepared, tlq.convert_custom_config())  # by fx

    def alone() -> None:
        observed = ObservedLSTM.from_float(nn.LSTM(5, 8).eval(), tlq.LSTMQConfig.int8())
        observed(ZEROS)
        ReferenceLSTM.from_observed(observed)  # alone

    for call, line in (
        (quantize, "tlq.quantize(Model(), [ZEROS])  # quantize"),
        (convert, "tlq.convert(prepared)  # convert"),
        (by_fx, "convert_fx(prepared, tlq.convert_custom_config())  # by fx"),
        (alone, "ReferenceLSTM.from_observed(observed)  # alone"),
    ):
        assert lines_of(call, tlq.LossWarning, "calibration saw no value but 0") == {line}


@pytest.mark.parametrize(("name", "file"), [(None, __file__), ("", __file__), (3, "any.py"), ("torchvision", "any.py")])
def test_code_of_any_name(name: object, file: str) -> None:
    """Such as exec runs, with globals of its caller's."""
    values = {"warn_user": warn_user, "__name__": name}
    with pytest.warns(UserWarning, match="of any name") as caught:
        exec(compile("warn_user('of any name')", "any.py", "exec"), values)
    assert [warning.filename for warning in caught] == [file]


def test_what_a_grid_loses_for_torchao() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import quantize_

    from torch_lstm_quant.torchao import LSTMConfig, is_lstm

    def convert() -> None:
        model = Model().eval()
        quantize_(model, LSTMConfig(), is_lstm)
        model(ZEROS)
        quantize_(model, LSTMConfig(step="convert"), is_lstm)  # torchao

    found = lines_of(convert, tlq.LossWarning, "calibration saw no value but 0")
    assert found == {'quantize_(model, LSTMConfig(step="convert"), is_lstm)  # torchao'}
