"""Finding and loading models: every wrong `--model` is one sentence, every source gives the weights it holds."""

import copy
import functools
import hashlib
import json
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from conftest import logits_of
from pipeline_model import save_tiny_model
from transformers import AutoTokenizer, LlamaConfig

import gguf_model
import models
import texts
from models import ModelSource, find_model, load_config, load_model


def one_sentence(error):
    """The message a user reads: a single line, not a traceback or a list of them."""
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def write_gguf(model, path, *, architecture="llama", without=(), **metadata):
    """Write `model` as llama.cpp's convert_hf_to_gguf.py does, rotary row order included, in float32.

    `without` names tensors to leave out; `metadata` holds further fields with `_` (or, where a name has some, `__`) for `.`.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key.replace("__", ".") if "__" in key else key.replace("_", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if ".q_proj." in name:
            values = converter_permute(values, config.num_attention_heads)
        elif ".k_proj." in name:
            values = converter_permute(values, config.num_key_value_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name not in without:
            writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converter_permute(weight, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, copied: what any GGUF of a Llama has gone through."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# What is wrong with --model


def test_unknown_name():
    """A name that is nothing at all: the sentence lists what there is."""
    with pytest.raises(ValueError, match="--model tinylama") as error:
        find_model("tinylama")
    message = one_sentence(error)
    assert all(name in message for name in models.NAMED_MODELS)


@pytest.mark.parametrize("name", ["no/such/file.gguf", "missing.gguf", "./nowhere", "/nowhere/at/all"])
def test_missing_file(name):
    """A path that does not exist is not taken for a Hub id."""
    with pytest.raises(ValueError, match="--model") as error:
        find_model(name)
    assert name in one_sentence(error)


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="--model") as error:
        find_model(str(tmp_path))
    assert "config.json" in one_sentence(error)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip, say a pickle of torch"])
def test_file_that_is_no_gguf(tmp_path, content):
    """Whatever the file is called, it is judged by its first bytes and never unpickled."""
    for name in ("model.gguf", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"--model .*GGUF") as error:
            find_model(str(tmp_path / name))
        one_sentence(error)


@pytest.mark.parametrize("keep", [4, 10, 24, 200, 3000])
def test_gguf_cut_in_its_header(tmp_path, tiny, keep):
    """A download that broke off among the metadata."""
    whole = write_gguf(tiny(), tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"--model cut.gguf") as error:
        find_model(str(tmp_path / "cut.gguf"))
    assert "truncated" in one_sentence(error)


@pytest.mark.parametrize("missing_bytes", [1, 5000, 100_000])
def test_gguf_cut_in_its_data(tmp_path, tiny, missing_bytes):
    """A download that broke off among the tensors: the header is whole, the weights are not."""
    whole = write_gguf(tiny(), tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-missing_bytes])
    with pytest.raises(ValueError, match=r"--model cut.gguf") as error:
        find_model(str(tmp_path / "cut.gguf"))
    assert "truncated" in one_sentence(error)


@pytest.mark.embedded
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_embedded_gguf_cut(tmp_path, embedded_source, share):
    """The real file cut in its first metadata, in its vocabulary, in its tensors and just before its end."""
    from pathlib import Path

    whole = Path(embedded_source.location)
    size = int(whole.stat().st_size * share)
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as source, cut.open("wb") as target:
        target.write(source.read(size))
    with pytest.raises(ValueError, match=r"--model cut.gguf") as error:
        find_model(str(cut))
    assert "truncated" in one_sentence(error)


def test_gguf_that_may_not_be_read(tmp_path, tiny, monkeypatch):
    """A folder's rights are the user's to mend: a sentence, not a traceback. (Who tests as root may read anything.)"""
    write_gguf(tiny("grouped"), path := tmp_path / "model.gguf")

    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(ValueError, match=r"--model model\.gguf: cannot be read") as error:
        load_config(ModelSource("model", "gguf", str(path)))
    assert one_sentence(error)


@pytest.mark.parametrize("changed", [{"num_attention_heads": 0}, {"hidden_size": 63}])
def test_gguf_whose_metadata_fit_no_llama(tmp_path, tiny, changed, monkeypatch):
    """No head at all, or a width that its heads do not divide, where the file does not say how wide a head is."""
    monkeypatch.setitem(globals(), "converter_permute", lambda weight, _heads: weight)  # nor does it divide by none
    model = tiny("grouped")
    for name, value in changed.items():
        setattr(model.config, name, value)
    if "hidden_size" in changed:
        model.config.head_dim = 0
    write_gguf(model, path := tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"--model model\.gguf: no Llama has") as error:
        load_config(ModelSource("model", "gguf", str(path)))
    assert one_sentence(error)


def test_gguf_of_another_architecture(tmp_path, tiny):
    path = write_gguf(tiny(), tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match=r"--model other.gguf.*qwen2") as error:
        find_model(str(path))
    one_sentence(error)


@pytest.mark.parametrize("scaling", [
    {"llama_rope_scaling_type": "yarn"}, {"llama_rope_scaling_factor": 4.0}, {"llama__rope__scale_linear": 2.0},
])  # fmt: skip
def test_gguf_with_scaled_rotary_embeddings(tmp_path, tiny, scaling):
    """Llama 3.1 and later scale their angles: loaded as plain, every long text would be wrong without a word."""
    path = write_gguf(tiny(), tmp_path / "scaled.gguf", **scaling)
    with pytest.raises(ValueError, match=r"--model scaled.gguf.*rotary") as error:
        find_model(str(path))
    one_sentence(error)


def test_gguf_with_a_scale_of_one_is_plain(tmp_path, tiny):
    path = write_gguf(tiny(), tmp_path / "plain.gguf", llama_rope_scaling_factor=1.0)
    assert find_model(str(path)).kind == "gguf"


def test_gguf_without_tensors(tmp_path, tiny):
    """llama.cpp's own vocabulary-only files are valid GGUF of architecture llama with nothing to run in them."""
    model = tiny()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    every = {names.get_name(name, try_suffixes=(".weight",)) for name, _ in model.named_parameters()}
    path = write_gguf(model, tmp_path / "vocabulary.gguf", without=every)
    with pytest.raises(ValueError, match=r"--model vocabulary.gguf") as error:
        find_model(str(path))
    one_sentence(error)


