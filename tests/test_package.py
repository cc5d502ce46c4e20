"""The package as a whole: what importing needs, what is public, what the documents say, what an sdist holds."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

import torch_lstm_quant as tlq
from torch_lstm_quant import ops
from torch_lstm_quant.qconfig import LSTMQConfig
from torch_lstm_quant.qparams import PARTS, WEIGHTS

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, to build in."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_SOURCES))


def test_importing_needs_only_torch_and_says_nothing() -> None:
    names = ["tqdm", "matplotlib", "hypothesis", "pytest", "onnx", "onnxscript", "onnxruntime"]
    hidden = f"import sys, torch; sys.modules |= dict.fromkeys({names}); "
    done = run("-W", "error", "-c", hidden + "import torch_lstm_quant")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_module_prints_what_a_bug_report_needs() -> None:
    done = run("-m", "torch_lstm_quant")
    assert done.returncode == 0, done.stderr
    for line in (
        rf"torch_lstm_quant +{re.escape(version('torch_lstm_quant'))}",
        "torch +2",
        "ISA active +[a-z]",
        r"threads +\d",
    ):
        assert re.search(line, done.stdout), done.stdout


def test_the_module_says_where_the_operators_are() -> None:
    done = run("-m", "torch_lstm_quant", "--library")
    assert (done.returncode, done.stdout) == (0, f"{ops.library_path()}\n"), done.stderr


def test_the_module_reports_a_wrong_isa_among_the_rest() -> None:
    done = run("-m", "torch_lstm_quant", TORCH_LSTM_QUANT_ISA="avx9")
    assert done.returncode == 0, done.stderr
    assert re.search(r"ISA active +none: TORCH_LSTM_QUANT_ISA must be one of .*scalar.*, got 'avx9'\nthreads", done.stdout)


@pytest.mark.parametrize("name", tlq.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(tlq, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        methods = [m for m, value in vars(thing).items() if inspect.isfunction(value) and not m.startswith("_")]
        assert all(inspect.getdoc(getattr(thing, method)) for method in methods)


@pytest.mark.parametrize("page", ["README.md", "docs/audit.md", "docs/export.md", "docs/numerics.md"])
def test_the_examples_of_a_page_run(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    done = run("-c", "\n".join(blocks), cwd=tmp_path, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_the_numerics_page_names_every_part_and_preset() -> None:
    page = (ROOT / "docs/numerics.md").read_text()
    presets = [name for name, value in vars(LSTMQConfig).items() if isinstance(value, staticmethod)]
    assert len(presets) == 4
    for name in (*PARTS, *WEIGHTS, *(f"{preset}()" for preset in presets)):
        assert f"`{name}`" in page, name


def test_the_architecture_page_names_every_module_and_no_other() -> None:
    page = (ROOT / "DEVELOPERS.md").read_text()
    modules = {path.name for path in (ROOT / "torch_lstm_quant").glob("[!_]*.py")}
    assert set(re.findall(r"`(\w+\.py)`", page)) == modules


def test_documents_link_to_files_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text())]
    assert links
    for path, link in links:
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_an_sdist_holds_all_that_a_build_needs(checkout: Path, tmp_path: Path) -> None:
    done = run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    needed = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "torch_lstm_quant").glob("*.py"), ROOT / "torch_lstm_quant/py.typed"]
    assert {str(path.relative_to(ROOT)) for path in needed} | {"setup.py", "LICENSE", "README.md"} <= held


def test_without_a_compiler_the_build_says_what_to_install(checkout: Path) -> None:
    done = run("setup.py", "-q", "build_ext", cwd=checkout, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "g++" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
