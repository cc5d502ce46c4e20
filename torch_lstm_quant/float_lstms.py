"""Float LSTMs and LSTM cells: what messages call them, the configuration that they have, and which cannot be quantized."""

from __future__ import annotations

import torch
from torch import nn

from torch_lstm_quant.observers import BoundaryObserver
from torch_lstm_quant.qconfig import LSTMQConfig, check_qconfig

FloatLSTM = nn.LSTM | nn.LSTMCell
FLOAT_LSTMS = (nn.LSTM, nn.LSTMCell)
"""The classes whose modules are quantized, with their subclasses."""


def name_of(kind: type[FloatLSTM], module: FloatLSTM, where: str) -> str:
    """What messages call a float module of ``kind``."""
    if not isinstance(module, kind):
        raise TypeError(f"{where or 'module'} must be an nn.{kind.__name__}, got {type(module).__name__}")
    return f"{kind.__name__} {where!r}" if where else f"{kind.__name__}({module.input_size}, {module.hidden_size})"


def checked_qconfig(other: FloatLSTM, qconfig: LSTMQConfig | None, where: str) -> LSTMQConfig:
    """The configuration by which a float module is observed; raises where the module cannot be."""
    config = qconfig_of(other) or (None if qconfig is None else check_qconfig(qconfig, f"{where}: qconfig"))
    if config is None:
        default = ", or name a default in prepare_custom_config(qconfig)" if isinstance(other, nn.LSTM) else ""
        raise ValueError(
            f"{where}: its qconfig must come from LSTMQConfig.as_qconfig(), got {getattr(other, 'qconfig', None)}: use "
            f"torch_lstm_quant.qconfig_mapping(qconfig, base){default}"
        )
    _check_parameters(other, where)
    _check_nothing_beside_cells(other, where)
    _check_overrides(config, other, where)
    return config


def check_float_lstm(module: FloatLSTM) -> str:
    """Refuse a float module that cannot be taken apart into cells.

    Returns:
        What messages call it.

    Raises:
        TypeError, ValueError: as :meth:`ObservedLSTM.from_float`.
    """
    where = name_of(nn.LSTMCell if isinstance(module, nn.LSTMCell) else nn.LSTM, module, "")
    _check_parameters(module, where)
    _check_nothing_beside_cells(module, where)
    return where


def qconfig_of(lstm: nn.Module) -> LSTMQConfig | None:
    """The configuration that torch.ao's flow attached to a float LSTM, if it is one of ours."""
    qconfig = getattr(lstm, "qconfig", None)
    boundary = qconfig.activation() if qconfig is not None else None
    return boundary.lstm_qconfig if isinstance(boundary, BoundaryObserver) else None


def _check_parameters(lstm: FloatLSTM, where: str) -> None:
    for name, parameter in lstm.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            got = f"{parameter.dtype} on {parameter.device}"
            raise ValueError(f"{where}: {name} must be torch.float32 on the CPU, got {got}: call float() and cpu() first")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinities")


def _check_nothing_beside_cells(lstm: FloatLSTM, where: str) -> None:
    """Refuse what an LSTM does beside running its cells, since what takes its place would not."""
    kind = nn.LSTM if isinstance(lstm, nn.LSTM) else nn.LSTMCell
    if getattr(lstm.forward, "__func__", None) is not kind.forward:
        raise ValueError(
            f"{where}: {type(lstm).__name__} overrides forward, which would be lost: let it contain an nn.{kind.__name__} "
            "instead of being one, or leave it float"
        )
    if lstm._forward_hooks or lstm._forward_pre_hooks:
        raise ValueError(
            f"{where}: has forward hooks, which would be lost: remove them, those of weight_norm and pruning with "
            "remove_weight_norm and prune.remove, and register others with the quantized LSTM"
        )


def _check_overrides(config: LSTMQConfig, lstm: FloatLSTM, where: str) -> None:
    """Refuse a configuration for cells that an LSTM does not have."""
    layers, directions = (lstm.num_layers, 1 + lstm.bidirectional) if isinstance(lstm, nn.LSTM) else (1, 1)
    for layer, direction, _, _ in config.overrides:
        if (layer is not None and layer >= layers) or (direction == "backward" and directions == 1):
            raise ValueError(
                f"{where}: its configuration overrides layer {'any' if layer is None else layer}, {direction or 'both'} "
                f"direction, but it has {layers} layers and {directions} direction(s), the first layer being 0: correct that, "
                f"or give this {'LSTM' if isinstance(lstm, nn.LSTM) else 'LSTMCell'} a configuration of its own"
            )
