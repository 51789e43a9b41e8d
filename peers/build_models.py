"""TinyLlama's architecture with seeded random weights, in the formats of the peers; built once, then found in the cache.

Why     The peers read other formats than ours, and a comparison of speed needs the same shape, not the same words.
From    `models.load_model` of `tinyllama-random`, written once as float16 safetensors with a tokenizer of 32000 made-up words
        (CTranslate2 takes its vocabulary from one). Everything else is converted from that folder.
Writes  DIR/huggingface/             config.json, model.safetensors, tokenizer.json
        DIR/F16.gguf, Q8_0.gguf ...  llama.cpp: F16 through the package gguf, the rest by llama.cpp's own quantiser
        DIR/openvino-int8/ ...       OpenVINO IR, weights compressed by nncf while optimum-intel exports
        DIR/ctranslate2-int8/        CTranslate2's own converter

Runs in the peers' environment, with the repository on the path; the other scripts here call it for what is missing:

    PYTHONPATH=. .venv-peers/bin/python peers/build_models.py                      # everything, about 10 minutes, 10 GB
    PYTHONPATH=. .venv-peers/bin/python peers/build_models.py --only Q8_0.gguf,openvino-int8
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from arguments import Parser, fail

# As devices.CACHE, which needs torch: `--help` need not wait for it.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinyllama-optimization" / "peers"
MODEL = "tinyllama-random"
HUGGINGFACE = "huggingface"
LLAMA_FTYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # enum llama_ftype of llama.h
OPENVINO_WEIGHTS = {
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}


def folder_of(model_dir: Path, seed: int) -> Path:
    """Weights of another seed are other weights: they are never found in place of one another."""
    return model_dir / f"seed-{seed}" if seed else model_dir


def build(name: str, model_dir: Path, *, seed: int = 0) -> Path:
    """DIR/name, built now if it is not there; a build that is cut short leaves nothing behind under that name."""
    target = model_dir / name
    if not target.exists():
        model_dir.mkdir(parents=True, exist_ok=True)
        unfinished = model_dir / f".unfinished-{os.getpid()}-{name}"
        try:
            BUILDERS[name](unfinished, model_dir, seed)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.unlink(missing_ok=True)
    return target


def write_huggingface(target: Path, model_dir: Path, seed: int) -> None:
    """Weights, configuration and tokenizer as transformers reads them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from models import find_model, load_model

    load_model(find_model(MODEL), seed=seed).to(torch.float16).save_pretrained(target)
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(3, 32000))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(target)


def write_gguf(target: Path, model_dir: Path, seed: int) -> None:
    """F16, as llama.cpp's own converter would: matrices in float16, norms in float32, no vocabulary."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    from gguf_model import TENSOR_NAMES, TOP_NAMES
    from models import TINYLLAMA_SHAPE as SHAPE

    ours = {ours: theirs for theirs, ours in TENSOR_NAMES.items()}
    top = {ours: theirs for theirs, ours in TOP_NAMES.items()}
    heads = {"attn_q": SHAPE["num_attention_heads"], "attn_k": SHAPE["num_key_value_heads"]}
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(SHAPE["hidden_size"] // SHAPE["num_attention_heads"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_vocab_size(SHAPE["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for shard in sorted(build(HUGGINGFACE, model_dir, seed=seed).glob("*.safetensors")):
        with safe_open(shard, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (the handle is no dict)
                stem, values = name.removesuffix(".weight"), file.get_tensor(name)
                if stem in top:
                    part = theirs = top[stem]
                else:
                    _, _, layer, inner = stem.split(".", 3)
                    part = ours[inner]
                    theirs = f"blk.{layer}.{part}"
                if part in heads:
                    values = _rotary_pairs_side_by_side(values, heads[part])
                writer.add_tensor(f"{theirs}.weight", values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotary_pairs_side_by_side(weight, heads: int):
    """The inverse of `gguf_model._half_split_rows`: ggml rotates neighbours, transformers the two halves of a head."""
    rows, inputs = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def quantize_gguf(target: Path, model_dir: Path, seed: int, *, quantization: str) -> None:
    import ctypes

    import llama_cpp

    source = build("F16.gguf", model_dir, seed=seed)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = LLAMA_FTYPES[quantization]
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize ended with code {code}")


def export_openvino(target: Path, model_dir: Path, seed: int, *, weights: str) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    source = build(HUGGINGFACE, model_dir, seed=seed)
    compression = OVWeightQuantizationConfig(**OPENVINO_WEIGHTS[weights])
    model = OVModelForCausalLM.from_pretrained(
        str(source), export=True, compile=False, quantization_config=compression, trust_remote_code=False
    )
    model.save_pretrained(target)


def convert_ctranslate2(target: Path, model_dir: Path, seed: int) -> None:
    import ctranslate2

    source = build(HUGGINGFACE, model_dir, seed=seed)
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(target), quantization="int8")


BUILDERS: dict[str, Callable[[Path, Path, int], None]] = {
    HUGGINGFACE: write_huggingface,
    "F16.gguf": write_gguf,
    **{f"{name}.gguf": functools.partial(quantize_gguf, quantization=name) for name in LLAMA_FTYPES},
    **{f"openvino-{name}": functools.partial(export_openvino, weights=name) for name in OPENVINO_WEIGHTS},
    "ctranslate2-int8": convert_ctranslate2,
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model-dir", type=Path, default=CACHE, metavar="DIR", help=f"default: {CACHE}")
    parser.add_argument("--only", metavar="A,B", help=f"default: all of {', '.join(BUILDERS)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    names = list(BUILDERS) if args.only is None else args.only.split(",")
    for name in names:
        if name not in BUILDERS:
            fail(parser, ValueError(f"--only {name}: choose from {', '.join(BUILDERS)}"))
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the network
    code = 0
    for name in names:
        try:
            print(f"{name}: {build(name, folder_of(args.model_dir, args.seed), seed=args.seed)}", file=sys.stderr)
        except Exception as error:  # a peer that cannot build its format must not keep the others from theirs
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
