"""Int8 KV cache: keys and values are stored as int8 with one scale per token and KV head.

Idea    A cached key or value row of 64 numbers becomes 64 int8 values and one float32 scale (absmax / 127): 68 bytes
        instead of 128 in bf16 (-47 %) or 256 in fp32 (-73 %). Only new tokens are quantised, on arrival; what attention
        reads is always what was stored, from the first token on, so quality measured through this cache is honest.
Helps   Memory, in proportion to tokens x batch: the cache of TinyLlama is 46 MB in bf16 at 2048 tokens and batch 1, but
        1.5 GB at batch 32.
Loses   Decode speed, a little: one layer at a time is expanded to floating point for its attention. At batch 1 there
        is almost nothing to win it back from: the cache is 2 % of what is read per token.
Papers  Sheng et al. 2023, FlexGen (4-bit KV cache): https://arxiv.org/abs/2303.06865
        Liu et al. 2024, KIVI (why keys and values quantise differently): https://arxiv.org/abs/2402.02750
Writes  kv_cache_int8_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/kv_cache_quant.py
    python optimizations/kv_cache_quant.py --model smollm2-135m --depth 1024
"""

from __future__ import annotations

import torch

import cli
from inference import Inference
from kernels.kv_cache import RoomyCache, RoomyLayer, use_cache


def apply(model):
    """Give `model` an int8 KV cache; no weight changes. Raises ValueError if a technique has set one already."""
    if getattr(model, "make_cache", None) is not None:
        raise ValueError("this model already has a KV cache of its own: apply kv_cache_quant once")
    use_cache(model, Int8Cache)
    return model


class Int8CacheLayer(RoomyLayer):
    """`keys` and `values` int8 [B, Hkv, capacity, d]; `key_scales` and `value_scales` float32 [B, Hkv, capacity]."""

    STORED = ("keys", "values", "key_scales", "value_scales")

    def empty(self, name: str, shape: tuple[int, int, int, int]) -> torch.Tensor:
        if name.endswith("scales"):
            return torch.empty(shape[:3], device=self.device)
        return torch.empty(shape, dtype=torch.int8, device=self.device)

    def keep(self, places: slice, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, states in (("key", key_states), ("value", value_states)):
            quantized, scales = quantize_tokens(states)
            getattr(self, f"{name}s")[:, :, places] = quantized
            getattr(self, f"{name}_scales")[:, :, places] = scales.squeeze(-1)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._expand(self.keys, self.key_scales), self._expand(self.values, self.value_scales)

    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_scales, self.value_scales

    def _expand(self, quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return quantized[:, :, : self.length].to(self.dtype).mul_(scales[:, :, : self.length, None].to(self.dtype))


class Int8Cache(RoomyCache):
    """A cache whose layers hold int8 keys and values."""

    LAYER = Int8CacheLayer


def quantize_tokens(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, d] -> int8 of the same shape and float32 scales [B, H, T, 1]; symmetric, absmax / 127, ties to even.

    The numbers that kernels.int8.quantize_groups gives, in half its time: every token takes it twice a layer.
    """
    states = states.float()
    scales = states.abs().amax(dim=-1, keepdim=True) / 127
    quantized = (states / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return quantized.to(torch.int8), scales


class KVCacheQuantInference(Inference):
    """`KVCacheQuantInference().generate("Hello")`: load, switch to the int8 cache, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    args = cli.parse(parser, argv)
    return experiment.run({"kv_cache_int8": [("kv_cache_quant", {})]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