def test_gguf_with_a_missing_tensor(tmp_path, tiny):
    """A layer's weight that is not there is named, not left uninitialised."""
    path = write_gguf(tiny(), tmp_path / "gap.gguf", without={"blk.1.ffn_up.weight"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as error:
        load_model(find_model(str(path)))
    one_sentence(error)


@pytest.mark.embedded
def test_the_grid_of_the_embedded_file(embedded_source, tmp_path, tiny):
    write_gguf(tiny("grouped"), path := tmp_path / "model.gguf")
    assert models.rounded_as(embedded_source) == "Q4_1" and models.rounded_as(find_model(str(path))) is None


def test_folder_of_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"--model .*gpt2.*Llama") as error:
        find_model(str(tmp_path))
    one_sentence(error)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model_type": "nothing-known"}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_folder_with_a_broken_config(tmp_path, content):
    """Not JSON, not an object, no architecture in it, or one with a value that is no number."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="--model") as error:
        find_model(str(tmp_path))
    one_sentence(error)


def test_hub_id_offline(tmp_path, monkeypatch):
    """Offline and not cached is said at once, without a socket."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("looked up a host although offline"))
    with pytest.raises(ValueError, match=r"--model someone/some-llama.*HF_HUB_OFFLINE") as error:
        find_model("someone/some-llama")
    one_sentence(error)


def test_folder_without_weights(tmp_path, tiny):
    """A configuration alone is found, since nothing is loaded, and refused in one sentence when it is."""
    tiny().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--model") as error:
        load_model(find_model(str(tmp_path)))
    one_sentence(error)


def test_truncated_safetensors(tiny_folder):
    """A weight file that broke off while it was copied."""
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="--model") as error:
        load_model(find_model(str(tiny_folder)))
    one_sentence(error)


def test_pickled_weights_are_never_read(tmp_path, tiny):
    """A folder that holds only pytorch_model.bin: unpickling can run anything, so it is refused."""
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--model") as error:
        load_model(find_model(str(tmp_path)))
    one_sentence(error)


