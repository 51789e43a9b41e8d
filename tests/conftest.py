"""Tiny Llamas with seeded random weights for most tests; the embedded real model where only a real one can tell.

No test touches the network: HF_HUB_OFFLINE is set before transformers is imported, here and in every child process.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import copy
import gc
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels for CUDA then run on the CPU, slowly

from transformers import LlamaConfig, LlamaForCausalLM

import models
import quality
import texts
from fitting import calibration_cache
from kernels.build import cpu_variant, load_kernels

torch.set_num_threads(1)  # tiny products lose more by waking threads than they gain, above all on a busy machine
VOCABULARY = 97
VARIANTS = ["amx", "avx512_bf16", "avx512_vnni", "avx2", "portable"]  # of the kernels' inner loops
# name -> query heads, KV heads, hidden width; head_dim is 16 unless a test asks for another
SHAPES = {"grouped": (8, 2, 64), "three_a_group": (9, 3, 144), "multi_head": (4, 4, 64)}


def pytest_collection_finish():
    """What is imported by now is never garbage; to look through it would take each of hundreds of collections half a second."""
    gc.freeze()


def make_tiny(shape="grouped", *, tied=False, seed=0, **overrides):
    """A Llama of three layers in float32. The weights are wide enough (std 0.15) for greedy tokens to be no near-ties."""
    query_heads, kv_heads, width = SHAPES[shape]
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": query_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": None,  # nothing ends a generation early, so lengths are known
            "pad_token_id": 0,
        }
        | overrides
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm that is skipped or swapped
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session", autouse=True)
def calibration_of_tests(tmp_path_factory):
    """What tiny models calibrate is no use to the user: a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_cache, "ROOT", tmp_path_factory.mktemp("calibration"))
        yield


@pytest.fixture
def tiny():
    """The factory itself: `tiny("grouped", tied=True)`."""
    return make_tiny


@pytest.fixture(params=SHAPES)
def any_tiny(request):
    """Each head layout in turn."""
    return make_tiny(request.param)


@pytest.fixture
def ids():
    """Two rows of 24 seeded token ids; 0 (padding) does not occur."""
    return torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def accelerator():
    """A CUDA or MPS device, or a skip: what a CPU cannot show is a tensor left behind on the other device."""
    if not torch.accelerator.is_available():
        pytest.skip("no CUDA or MPS device on this machine")
    return torch.accelerator.current_accelerator()


@pytest.fixture
def tiny_folder(tmp_path):
    """A folder with config.json and safetensors of a small grouped-head model."""
    make_tiny().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def embedded_source():
    """Where the embedded model is, or a skip that says what to install."""
    try:
        return models.find_model("smollm2-135m")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def _embedded_parts(embedded_source):
    return SimpleNamespace(
        source=embedded_source,
        model=models.load_model(embedded_source),
        tokenizer=models.load_tokenizer(embedded_source),
    )


def share_weights(model):
    """A copy of the modules on the same tensors: modules may be replaced in it, but no tensor written into."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


@pytest.fixture
def embedded(_embedded_parts):
    """`source`, `model` and `tokenizer` of the embedded model; the model shares its weights with other tests."""
    parts = _embedded_parts
    return SimpleNamespace(source=parts.source, model=share_weights(parts.model), tokenizer=parts.tokenizer)


@pytest.fixture
def embedded_loaded_once(embedded, monkeypatch):
    """Loading the embedded model by name gives the one already in memory: seconds saved for each `...Inference` class."""
    monkeypatch.setattr(models, "load_model", lambda source, **_: embedded.model)
    monkeypatch.setattr(models, "load_tokenizer", lambda source: embedded.tokenizer)


@pytest.fixture(scope="session")
def embedded_reference(_embedded_parts):
    """The embedded model's own answers on four windows of 256 tokens of the evaluation text, scored once."""
    try:
        text = texts._lee_news("evaluation")
    except ValueError as error:
        pytest.skip(str(error))
    windows = quality.cut_windows(_embedded_parts.tokenizer(text.content).input_ids, windows=4, window=256)
    return quality.score_baseline(_embedded_parts.model, windows, chunk=128)


@torch.inference_mode()
def logits_of(model, input_ids, cache=None, **kwargs):
    """Logits of one pass in float32, through `cache` if one is given."""
    return model(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, **kwargs).logits.float()


@torch.inference_mode()
def stepwise_logits(model, input_ids, cache):
    """Logits of the same ids fed one token at a time through `cache`."""
    steps = [logits_of(model, input_ids[:, i : i + 1], cache) for i in range(input_ids.shape[1])]
    return torch.cat(steps, dim=1)


def pytest_configure(config):
    """Compile the kernels once, before processes that test side by side would each do it."""
    if config.getoption("numprocesses", default=None) and not hasattr(config, "workerinput"):
        load_kernels()


def pytest_terminal_summary(terminalreporter):
    """Say how many faults were really tried."""
    outcomes = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    tried = [report for report in outcomes if report.when == "call" and "faults" in report.keywords]
    if tried:
        survived = sum(report.passed for report in tried)
        terminalreporter.write_line(f"faults tried: {len(tried)}, survived: {survived}")


@pytest.fixture(params=VARIANTS)
def kernels(request):
    """torch.ops.tinyopt, once with every variant of the inner loops that this CPU has."""
    if reason := load_kernels():
        pytest.skip(reason)
    try:
        torch.ops.tinyopt.select_variant(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    assert cpu_variant() == request.param
    yield torch.ops.tinyopt
    torch.ops.tinyopt.select_variant("")
