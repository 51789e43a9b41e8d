"""Writing a model to disk as safetensors: what a recipe's `model_size_mb` weighs."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from benchmark import stored_tensors

SHARD_MB = 500  # safetensors copies what it writes: one shard at a time bounds that copy


def save_model(model, folder: Path) -> None:
    """Weights and config.json into `folder`; tensors that share storage (tied embeddings) are written once."""
    shard, shard_bytes, count = {}, 0, 0
    for name, tensor in stored_tensors(model).items():
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.numel() * tensor.element_size()
        if shard_bytes > SHARD_MB * 1e6:
            count += 1
            save_file(shard, folder / f"model-{count:05d}.safetensors")
            shard, shard_bytes = {}, 0
    if shard:
        save_file(shard, folder / f"model-{count + 1:05d}.safetensors")
    model.config.to_json_file(folder / "config.json")
