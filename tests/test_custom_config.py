"""The configurations for plain prepare_fx, prepare_qat_fx and convert_fx: what they extend, and what they refuse."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from converted_lstms import torchs_warnings
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig, get_default_qconfig, get_default_qconfig_mapping
from torch.ao.quantization.backend_config import BackendConfig, get_native_backend_config
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import torch_lstm_quant as tlq
from torch_lstm_quant import lstm_utils

pytestmark = torchs_warnings
X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.second, self.outer = nn.Linear(5, 5), nn.LSTM(5, 8), nn.LSTM(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.second(self.first(self.inner(x))[0])[0])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_lstms_of_a_model_can_differ(model: Model) -> None:
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8())
    mapping.set_module_name("second", tlq.LSTMQConfig.int8_gates16().as_qconfig())
    prepared = prepare_fx(copy.deepcopy(model), mapping, (X,), tlq.prepare_custom_config())
    prepared(X)
    converted = convert_fx(prepared, tlq.convert_custom_config())
    assert converted.first.cells()[0][0].qparams.fgate_cx is None
    assert converted.second.cells()[0][0].qparams.fgate_cx.bits == 16
    assert type(converted.inner) is nn.Linear


def test_one_lstm_can_stay_float(model: Model) -> None:
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8()).set_module_name("first", None)
    prepared = prepare_fx(copy.deepcopy(model), mapping, (X,), tlq.prepare_custom_config())
    prepared(X)
    converted = convert_fx(prepared, tlq.convert_custom_config())
    assert type(converted.first) is nn.LSTM
    assert isinstance(converted.second, tlq.LSTM)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_qat_of_the_whole_model(model: Model, backend: Any) -> None:
    base = QConfigMapping().set_global(get_default_qat_qconfig("qnnpack"))
    mapping = tlq.qconfig_mapping(tlq.LSTMQConfig.int8(qat=True), base)
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, (X,), tlq.prepare_custom_config())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    before = prepared.first.layers[0].layer_fw.cell.hgates.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (prepared(X) - 1).pow(2).mean().backward()
        optimizer.step()
    assert not torch.equal(prepared.first.layers[0].layer_fw.cell.hgates.weight, before)
    prepared.eval().apply(torch.ao.quantization.disable_observer)
    converted = convert_fx(prepared, tlq.convert_custom_config(backend))
    assert (converted(X) - prepared(X)).abs().max() < 0.05


def test_prepared_models_survive_a_pickle(model: Model) -> None:
    prepared = tlq.prepare(model)
    prepared(X)
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(tlq.convert(loaded)(X), tlq.convert(prepared)(X))


def count_dtypes(config: BackendConfig) -> int:
    return sum(len(pattern.dtype_configs) for pattern in config.configs)


def test_what_is_handed_in_is_extended_not_changed() -> None:
    prepare = PrepareCustomConfig().set_preserved_attributes(["version"])
    convert = ConvertCustomConfig().set_preserved_attributes(["version"])
    mapping = get_default_qconfig_mapping("x86")
    backend = get_native_backend_config()
    extended = (
        tlq.prepare_custom_config(base=prepare),
        tlq.convert_custom_config(base=convert),
        tlq.qconfig_mapping(tlq.LSTMQConfig.int8(), mapping),
        tlq.backend_config(backend),
    )
    assert extended[0].preserved_attributes == extended[1].preserved_attributes == ["version"]
    assert not prepare.float_to_observed_mapping
    assert not convert.observed_to_quantized_mapping
    assert nn.LSTM not in mapping.object_type_qconfigs
    assert set(mapping.object_type_qconfigs) < set(extended[2].object_type_qconfigs)
    assert count_dtypes(backend) == count_dtypes(get_native_backend_config()) < count_dtypes(extended[3])


@pytest.mark.parametrize("preset", ["int8", "int8_gates16", "fixed16", "all_int8"])
def test_the_backend_config_allows_every_preset(preset: str) -> None:
    config = getattr(tlq.LSTMQConfig, preset)()
    lstm = nn.LSTM(5, 8)
    constructors = {f"{part}_obs_ctr": constructor for part, constructor in config.parts() if constructor is not None}
    float_boundary = torch.ao.quantization.PlaceholderObserver.with_args(dtype=torch.float32)
    lstm.qconfig = torch.ao.quantization.QConfig(activation=float_boundary, weight=config.weight_hh)
    backend = tlq.backend_config()
    observed = lstm_utils._get_lstm_with_individually_observed_parts(lstm, (X,), backend, **constructors)
    observed(X)
    lstm_utils._get_reference_quantized_lstm_module(observed, backend)


def test_an_lstm_with_an_ordinary_qconfig(model: Model) -> None:
    mapping = QConfigMapping().set_object_type(nn.LSTM, get_default_qconfig("x86"))
    with pytest.raises(ValueError, match=r"LSTM\(5, 8\): its qconfig must come from LSTMQConfig.as_qconfig\(\)"):
        prepare_fx(copy.deepcopy(model), mapping, (X,), tlq.prepare_custom_config())


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: tlq.qconfig_mapping("int8"), "qconfig must be an LSTMQConfig, got str"),
        (lambda: tlq.qconfig_mapping(tlq.LSTMQConfig(), {}), "base must be of class QConfigMapping, got dict"),
        (lambda: tlq.prepare_custom_config("int8"), "qconfig must be an LSTMQConfig, got str"),
        (lambda: tlq.prepare_custom_config(base={}), "base must be of class PrepareCustomConfig, got dict"),
        (lambda: tlq.convert_custom_config(base={}), "base must be of class ConvertCustomConfig, got dict"),
        (lambda: tlq.backend_config({}), "base must be of class BackendConfig, got dict"),
    ],
)
def test_arguments_of_other_types(attempt: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        attempt()
