"""The calls a user makes: ``quantize``, or its steps ``prepare`` (or ``prepare_qat``) and ``convert``.

They swap the LSTMs of a model one by one and leave everything else as it is, so they work for models that FX cannot trace.
For models that are quantized as a whole, ``custom_config`` has what ``prepare_fx`` and ``convert_fx`` need.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.utils.rnn import PackedSequence

from torch_lstm_quant.custom_config import Converter, check_backend
from torch_lstm_quant.float_lstms import FLOAT_LSTMS, FloatLSTM
from torch_lstm_quant.observed import OBSERVED_LSTMS, Observed, observe, observers_of
from torch_lstm_quant.observed_by_torch import is_observed_by_torch
from torch_lstm_quant.qconfig import LSTMQConfig, check_qconfig
from torch_lstm_quant.stages import what_was_found

QConfigs = LSTMQConfig | Mapping[str | type[FloatLSTM], LSTMQConfig | None]
"""One configuration for every LSTM and LSTM cell, or some by module path or class: a path wins, "" is for the rest."""


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    qconfig: QConfigs | None = None,
    backend: str = "fused",
    *,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of ``model`` in which every ``nn.LSTM`` and ``nn.LSTMCell`` is quantized, calibrated; in eval mode.

    Args:
        model: any module on the CPU, traceable or not; an ``nn.LSTM`` or ``nn.LSTMCell`` too. It is left as it is.
        calibration_batches: typical inputs: a tensor is passed to the model as it is, a tuple or list as its arguments, a
            dict as its keyword arguments. Ten batches or so that cover the range of real use are enough.
        qconfig: how to quantize; ``LSTMQConfig.int8()`` if None. A mapping from module paths or classes to configurations
            (None: stays float) tells LSTMs apart; those that no key names stay float, unless "" gives them one.
        backend: ``"fused"`` for the kernel, ``"reference"`` for graphs of explicit quantize and dequantize ops.
        progress: show a progress bar; None: in a terminal, when calibration takes longer than two seconds. Needs tqdm.

    Raises:
        ValueError: no LSTM, no batch, an LSTM that no batch reached, NaN or infinities in its inputs, an unknown backend.
        TypeError: a model, configuration or calibration of the wrong type.
        ImportError: ``progress=True`` without tqdm.
    """
    check_backend(backend)  # an error now, not after the calibration
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_batches(calibration_batches)
    prepared = prepare(model, qconfig).eval()
    count = 0
    with torch.no_grad():
        for batch in _with_progress(calibration_batches, progress):
            _call(prepared, batch)
            count += 1
    if not count:
        raise ValueError("calibration_batches must hold at least one batch, got none (an iterator that was used up?)")
    return convert(prepared, backend)


def prepare(model: nn.Module, qconfig: QConfigs | None = None) -> nn.Module:
    """A copy of ``model`` with an observer or fake quantize at every part of its LSTMs and LSTM cells.

    ::

        prepared = prepare(model).eval()
        for batch in calibration_batches:
            prepared(batch)
        quantized = convert(prepared)

    The copy is in the mode of ``model``, as torch.ao's is: without ``eval()`` dropout and batch norm act as in training
    while it calibrates. (With a ``qat=True`` configuration it can be trained: see :func:`prepare_qat`.)

    Args:
        model, qconfig: as for :func:`quantize`.

    Raises:
        ValueError: no LSTM to quantize, a key of ``qconfig`` that matches none, an LSTM that cannot be quantized.
        TypeError: a configuration of the wrong type.
    """
    choose = _chooser(model, LSTMQConfig.int8() if qconfig is None else qconfig)

    def observed(path: str, module: nn.Module) -> nn.Module | None:
        config = choose(path, module)
        return observe(module, config, path) if config else None

    return _swap(model, lambda module: isinstance(module, FLOAT_LSTMS), "LSTM or LSTMCell", observed)


def prepare_qat(model: nn.Module, qconfig: QConfigs | None = None) -> nn.Module:
    """A copy of ``model``, in training mode, that computes with the rounding of its quantized form, for training on.

    ::

        prepared = prepare_qat(model, LSTMQConfig.int8(qat=True))
        ...  # show it some batches, in training mode or not, then train it as any model
        quantized = convert(prepared.eval())

    torch.ao's switches work: ``prepared.apply(torch.ao.quantization.disable_observer)`` keeps the ranges as they are,
    ``disable_fake_quant`` leaves out the rounding. Steps are taken one by one in Python: it is for a short finish.

    Args:
        model: as for :func:`quantize`.
        qconfig: as for :func:`quantize`, with fake quantizes where that has observers; ``LSTMQConfig.int8(qat=True)`` if None.

    Raises:
        ValueError, TypeError: as :func:`prepare`; a part with an observer, which would be trained without rounding.
    """
    prepared = prepare(model, LSTMQConfig.int8(qat=True) if qconfig is None else qconfig)
    for module in prepared.modules():
        if isinstance(module, OBSERVED_LSTMS):
            _check_fake_quantizes(module)
    return prepared.train()


