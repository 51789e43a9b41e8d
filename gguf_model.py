"""Llama models from GGUF files: rows are dequantised to float32 when they are asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The converter reorders the rows of q_proj and
k_proj for ggml's rotary embedding (pairs side by side instead of in two halves); `_half_split_rows` undoes it.
"""

from __future__ import annotations

import functools
import shutil
import struct
import tempfile
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, LlamaConfig

from devices import CACHE
from streaming import StoredWeights

TENSOR_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
REORDERED = ("q_proj.weight", "k_proj.weight")
TOKENIZERS = CACHE / "tokenizers"
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_config(path: Path) -> LlamaConfig:
    """The architecture from the file's metadata. Raises ValueError if it is no GGUF file, damaged, or no Llama."""
    return _config(_open(path), path)


def load_tokenizer(path: Path, *, sha256: str):
    """The tokenizer in the file, whose digest is `sha256`: made once, and then read from the JSON it was saved as.

    transformers takes seconds to make it, more than importing it does, in every process anew. Raises what transformers does
    for a file without one.
    """
    kept = TOKENIZERS.expanduser() / f"{sha256[:24]}-{transformers.__version__}"
    if kept.exists():
        try:
            return AutoTokenizer.from_pretrained(kept, trust_remote_code=False)
        except Exception:  # the library has no type for a damaged file; the one that this was made of is still there
            shutil.rmtree(kept, ignore_errors=True)
    made = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made.save_pretrained(whole := Path(folder) / kept.name)
            whole.rename(kept)
    except OSError:
        pass  # it is there already, or nothing can be kept: the next one is made again
    return made


def rounded_as(path: Path) -> str | None:
    """The type most weights of the file were rounded to, e.g. Q4_1; None if they are floating point."""
    weights = Counter()
    for tensor in _open(path).tensors:
        weights[tensor.tensor_type] += int(tensor.n_elements)
    kind = max(weights, key=weights.get)
    numbers_in_a_block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind.name if numbers_in_a_block > 1 else None


def stored_weights(path: Path) -> StoredWeights:
    """Every tensor of the model by the name transformers gives it. Raises ValueError like `read_config`."""
    reader = _open(path)
    config = _config(reader, path)
    weights: StoredWeights = {}
    for tensor in reader.tensors:
        name = _parameter_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        order = _half_split_rows(torch.arange(shape[0])[:, None], heads)[:, 0].numpy() if name.endswith(REORDERED) else None
        # Only numbers are kept of the reader: its map of the file counts as memory wherever it was touched.
        read = functools.partial(
            _read_rows, path, tensor.data_offset, tensor.tensor_type, tensor.data.dtype, int(tensor.n_bytes) // shape[0],
            shape[1:], order,
        )  # fmt: skip
        weights[name] = shape, read
    return weights


def _read_rows(path, offset, kind, dtype, row_bytes, columns, order, first: int, last: int) -> torch.Tensor:
    """float32 [last - first, *columns]; `order` says which row of the file is which of the weight."""
    if order is None:
        raw = np.fromfile(path, np.uint8, (last - first) * row_bytes, offset=offset + first * row_bytes)
    else:
        raw = np.fromfile(path, np.uint8, len(order) * row_bytes, offset=offset).reshape(-1, row_bytes)[order[first:last]]
    values = gguf.quants.dequantize(raw.reshape(-1, row_bytes).view(dtype), kind)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(last - first, *columns)


class _QuickReader(gguf.GGUFReader):
    """Steps over the vocabulary. The library makes several arrays of each of its strings: seconds and 150 MB."""

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, length = struct.unpack_from("<IQ", self.data, orig_offs)
        offset = orig_offs + 12
        if item_type == gguf.GGUFValueType.STRING:
            for _ in range(length):
                offset += 8 + struct.unpack_from("<Q", self.data, offset)[0]
        elif item_type in (gguf.GGUFValueType.INT32, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32):
            offset += 4 * length
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return offset - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"--model {path.name}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise ValueError(f"--model {path.name}: not a GGUF file (its first four bytes are not 'GGUF')")
    try:
        return _QuickReader(path)
    except Exception as error:  # the reader trusts the file: a damaged one ends in any of a dozen exceptions
        raise ValueError(f"--model {path.name}: damaged or truncated GGUF file ({type(error).__name__})") from None


def _config(reader: gguf.GGUFReader, path: Path) -> LlamaConfig:
    def field(key: str, default=None):
        entry = reader.get_field(key)
        if entry is None and default is None:
            raise ValueError(f"--model {path.name}: the GGUF metadata lacks {key}")
        return default if entry is None else entry.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise ValueError(f"--model {path.name}: architecture '{architecture}' is not of the Llama family")
    names = {tensor.name for tensor in reader.tensors}
    # A factor alone means linear scaling, and so does the key that files had before there were types.
    factors = [field(key, 1.0) for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear")]
    typed = reader.get_field("llama.rope.scaling.type") is not None
    if "rope_freqs.weight" in names or typed or any(factor not in (0, 1) for factor in factors):
        raise ValueError(f"--model {path.name}: scaled rotary embeddings are not supported from GGUF; use safetensors")
    vocabulary = next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    if vocabulary is None:
        raise ValueError(f"--model {path.name}: the GGUF file holds no weights (token_embd.weight is missing)")
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    config = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv", heads),
        head_dim=field("llama.rope.dimension_count", 0),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=field("tokenizer.ggml.bos_token_id", 1),
        eos_token_id=field("tokenizer.ggml.eos_token_id", 2),
    )
    try:
        return LlamaConfig(**config | {"head_dim": config["head_dim"] or width // heads})
    except (TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        raise ValueError(f"--model {path.name}: no Llama has this metadata ({str(error).strip().splitlines()[0]})") from None


def _parameter_name(gguf_name: str) -> str:
    stem, _, kind = gguf_name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, block, part = stem.split(".") if stem.count(".") == 2 else ("", "", "")
    if part not in TENSOR_NAMES:
        raise ValueError(f"tensor {gguf_name} has no place in a Llama model")
    return f"model.layers.{block}.{TENSOR_NAMES[part]}.{kind}"


def _half_split_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * head_dim, inputs] with rotary pairs side by side -> the two halves that transformers rotates."""
    rows, inputs = weight.shape
    return weight.view(heads, rows // heads // 2, 2, inputs).transpose(1, 2).reshape(rows, inputs).contiguous()
