"""torch.ao's individually observed LSTM, lowered to a fused kernel that computes it in integers, exactly and fast."""

from torch_lstm_quant.audit import Audit, AuditedCell, AuditedModule, audit
from torch_lstm_quant.custom_config import backend_config, convert_custom_config, prepare_custom_config, qconfig_mapping
from torch_lstm_quant.firmware import export_qparams
from torch_lstm_quant.from_float import from_float
from torch_lstm_quant.lowering import lower
from torch_lstm_quant.modules import LSTM, LSTMCell
from torch_lstm_quant.onnx_export import export_onnx
from torch_lstm_quant.onnx_translation import onnx_translation_table
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.qparams import CellQParams, QParams, WeightQParams
from torch_lstm_quant.quantize_fx import convert, prepare, prepare_qat, quantize
from torch_lstm_quant.signal_loss import LossWarning
from torch_lstm_quant.stream import Stream

__all__ = [
    "LSTM",
    "Audit",
    "AuditedCell",
    "AuditedModule",
    "CellQParams",
    "LSTMCell",
    "LSTMQConfig",
    "LossWarning",
    "QParams",
    "Stream",
    "WeightQParams",
    "audit",
    "backend_config",
    "convert",
    "convert_custom_config",
    "export_onnx",
    "export_qparams",
    "from_float",
    "lower",
    "onnx_translation_table",
    "prepare",
    "prepare_custom_config",
    "prepare_qat",
    "qconfig_mapping",
    "quantize",
]