def _check_fake_quantizes(observed: Observed) -> None:
    for name, observer in observers_of(observed):
        if not isinstance(observer, FakeQuantizeBase):
            raise ValueError(
                f"{observed.where}: a part must have a fake quantize or nothing to be trained with its rounding, got "
                f"{type(observer).__name__} at {name}: use a preset with qat=True, or FakeQuantize.with_args(observer=...)"
            )


def convert(model: nn.Module, backend: str = "fused") -> nn.Module:
    """A copy of a prepared and calibrated ``model`` with its observed LSTMs converted; all else keeps its mode, train or eval.

    Args:
        model: what :func:`prepare` gave, run on calibration data or trained; or a model in which torch.ao's flow, or a
            subclass of the user's own, has put an observed ``torch.ao.nn.quantizable.LSTM``. What takes the place of that
            takes quantized tensors, as it would in torch.ao's flow, and float32 too.
        backend: as for :func:`quantize`.

    Raises:
        ValueError: no observed LSTM, one that never ran or cannot be converted, an unknown backend.
    """
    converter = Converter(backend)

    def is_observed(module: nn.Module) -> bool:
        return isinstance(module, OBSERVED_LSTMS) or is_observed_by_torch(module)

    def converted(path: str, module: nn.Module) -> nn.Module:
        return converter.from_observed(module, path)  # type: ignore[arg-type]

    wanted = "ObservedLSTM or ObservedLSTMCell, or an observed torch.ao.nn.quantizable.LSTM"
    return _swap(model, is_observed, wanted, converted)


def _swap(
    model: nn.Module,
    is_wanted: Callable[[nn.Module], bool],
    wanted: str,
    replace: Callable[[str, nn.Module], nn.Module | None],
) -> nn.Module:
    """A copy of ``model`` with what ``replace`` gives for each wanted module, where that is not None."""
    found = {module: path for path, module in model.named_modules() if is_wanted(module)}
    if not found:
        raise ValueError(f"the model must contain a module of class {wanted}: {what_was_found(model)}")
    swapped = {module: replace(path, module) for module, path in found.items()}
    # what is replaced need not be copied: deepcopy takes the replacements as the copies that it has already made
    return copy.deepcopy(model, {id(module): new for module, new in swapped.items() if new is not None})


def _chooser(model: nn.Module, qconfig: QConfigs) -> Callable[[str, nn.Module], LSTMQConfig | None]:
    """A function from an LSTM's path and module to its configuration."""
    if not isinstance(qconfig, Mapping):
        config = check_qconfig(qconfig, "qconfig", "an LSTMQConfig or a mapping of them")
        return lambda path, module: config
    lstms = {path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, FLOAT_LSTMS)}
    for key, value in qconfig.items():
        if value is not None:
            check_qconfig(value, f"qconfig[{key!r}]", "an LSTMQConfig or None (stays float)")
        matches = key == "" or key in lstms or (isinstance(key, type) and any(isinstance(m, key) for m in lstms.values()))
        if not matches:
            raise ValueError(f"qconfig names {key!r}, which is no LSTM of the model: it has {', '.join(map(repr, lstms))}")
    named: dict[nn.Module, str] = {}
    for path, module in lstms.items():
        if path in qconfig and qconfig[named.setdefault(module, path)] is not qconfig[path]:
            raise ValueError(
                f"qconfig must have one configuration for an LSTM, got two for that of {named[module]!r} and {path!r}: "
                "name one path, or give both the same"
            )
    by_path = {module: qconfig[path] for module, path in named.items()}

    def choose(path: str, module: nn.Module) -> LSTMQConfig | None:
        if module in by_path:
            return by_path[module]
        kinds = [kind for kind in type(module).__mro__ if kind in qconfig]
        return qconfig[kinds[0]] if kinds else qconfig.get("")

    if lstms and not any(choose(path, module) for path, module in lstms.items()):
        raise ValueError(f"qconfig must quantize at least one LSTM, got no configuration for {', '.join(map(repr, lstms))}")
    return choose


def _check_batches(batches: object) -> None:
    """A single batch can often be iterated over too, but along its first dimension, or over its keys."""
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, (Tensor, Mapping, str)) or not iterable:
        raise TypeError(
            f"calibration_batches must be an iterable of batches, got {type(batches).__name__}: "
            "put a single batch into a list, [batch]"
        )


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        try:
            model(*batch)
        except TypeError as error:
            _check_arguments(model, batch, error)
            raise
    else:
        model(batch)


def _check_arguments(model: nn.Module, batch: Sequence[Any], error: TypeError) -> None:
    """Say what a batch is where ``error`` came of a number of arguments that the model does not take."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a forward that is not Python's
        return
    try:
        signature.bind(*batch)
    except TypeError:
        names = ", ".join(signature.parameters)
        raise TypeError(
            f"a batch that is a tuple or list holds the model's arguments, ({names}), got {len(batch)}: of a loader's "
            "(input, label) pairs pass the inputs alone, (x for x, label in loader); put one argument that is a tuple into "
            "another, (argument,)"
        ) from error


def _with_progress(batches: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    if progress is False:
        return batches
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        return batches
    hidden_unless_terminal = None if progress is None else False
    delay = 0 if progress else 2
    bar: Iterable[Any] = tqdm(batches, desc="calibrating", unit="batch", delay=delay, disable=hidden_unless_terminal)
    return bar