# What is loaded


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_round_trip(tmp_path, tiny, ids, shape, tied):
    """A model written by the converter's rules and read back answers as the original: rotary rows are undone, for query
    and for KV heads, and a tied table is found again."""
    model = tiny(shape, tied=tied, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=3e-5)
    source = find_model(str(write_gguf(model, tmp_path / "tiny.gguf")))
    loaded = load_model(source)
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    assert loaded.config.tie_word_embeddings is tied
    assert loaded.dtype == torch.float32 and not loaded.training
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), atol=1e-5, rtol=0)
    if tied:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_gguf_round_trip_notices_wrong_row_order(tmp_path, tiny, ids, monkeypatch):
    """The test above can fail: without undoing the converter's reordering the logits differ."""
    model = tiny()
    monkeypatch.setattr(gguf_model, "_half_split_rows", lambda weight, heads: weight)
    loaded = load_model(find_model(str(write_gguf(model, tmp_path / "tiny.gguf"))))
    assert (logits_of(loaded, ids) - logits_of(model, ids)).abs().max() > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_folder(tmp_path, tiny, ids, tied):
    """Loading a folder gives the weights that were saved, in float32 although the file is in bf16."""
    model = tiny(tied=tied)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # numbers that bf16 holds exactly
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path)))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), atol=1e-6, rtol=0)


def tiny_shape(monkeypatch, **overrides):
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    monkeypatch.setattr(models, "TINYLLAMA_SHAPE", shape | overrides)


def random_parameters(seed):
    return dict(load_model(find_model("tinyllama-random"), seed=seed).named_parameters())


def test_random_model_is_reproducible_per_seed(monkeypatch):
    """The same seed gives the same weights whatever the global generator did before; another seed gives others."""
    tiny_shape(monkeypatch)
    torch.manual_seed(1)
    first = random_parameters(seed=5)
    torch.manual_seed(2)
    torch.rand(1000)
    again, other = random_parameters(seed=5), random_parameters(seed=6)
    for name, values in first.items():
        assert torch.equal(values, again[name])
        assert values.dim() == 1 or not torch.equal(values, other[name])


def test_random_weights_do_not_depend_on_what_was_created_before(monkeypatch):
    """Each parameter has a generator of its own: one that grows does not shift those created after it, and none repeats."""
    tiny_shape(monkeypatch)
    small = random_parameters(seed=0)
    tiny_shape(monkeypatch, vocab_size=131)
    wider_vocabulary = random_parameters(seed=0)
    layers = [name for name in small if "layers" in name]
    assert all(torch.equal(small[name], wider_vocabulary[name]) for name in layers)
    matrices = [small[name].flatten()[:64] for name in small if small[name].dim() == 2]
    assert len({tuple(values.tolist()) for values in matrices}) == len(matrices)


def test_tinyllama_random_has_tinyllamas_shape():
    """1,100,048,384 parameters, untied, 32 query heads on 4 KV heads: without memory for a single weight."""
    source = find_model("tinyllama-random")
    model = models.empty_model(load_config(source))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_100_048_384
    assert source.random_weights and models.load_tokenizer(source) is None
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (32, 4)


def test_list_of_end_tokens_gives_one_padding_token(tiny_folder):
    """Llama 3's generation_config names several end-of-sequence tokens; padding must be one number, or batches break."""
    from inference import generate_ids

    (tiny_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1}))
    model = load_model(find_model(str(tiny_folder)))
    assert isinstance(model.generation_config.pad_token_id, int)
    output = generate_ids(model, torch.tensor([[5, 6, 7], [8, 9, 10]]), max_new_tokens=4)
    assert output.shape[0] == 2


