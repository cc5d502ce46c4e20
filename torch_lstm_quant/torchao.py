"""LSTMs for torchao's ``quantize_``: a config for each of the two steps, with which calibration or training goes in between.

::

    from torchao.quantization import quantize_
    from torch_lstm_quant.torchao import LSTMConfig, is_lstm

    quantize_(model, LSTMConfig(step="prepare"), filter_fn=is_lstm)
    for batch in calibration_batches:
        model(batch)
    quantize_(model, LSTMConfig(step="convert"), filter_fn=is_lstm)

Importing this module registers the config with torchao, which must be installed: ``pip install torch-lstm-quant[torchao]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from torch_lstm_quant.custom_config import Backend, Converter
from torch_lstm_quant.float_lstms import FLOAT_LSTMS
from torch_lstm_quant.observed import OBSERVED_LSTMS, Observed, ObservedLSTMCell, observe
from torch_lstm_quant.qconfig import LSTMQConfig, check_qconfig
from torch_lstm_quant.stages import what_was_found

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError("torch_lstm_quant.torchao needs torchao: pip install torch-lstm-quant[torchao]") from error

_LSTMS = (*FLOAT_LSTMS, *OBSERVED_LSTMS)


@dataclass
class LSTMConfig(AOBaseConfig):  # type: ignore[misc]
    """What ``quantize_`` does to LSTMs and LSTM cells, also as a value of torchao's ``FqnToConfig``.

    An LSTM that the model holds under two names becomes two, each calibrated by its own calls, since ``quantize_`` takes every
    name by itself.

    Args:
        qconfig: how to quantize, for ``step="prepare"``: ``LSTMQConfig.int8()`` if None; one with ``qat=True`` to train.
        step: ``"prepare"`` puts an observer or fake quantize at every part of an ``nn.LSTM`` or ``nn.LSTMCell``; ``"convert"``
            makes fused ones of those that were prepared, and have since run or been trained.
        backend: for ``step="convert"``, ``"fused"`` or ``"reference"``, as for :func:`torch_lstm_quant.convert`.

    Raises:
        ValueError: another step or backend, or a ``qconfig`` for ``"convert"``; in ``quantize_``, an LSTM that cannot be
            quantized or never ran.
        TypeError: ``qconfig`` of another type; in ``quantize_``, a module that this step is not for.
    """

    qconfig: LSTMQConfig | None = None
    step: Literal["prepare", "convert"] = "prepare"
    backend: Backend = "fused"

    def __post_init__(self) -> None:
        Converter(self.backend)
        if self.step not in ("prepare", "convert"):
            raise ValueError(f"step must be 'prepare' or 'convert', got {self.step!r}")
        if self.qconfig is not None:
            check_qconfig(self.qconfig, "qconfig")
        if self.qconfig is not None and self.step == "convert":
            raise ValueError("qconfig must be None for step='convert', which takes what was prepared, got one: leave it out")


def is_lstm(module: nn.Module, fqn: str) -> bool:
    """The ``filter_fn`` for :class:`LSTMConfig`: float LSTMs and LSTM cells, and prepared ones, all that a model has.

    For some of them alone pass another, such as ``lambda module, fqn: fqn == "encoder.lstm"``.

    Raises:
        ValueError: the model itself is one, or has none, which ``quantize_`` would leave as it is without a word; or none is
            left to prepare and one never ran. (``quantize_`` replaces one after the other: an error that comes later leaves
            those before it converted.)
    """
    if not fqn:
        _check_model(module)
    return isinstance(module, _LSTMS)


def _check_model(model: nn.Module) -> None:
    """What can be said of a whole model, and done for it, before any of its modules is replaced."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, _LSTMS)}
    if not found:
        raise ValueError(f"the model must contain an LSTM that is float or was prepared: {what_was_found(model)}")
    if "" in found:
        raise ValueError(
            f"quantize_ replaces modules within a model, got a bare {type(model).__name__}: put it into a module, or use "
            "torch_lstm_quant.quantize"
        )
    observed = {path: module for path, module in found.items() if isinstance(module, OBSERVED_LSTMS)}
    _name(observed)
    idle = [module.where for module in observed.values() if not module.calls]
    if idle and len(observed) == len(found):
        raise ValueError(
            f"every LSTM of the model was prepared, but {', '.join(idle)} never ran: call the model on calibration data "
            "before converting it, or prepare it with a filter_fn that leaves out what no input reaches"
        )


def _name(observed: dict[str, Observed]) -> None:
    """By paths, for messages: what replaces them is told nothing but the module."""
    for path, module in observed.items():
        module.where = f"{'LSTMCell' if isinstance(module, ObservedLSTMCell) else 'LSTM'} {path!r}"


@register_quantize_module_handler(LSTMConfig)  # type: ignore[untyped-decorator]
def _replacement(module: nn.Module, config: LSTMConfig) -> nn.Module:
    if config.step == "prepare" and isinstance(module, FLOAT_LSTMS):
        return observe(module, config.qconfig or LSTMQConfig.int8())
    if config.step == "convert" and isinstance(module, OBSERVED_LSTMS):
        return Converter(config.backend).from_observed(module)
    needed = "a float nn.LSTM or nn.LSTMCell" if config.step == "prepare" else "an LSTM that was prepared"
    raise TypeError(
        f"step={config.step!r} needed {needed}, got {type(module).__name__}: call quantize_ with "
        "filter_fn=torch_lstm_quant.torchao.is_lstm, first to prepare and then to convert"
    )
