"""Weights that are read while they are converted: the same numbers, a lower peak, and nothing left in the file."""

from __future__ import annotations

import pytest
import torch
from conftest import logits_of, make_tiny
from safetensors.torch import load_file, save_file
from test_models import write_gguf
from test_worker import job
from transformers import LlamaConfig, LlamaForCausalLM

import benchmark
import models
import streaming
from fitting import calibration, calibration_cache
from fitting.form_cache import StoredForms
from inference import Inference
from kernels.int8_modules import Int8Linear
from models import find_model, load_model
from optimizations import int4, mixed_precision, quantization
from streaming import UnreadWeight, read_weights, streams, takes_unread
from worker import WorkerProcess, _Worker

CALIBRATION = torch.randint(1, 97, (2, 64), generator=torch.Generator().manual_seed(1))
RECIPES = [
    *((quantization, {"scheme": scheme, "smoothing": 0.0, "group_size": 32}) for scheme in quantization.SCHEMES[:-1]),
    (quantization, {"scheme": "classic"}),
    (quantization, {"scheme": "dynamic", "smoothing": 0.5}),
    (quantization, {"scheme": "weight-only", "granularity": "tensor"}),
    (quantization, {"scheme": "grouped", "embeddings": "float"}),
    (int4, {"rounding": "nearest", "int8_layers": "lm_head,o_proj,embed_tokens"}),
    (int4, {"rounding": "gptq", "int8_layers": "none"}),
    (mixed_precision, {}),
    (mixed_precision, {"untie": True}),
]
FEW_RECIPES = [RECIPES[0], (int4, {"rounding": "nearest", "int8_layers": "none"}), (mixed_precision, {})]


def source_of(kind, tied, tmp_path, monkeypatch):
    if kind == "gguf":
        return find_model(str(write_gguf(make_tiny("three_a_group", tied=tied), tmp_path / "tiny.gguf")))
    if kind == "folder":
        make_tiny("three_a_group", tied=tied).save_pretrained(tmp_path / "tiny")
        return find_model(str(tmp_path / "tiny"))
    shape = dict(make_tiny("three_a_group", tied=tied).config.to_dict())
    monkeypatch.setattr(models, "TINYLLAMA_SHAPE", {key: shape[key] for key in [*models.TINYLLAMA_SHAPE, "head_dim"]})
    return find_model("tinyllama-random")


@pytest.fixture(autouse=True)
def calibrated(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration_cache, "ROOT", tmp_path / "cache")
    for module in (calibration, quantization):
        monkeypatch.setattr(module, "calibration_ids", lambda model, **_: CALIBRATION)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["folder", "gguf", "random"])
def test_the_same_bits_as_load_then_apply(kind, tied, tmp_path, monkeypatch):
    """Every technique that streams, in all its forms (from a folder; a few from elsewhere), in blocks of 16 rows against
    whole matrices."""
    source = source_of(kind, tied, tmp_path, monkeypatch)
    for technique, options in RECIPES if kind == "folder" else FEW_RECIPES:
        # Random numbers depend on the blocks: there both sides have the small ones.
        monkeypatch.setattr(streaming, "BLOCK_WEIGHTS", 1 if kind == "random" else 1 << 17)
        whole = benchmark.stored_tensors(technique.apply(load_model(source), **options))
        monkeypatch.setattr(streaming, "BLOCK_WEIGHTS", 1)
        assert takes_unread(technique.apply)
        model = technique.apply(load_model(source, read=False), **options)
        assert not any(isinstance(parameter, UnreadWeight) or parameter.is_meta for parameter in model.parameters())
        tensors = benchmark.stored_tensors(model)
        assert tensors.keys() == whole.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole[name]), (options, name)


@pytest.mark.parametrize("tied", [False, True])
def test_int4_found_before_reads_no_matrix_whole(tied, tmp_path, monkeypatch, ids):
    """What calibration found is known by the weights in their file, too, and taken from the cache block by block."""
    source, options = source_of("folder", tied, tmp_path, monkeypatch), {"group_size": 32, "max_bits": 6.5}
    first = int4.apply(load_model(source), **options)
    for needs_the_floats in ("read_weights", "loss_increases", "round_blockwise", "tune"):
        monkeypatch.setattr(int4, needs_the_floats, None)
    monkeypatch.setattr(StoredForms, "__getitem__", None)
    again = int4.apply(load_model(source, read=False), **options)
    assert again.notes == first.notes and torch.equal(logits_of(again, ids), logits_of(first, ids))