@pytest.mark.embedded
def test_the_tokenizer_of_a_gguf_file_is_made_once(embedded, monkeypatch, tmp_path):
    """What was kept says what the file says, in every respect; damaged, or without a disk to keep it, it is made again."""
    monkeypatch.setattr(gguf_model, "TOKENIZERS", tmp_path / "tokenizers")
    made, from_pretrained = [], AutoTokenizer.from_pretrained

    read = functools.cache(from_pretrained)  # out of the same file again only once: it takes seconds

    def watched(place, **told):
        made.append("gguf_file" in told)
        return (read if made[-1] else from_pretrained)(place, **told)

    monkeypatch.setattr(gguf_model.AutoTokenizer, "from_pretrained", watched)
    first, kept = models.load_tokenizer(embedded.source), models.load_tokenizer(embedded.source)
    assert made == [True, False]
    text = "Naïve   tokens, 12345\n\n\tdef f(x): return x<|im_end|> 😀" + texts._lee_news("evaluation").content[:5000]
    assert kept(text).input_ids == first(text).input_ids and kept.decode(kept(text).input_ids) == text
    assert kept.special_tokens_map == first.special_tokens_map and kept.chat_template == first.chat_template
    assert (kept.bos_token_id, kept.eos_token_id, len(kept)) == (first.bos_token_id, first.eos_token_id, len(first))
    (folder,) = gguf_model.TOKENIZERS.iterdir()
    (folder / "tokenizer.json").write_text("{")
    assert models.load_tokenizer(embedded.source)(text).input_ids == first(text).input_ids
    assert models.load_tokenizer(embedded.source)(text).input_ids == first(text).input_ids
    assert made == [True, False, False, True, False]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gguf_model, "TOKENIZERS", tmp_path / "file" / "tokenizers")
    assert models.load_tokenizer(embedded.source)(text).input_ids == first(text).input_ids


# Files carried by packages


def fake_package(monkeypatch, folder):
    distribution = SimpleNamespace(locate_file=lambda relative: folder / relative)
    monkeypatch.setattr(models.importlib.metadata, "distribution", lambda name: distribution)


def test_carried_file(tmp_path, monkeypatch):
    """The right bytes in a package that is never imported."""
    (tmp_path / "data.bin").write_bytes(b"weights")
    fake_package(monkeypatch, tmp_path)
    found = models.carried_file("carrier", "data.bin", sha256=hashlib.sha256(b"weights").hexdigest())
    assert found == tmp_path / "data.bin"


def test_carried_file_with_other_content(tmp_path, monkeypatch):
    (tmp_path / "data.bin").write_bytes(b"other weights")
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="SHA-256 differs") as error:
        models.carried_file("carrier", "data.bin", sha256="0" * 64)
    one_sentence(error)


def test_the_embedded_model_without_its_carrier(monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_GGUF", ("no-such-carrier-package", "model.gguf"))
    with pytest.raises(ValueError, match=r"--model smollm2-135m: .*pip install .*requirements-embedded.txt") as error:
        find_model("smollm2-135m")
    one_sentence(error)


def test_carried_file_that_is_gone(tmp_path, monkeypatch):
    """The package is there, the file in it is not."""
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"requirements-embedded.txt") as error:
        models.carried_file("carrier", "data.bin", sha256="0" * 64)
    one_sentence(error)


def test_carrier_that_is_not_installed():
    """The sentence says what to install."""
    with pytest.raises(ValueError, match=r"requirements-embedded.txt") as error:
        models.carried_file("no-such-carrier-package", "data.bin", sha256="0" * 64)
    assert "no-such-carrier-package" in one_sentence(error)


# The Hub, played by a folder laid out as its cache


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache of our own. The libraries read HF_HOME once, when imported, so their constants are replaced."""
    import huggingface_hub.constants
    import transformers.utils.hub

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE"):
        if hasattr(transformers.utils.hub, name):
            monkeypatch.setattr(transformers.utils.hub, name, str(cache))
    return cache


def put_in_cache(cache, repo, revision, model, *, main=None):
    """`model` as a downloaded snapshot of `repo` at `revision`; `main` is what the branch points to."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    model.save_pretrained(folder / "snapshots" / revision)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(main or revision)


