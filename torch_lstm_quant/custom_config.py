"""What plain ``prepare_fx``, ``prepare_qat_fx`` and ``convert_fx`` need to quantize LSTMs along with the rest of a model.

::

    mapping = qconfig_mapping(LSTMQConfig.int8(), get_default_qconfig_mapping("x86"))
    prepared = prepare_fx(model, mapping, example_inputs, prepare_custom_config())
    for batch in calibration_batches:
        prepared(batch)
    quantized = convert_fx(prepared, convert_custom_config(backend="fused"))
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.backend_config import BackendConfig, BackendPatternConfig, DTypeConfig, get_native_backend_config
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quant_type import QuantType

from torch_lstm_quant import observed_by_torch
from torch_lstm_quant.float_lstms import FLOAT_LSTMS, FloatLSTM
from torch_lstm_quant.lowering import lower_module
from torch_lstm_quant.observed import OBSERVED_LSTMS, Observed, observe, to_reference
from torch_lstm_quant.observed_grid import PLAIN_DTYPES, QUANTIZED_DTYPES
from torch_lstm_quant.qconfig import LSTMQConfig, check_qconfig

_Config = TypeVar("_Config")

Backend = Literal["fused", "reference"]
BACKENDS: tuple[Backend, Backend] = ("fused", "reference")

CELL_OPS = (nn.Linear, nn.Sigmoid, nn.Tanh, torch.sigmoid, torch.tanh, torch.add, torch.mul)
"""The ops of a cell."""

CELL_DTYPES = QUANTIZED_DTYPES + PLAIN_DTYPES
"""What a part of a cell may be stored as: the kernel reads any grid up to 16 bits, whatever holds it."""


def qconfig_mapping(
    qconfig: LSTMQConfig, base: QConfigMapping | None = None, *, lstm_classes: Sequence[type[FloatLSTM]] = FLOAT_LSTMS
) -> QConfigMapping:
    """A ``QConfigMapping`` that quantizes LSTMs and LSTM cells by ``qconfig``, all else as ``base`` says (None: not at all).

    For LSTMs that differ, name them: ``mapping.set_module_name("encoder.lstm", other_qconfig.as_qconfig())``.

    Args:
        qconfig: the configuration.
        base: is copied, not changed.
        lstm_classes: the model's subclasses of ``nn.LSTM`` or ``nn.LSTMCell``, as FX goes by exact class.

    Raises:
        TypeError: an argument of another type.
    """
    check_qconfig(qconfig, "qconfig")
    _check_classes(lstm_classes)
    mapping = _copy(base, QConfigMapping)
    for lstm_class in lstm_classes:
        mapping.set_object_type(lstm_class, qconfig.as_qconfig())
    return mapping


def prepare_custom_config(
    qconfig: LSTMQConfig | None = None,
    base: PrepareCustomConfig | None = None,
    *,
    lstm_classes: Sequence[type[FloatLSTM]] = FLOAT_LSTMS,
) -> PrepareCustomConfig:
    """A ``PrepareCustomConfig`` that observes LSTMs and LSTM cells; pass it to ``prepare_fx`` or ``prepare_qat_fx``.

    Args:
        qconfig: for LSTMs to which the ``QConfigMapping`` gives an ordinary ``QConfig``; those of ``qconfig_mapping``
            carry their own. Without it such an LSTM is an error. So is such an LSTM cell in any case.
        base: is copied, not changed.
        lstm_classes: the model's subclasses of ``nn.LSTM`` or ``nn.LSTMCell``, as FX goes by exact class.

    Raises:
        TypeError: an argument of another type.
    """
    _check_classes(lstm_classes)
    config = _copy(base, PrepareCustomConfig)
    for lstm_class in lstm_classes:
        config.set_float_to_observed_mapping(lstm_class, _Preparer(qconfig))  # type: ignore[arg-type]
    return config


def convert_custom_config(backend: Backend = "fused", base: ConvertCustomConfig | None = None) -> ConvertCustomConfig:
    """A ``ConvertCustomConfig`` that converts observed LSTMs and LSTM cells; pass it to ``convert_fx``.

    Args:
        backend: ``"fused"`` for the kernel, ``"reference"`` for graphs of explicit quantize and dequantize ops.
        base: is copied, not changed.

    Raises:
        ValueError: an unknown backend.
        TypeError: ``base`` of another type.
    """
    converter: Any = Converter(backend)
    # an observed LSTM's own qconfig has float activations and int8 weights, which torch.ao calls weight-only
    config = _copy(base, ConvertCustomConfig)
    for observed_class in OBSERVED_LSTMS:
        config.set_observed_to_quantized_mapping(observed_class, converter, QuantType.WEIGHT_ONLY)
    return config


def backend_config(base: BackendConfig | None = None) -> BackendConfig:
    """A ``BackendConfig`` that says what the fused LSTM supports: :data:`CELL_DTYPES` for every op of a cell.

    ``prepare_fx`` and ``convert_fx`` need it only for a model that holds observed cells of its own making; the two utilities
    of ``lstm_utils`` take it to check what they are asked for.

    Args:
        base: is copied, not changed; torch's native backend if None.

    Raises:
        TypeError: ``base`` of another type.
    """
    config = _copy(get_native_backend_config() if base is None else base, BackendConfig)
    patterns = {pattern.pattern: pattern for pattern in config.configs}
    for op in CELL_OPS:
        pattern = patterns.get(op) or BackendPatternConfig(op)
        weights: dict[str, Any] = {"weight_dtype": torch.qint8, "bias_dtype": torch.float32} if op is nn.Linear else {}
        for dtype in CELL_DTYPES:
            pattern.add_dtype_config(DTypeConfig(input_dtype=dtype, output_dtype=dtype, **weights))
        config.set_backend_pattern_config(pattern)
    return config


class _Preparer:
    """What torch.ao's mapping from float to observed classes asks for: something with ``from_float``."""

    def __init__(self, qconfig: LSTMQConfig | None) -> None:
        if qconfig is not None:
            check_qconfig(qconfig, "qconfig")
        self.qconfig = qconfig

    def from_float(self, module: FloatLSTM) -> Observed:
        # torch.ao has put an ordinary qconfig's observer on what a cell returns, which is no tensor
        return observe(module, None if isinstance(module, nn.LSTMCell) else self.qconfig)


class Converter:
    """What torch.ao's mapping from observed to quantized classes asks for: something with ``from_observed``.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, backend: str) -> None:
        check_backend(backend)
        self.backend = backend

    def from_observed(self, observed: Observed | torch.ao.nn.quantizable.LSTM, path: str = "") -> nn.Module:
        reference: nn.Module
        if isinstance(observed, OBSERVED_LSTMS):
            reference, where = to_reference(observed), observed.where
        else:
            where = path or "LSTM"
            reference = observed_by_torch.to_reference(observed, where)
        return lower_module(reference, where) if self.backend == "fused" else reference


def check_backend(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is one of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def _check_classes(lstm_classes: Sequence[type[FloatLSTM]]) -> None:
    if isinstance(lstm_classes, type) or not all(isinstance(c, type) and issubclass(c, FLOAT_LSTMS) for c in lstm_classes):
        raise TypeError(f"lstm_classes must be subclasses of nn.LSTM or nn.LSTMCell, in a tuple or list, got {lstm_classes!r}")


def _copy(base: _Config | None, kind: type[_Config]) -> _Config:
    """A copy of a user's configuration, or an empty one."""
    if base is None:
        return kind()
    _check(base, kind, "base")
    return copy.deepcopy(base)


def _check(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of class {kind.__name__}, got {type(value).__name__}")
