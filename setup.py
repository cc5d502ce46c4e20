"""The C++ extension: two libraries over torch's stable ABI, with no flag for an instruction set (kernels carry their own).

``_C`` has the operators and needs no Python; ``_direct`` is a Python module with a copy of the core of its own.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import Extension, setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: any later torch loads what is built


def check_compiler() -> None:
    """End with one sentence, rather than a traceback, where nothing can compile."""
    compiler = os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"torch_lstm_quant needs a C++17 compiler and found no {compiler}: install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), "
            "or set CXX to yours, and install again"
        )


def extension_arguments() -> dict[str, object]:
    """What setup() needs to build the extension; ends with one sentence where there is no torch to build against."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError:
        sys.exit("torch_lstm_quant is built against torch, which is not installed here: install torch 2.10 or later first")

    bindings = ["csrc/ops.cpp", "csrc/direct.cpp"]
    core = sorted({*glob("csrc/*.cpp"), *glob("csrc/kernels/*.cpp")} - set(bindings))
    headers = sorted([*glob("csrc/*.h"), *glob("csrc/kernels/*.h")])

    class Build(BuildExtension):  # type: ignore[misc]
        """Links the core's objects, which ``_C`` compiles first, into ``_direct`` too."""

        def build_extensions(self) -> None:
            self.parallel = None  # one after the other
            super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            if ext.name == "torch_lstm_quant._direct":
                ext.extra_objects = [os.path.join(self.build_temp, os.path.splitext(source)[0] + ".o") for source in core]
            super().build_extension(ext)

    def extension(name: str, sources: list[str]) -> Extension:
        return CppExtension(
            f"torch_lstm_quant.{name}",
            sources,
            include_dirs=[os.path.abspath("csrc")],
            depends=[*headers, *core],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            # every operation rounds on its own, the same on every machine: no contraction to fused multiply-adds
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"],
            py_limited_api=True,  # any Python from 3.10 on loads what is built
        )

    extensions = [extension("_C", [bindings[0], *core]), extension("_direct", [bindings[1]])]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


builds = any(command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "develop", "install"))
if builds:
    check_compiler()
setup(
    **(extension_arguments() if builds else {}),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