def test_tinyllama_comes_from_its_pinned_revision(hub_cache, tiny, ids):
    """Two revisions are cached and `main` is the newer: the pinned one is loaded."""
    pinned, newer = tiny(seed=1), tiny(seed=2)
    put_in_cache(hub_cache, models.TINYLLAMA, "a" * 40, newer)
    put_in_cache(hub_cache, models.TINYLLAMA, models.TINYLLAMA_REVISION, pinned, main="a" * 40)
    source = find_model("tinyllama")
    assert source == ModelSource("tinyllama", "hub", models.TINYLLAMA, revision=models.TINYLLAMA_REVISION)
    torch.testing.assert_close(logits_of(load_model(source), ids), logits_of(pinned, ids), atol=1e-6, rtol=0)


def test_another_revision_of_tinyllama_does_not_count(hub_cache, tiny):
    """A cache that holds only some other revision is no cache of the pinned one."""
    put_in_cache(hub_cache, models.TINYLLAMA, "a" * 40, tiny())
    with pytest.raises(ValueError, match=r"--model tinyllama.*not in the Hub cache"):
        find_model("tinyllama")


def test_hub_id_from_the_cache(hub_cache, tiny, ids):
    """Any cached Llama works offline by its id, at the revision its `main` points to."""
    model = tiny("multi_head", tied=True)
    put_in_cache(hub_cache, "someone/some-llama", "b" * 40, model)
    loaded = load_model(find_model("someone/some-llama"))
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), atol=1e-6, rtol=0)


def test_auto_prefers_a_cached_tinyllama(hub_cache, tiny):
    put_in_cache(hub_cache, models.TINYLLAMA, models.TINYLLAMA_REVISION, tiny())
    source = find_model("auto")
    assert source.name == "tinyllama" and source.notice is None


@pytest.mark.embedded
@pytest.mark.parametrize("configuration_cached", [False, True])
def test_auto_falls_back_with_a_notice(hub_cache, embedded_source, tiny, configuration_cached):
    """No TinyLlama to be had: the embedded model runs, and the user is told that it is another model."""
    if configuration_cached:
        put_in_cache(hub_cache, models.TINYLLAMA, models.TINYLLAMA_REVISION, tiny())
        next(hub_cache.rglob("*.safetensors")).unlink()
    source = find_model("auto")
    assert source.location == embedded_source.location
    assert "SmolLM2" in source.notice and "TinyLlama" in source.notice and "HF_HUB_OFFLINE" in source.notice


def test_unreachable_hub_is_one_sentence(hub_cache, monkeypatch):
    """Online by the settings, but the server cannot be reached: whatever the client raises becomes one sentence."""
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")

    def refuse(*_, **arguments):
        assert arguments["timeout"] <= 10, "a check must not hang"
        raise ConnectionError("[Errno 111] refused\nand more\nlines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ValueError, match="--model someone/some-llama") as error:
        find_model("someone/some-llama")
    one_sentence(error)


def test_wrong_shape_is_refused(tiny):
    """A tensor that does not fit its place is named."""
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\)"):
        models.set_parameter(tiny(), "model.norm.weight", torch.nn.Parameter(torch.zeros(3)))


@pytest.mark.embedded
def test_embedded_model_is_what_it_claims(embedded):
    """SmolLM2-135M: 30 layers, 9 query heads on 3 KV heads of 64, one table for both ends, in float32."""
    config = embedded.model.config
    assert isinstance(config, LlamaConfig)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (30, 9, 3, 64)
    assert embedded.model.lm_head.weight is embedded.model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in embedded.model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in embedded.model.parameters()} == {torch.float32}


@pytest.mark.embedded
def test_embedded_model_copied_elsewhere_is_the_same(tmp_path, embedded_source):
    """A GGUF file is found by its path, under its own name."""
    copied = tmp_path / "my-model.gguf"
    shutil.copy(embedded_source.location, copied)
    source = find_model(str(copied))
    assert (source.name, source.kind) == ("my-model", "gguf")
    assert load_config(source).hidden_size == 576


def test_models_of_one_name_are_told_apart(tmp_path):
    """Two folders called alike, and one whose weights were written anew."""
    one, two = (find_model(str(save_tiny_model(tmp_path / place / "final"))) for place in ("run1", "run2"))
    assert one.name == two.name and models.fingerprint(one) == models.fingerprint(one) != models.fingerprint(two)
    before = models.fingerprint(two)
    weights = tmp_path / "run2" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert models.fingerprint(two) != before
