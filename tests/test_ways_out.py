"""Every call form by every way out gives the fused module's bits, or there is a reason: the table in docs/ways_out.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ways_out import EXCEPTIONS, REASONS, WAYS, WAYS_TOGETHER, Run, Together, table, tensors
from ways_out_forms import FORMS, Form, Model, float_model, fused_model, reference_model

DOCUMENT = Path(__file__).parents[1] / "docs/ways_out.md"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


def assert_same(got: Any, want: Any) -> None:
    got, want = tensors(got), tensors(want)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


def call(run: Run, form: Form, sizes: tuple[int, int]) -> Any:
    with form.context():
        return run(*form.inputs(*sizes))


def call_all(way: str, model: Model, form: Form) -> list[Any]:
    run = WAYS[way](model, form)
    return [call(run, form, sizes) for sizes in form.sizes]


def exceptions(name: str) -> dict[str, str]:
    return EXCEPTIONS.get(name, {})


@pytest.mark.parametrize("name", [name for name in FORMS if "eager" not in exceptions(name)])
def test_a_form_by_each_way(name: str) -> None:
    form, model = FORMS[name], fused_model(name)
    want = [call(model, form, sizes) for sizes in form.sizes]
    assert_same(want, [call(reference_model(model), form, sizes) for sizes in form.sizes])
    assert any(float(value.std()) > 0.01 for value in tensors(want))
    for way in WAYS:
        if way in exceptions(name):
            assert_reason(name, way, model)
        else:
            assert_same(call_all(way, model, form), want)


def assert_reason(name: str, way: str, model: Model) -> None:
    """That the way fails as the table says; for a reason of torch's, that it does with the float module too."""
    reason = REASONS[exceptions(name)[way]]
    with pytest.raises(Exception, match=reason.error):
        call_all(way, model, FORMS[name])
    if reason.torchs is not None:
        with pytest.raises(Exception, match=reason.torchs):
            call_all(way, float_model(name), FORMS[name])


def test_a_call_that_nn_lstm_refuses() -> None:
    name = "LSTM: no steps (T=0)"
    form, model = FORMS[name], fused_model(name)
    assert set(exceptions(name).values()) == {"no steps"}
    assert_reason(name, "eager", model)
    for way in ("export", "export strict", "jit.trace", "Stream"):
        output, (h, c) = call_all(way, model, form)[1]
        assert (output.shape, h.shape, c.shape) == ((0, 3, 8), (1, 3, 8), (1, 3, 8))


def test_compiled_by_inductor() -> None:
    names = ["LSTM: states given", "LSTM: lengths=", "LSTMCell: states given"]
    model = Together(names, [fused_model(name) for name in names])
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, dynamic=True)
    for other in (None, 0, 1, 2):
        with torch.no_grad():
            assert_same(run(model.inputs(other)), model(model.inputs(other)))


@pytest.mark.parametrize("way", WAYS_TOGETHER)
def test_the_forms_together(way: str, tmp_path: Path) -> None:
    names = [name for name in FORMS if way not in exceptions(name)]
    model = Together(names, [fused_model(name) for name in names])
    run = WAYS_TOGETHER[way](model, tmp_path)
    for i, name in enumerate(names):
        with torch.no_grad(), FORMS[name].context():
            for other in (None, i):
                assert_same(run(model.inputs(other)), model(model.inputs(other)))


def test_what_can_be_exported_but_not_written_to_onnx(tmp_path: Path) -> None:
    names = [name for name in FORMS if exceptions(name).get("ONNX") != exceptions(name).get("export")]
    assert names
    for name in names:
        with pytest.raises(Exception, match=REASONS[exceptions(name)["ONNX"]].error):
            WAYS_TOGETHER["ONNX"](Together([name], [fused_model(name)]), tmp_path)


def test_the_document_has_the_table() -> None:
    _, _, rest = DOCUMENT.read_text().partition("\n\n| `LSTM` |")
    assert "| `LSTM` |" + rest == table(), "python tests/ways_out.py prints what it should be"