def test_int4_tunes_what_an_earlier_run_had_rounded(tmp_path, monkeypatch, ids):
    """Stopped before its tuning was kept, a run goes on with the rounded layers on disk; some are int8 and not among them."""
    source, options = source_of("folder", False, tmp_path, monkeypatch), {"group_size": 32, "max_bits": 6.5}
    first = int4.apply(load_model(source), **options)
    for kept in calibration_cache.ROOT.glob("*/tuned.safetensors"):
        kept.unlink()
    monkeypatch.setattr(int4, "round_blockwise", None)
    again = int4.apply(load_model(source, read=False), **options)
    assert any(isinstance(module, Int8Linear) for module in again.modules())
    assert again.notes == first.notes and torch.equal(logits_of(again, ids), logits_of(first, ids))


@pytest.mark.parametrize("tied", [False, True])
def test_reading_later_is_reading(tied, tmp_path, monkeypatch, ids):
    source = source_of("folder", tied, tmp_path, monkeypatch)
    model = load_model(source, read=False)
    assert logits_of(model, ids).isnan().all(), "who forgets to read must see it"
    read_weights(model)
    assert torch.equal(logits_of(model, ids), logits_of(load_model(source), ids))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_only_techniques_that_ask_get_unread_weights(tiny_folder, monkeypatch):
    seen = []

    def plain(model):
        seen.append(any(isinstance(parameter, UnreadWeight) for parameter in model.parameters()))
        return model

    @streams
    def streaming_one(model):
        return plain(model)

    monkeypatch.setattr(models, "load_tokenizer", lambda source: None)
    for technique in (plain, streaming_one):
        type("Probe", (Inference,), {"apply": staticmethod(technique)})(model=str(tiny_folder), device="cpu")
    assert seen == [False, True]


@pytest.mark.parametrize("steps", [[], ["head_pruning", "quantization"], ["quantization", "lean_decode"]])
def test_recipes_end_with_everything_read(steps, tiny_folder, tmp_path):
    """Whatever comes first: a worker's model has its numbers, and no step meets another's unread weights."""
    worker = _Worker(job(find_model(str(tiny_folder)), tmp_path, [(technique, {}) for technique in steps]))
    worker.load()
    assert torch.isfinite(logits_of(worker.model, CALIBRATION)).all()


def test_random_rows_can_be_read_in_any_order(tmp_path, monkeypatch):
    source = source_of("random", False, tmp_path, monkeypatch)
    monkeypatch.setattr(streaming, "BLOCK_WEIGHTS", 1)
    unread, table = (load_model(source, read=read).lm_head.weight for read in (False, True))
    assert torch.equal(unread.read(48, 80), table[48:80]) and not torch.equal(table[0:16], table[16:32])
    assert abs(table.std() / 0.02 - 1) < 0.05 and abs(table.mean()) < 0.001


def test_shards_are_found(tmp_path, ids):
    model = make_tiny()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(find_model(str(tmp_path))), ids), logits_of(model, ids))


@pytest.mark.parametrize(("name", "tensor", "complaint"), [
    ("model.norm.bias", torch.zeros(64), "no place"),
    ("model.norm.weight", None, "missing"),
    ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64, dtype=torch.int8), "I8"),
    ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 128), "shape"),
])  # fmt: skip
def test_files_that_are_no_such_model(name, tensor, complaint, tiny_folder):
    """What does not fit is named in one sentence: nothing is left out and nothing made up."""
    tensors = load_file(tiny_folder / "model.safetensors") | ({} if tensor is None else {name: tensor})
    if tensor is None:
        del tensors[name]
    save_file(tensors, tiny_folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"--model tiny: .*{name}") as error:
        load_model(find_model(str(tiny_folder)))
    assert complaint in str(error.value)


def test_the_peak_is_that_of_the_small_model(tmp_path):
    """100 million weights, 400 MB in float32, a quarter of that in int8: the load never needs a third more than int8 does."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2560, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=4, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    with WorkerProcess(job(find_model(str(tmp_path / "model")), tmp_path, [("quantization", {})])) as worker:
        loaded, memory = worker.call("load"), worker.call("memory")
    weights_mb, phases = loaded["weights_mb"], memory["memory_phases"]
    assert loaded["parameters"] > 95e6 and weights_mb < 110
    assert 0.9 * weights_mb < loaded["load_peak_memory_mb"] < 1.3 * weights_mb
    assert 0.9 * weights_mb < memory["peak_memory_mb"] < 2 * weights_mb, "neither with the runtime nor less it twice"
    assert memory["peak_memory_mb"] == max(phases["prefill_peak_mb"], phases["decode_peak_mb"])
