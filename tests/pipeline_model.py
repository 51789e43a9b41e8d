"""Runs the pipeline on a tiny model in a child process: `python tests/pipeline_model.py MODEL_FOLDER RECIPES [FLAGS]`.

RECIPES is JSON: {"name": [["technique", {options}], ...]}. The child may be killed, filled and interrupted at will.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUICK_FLAGS = ["-n", "4", "-p", "8", "-r", "5", "--budget-s", "0.1", "--quality-windows", "2", "--quality-window", "32"]


def save_tiny_model(folder: Path) -> Path:
    """A Llama of two layers with a byte tokenizer, as safetensors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def main() -> int:
    import bandwidth
    import cli
    import experiment

    bandwidth.READ_BYTES = 10_000_000  # nothing here depends on what it reads, and 1.2 GB would disturb tests beside it
    folder, recipes, *flags = sys.argv[1:]
    parser = cli.build_parser("pipeline on a tiny model")
    args = cli.parse(parser, ["--model", folder, "--threads", "1", *QUICK_FLAGS, *flags])
    steps = {name: [tuple(step) for step in recipe] for name, recipe in json.loads(recipes).items()}
    return experiment.run(steps, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
