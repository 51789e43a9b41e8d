"""The gate in one pass: what it gives, and where it stands."""

import pytest
import torch
from conftest import make_tiny
from transformers.models.llama.modeling_llama import LlamaMLP

from kernels.build import load_kernels
from kernels.gated_mlp import GatedMLP, use_gated_mlps
from models import ModelSource
from optimizations import int4, mixed_precision, quantization


def test_it_gives_what_llamas_gives():
    if reason := load_kernels():
        pytest.skip(reason)
    mlp = make_tiny().model.layers[0].mlp
    for shape in ((1, 1), (2, 5), (1, 300)):
        x = 3 * torch.randn(*shape, mlp.hidden_size)
        torch.testing.assert_close(GatedMLP(mlp)(x), mlp(x))
    x = torch.randn(2, 5, mlp.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(GatedMLP(mlp.double())(x), mlp(x))


@pytest.mark.parametrize("technique", [mixed_precision, quantization, int4])
def test_techniques_with_kernels_use_it(technique, monkeypatch):
    if reason := load_kernels():
        pytest.skip(reason)
    options = {"rounding": "nearest", "int8_layers": "none"} if technique is int4 else {}

    def mlps() -> set[type]:
        model = make_tiny()
        model.source = ModelSource("tiny", "random", "")
        return {type(layer.mlp) for layer in technique.apply(model, **options).model.layers}

    assert mlps() == {GatedMLP}
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
    assert mlps() == {LlamaMLP}


def test_another_activation_is_left_alone():
    model = make_tiny(hidden_act="gelu")
    use_gated_mlps(model)
    assert not any(type(layer.mlp) is GatedMLP for layer in model.model.layers)
