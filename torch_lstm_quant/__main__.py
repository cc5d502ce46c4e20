"""``python -m torch_lstm_quant``: what a bug report needs to say of the machine and the installation.

With ``--library``: only where the compiled operators are, for C++ programs that load them.
"""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version

import torch

from torch_lstm_quant import ops


def main() -> None:
    """Print versions, instruction sets and threads, or the path that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m torch_lstm_quant", description="versions, instruction sets and threads")
    parser.add_argument("--library", action="store_true", help="print only the path of the compiled operators")
    if parser.parse_args().library:
        print(ops.library_path())
        return
    rows = {
        "torch_lstm_quant": version("torch_lstm_quant"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "ISAs built": ", ".join(ops.isas_built()),
        "ISAs usable here": ", ".join(ops.isas_usable()),
        "ISA active": _isa_active(),
        "threads": torch.get_num_threads(),
    }
    for name, value in rows.items():
        print(f"{name:<18}{value}")


def _isa_active() -> str:
    try:
        return ops.isa_active()
    except RuntimeError as error:  # TORCH_LSTM_QUANT_ISA forces one that is not there: the report is to say so, not to end
        return f"none: {error}"


if __name__ == "__main__":
    main()
