"""Int8 KV cache: keys and values are stored as int8 with one scale per token and KV head.

Idea    A cached key or value row of 64 numbers becomes 64 int8 values and one float32 scale (absmax / 127): 68 bytes
        instead of 128 in bf16 (-47 %) or 256 in fp32 (-73 %). Only new tokens are quantised, on arrival; what attention
        reads is always what was stored, from the first token on, so quality measured through this cache is honest.
Helps   Memory, in proportion to tokens x batch: the cache of TinyLlama is 46 MB in bf16 at 2048 tokens and batch 1, but
        1.5 GB at batch 32.
Loses   Decode speed, a little: one layer at a time is expanded to floating point for its attention. At batch 1 there
        is almost nothing to win it back from: the cache is 2 % of what is read per token (design: memory first).
Papers  Sheng et al. 2023, FlexGen (4-bit KV cache): https://arxiv.org/abs/2303.06865
        Liu et al. 2024, KIVI (why keys and values quantise differently): https://arxiv.org/abs/2402.02750
Writes  kv_cache_int8_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/kv_cache_quant.py
    python optimizations/kv_cache_quant.py --model smollm2-135m --depth 1024
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import cli
from inference import Inference


def apply(model):
    """Give `model` an int8 KV cache; no weight changes. Raises ValueError if a technique has set one already."""
    if getattr(model, "make_cache", None) is not None:
        raise ValueError("this model already has a KV cache of its own: apply kv_cache_quant once")
    model.make_cache = Int8Cache
    return model


class Int8Cache(Cache):
    """A transformers cache whose layers hold int8 keys and values; works wherever `DynamicCache` does."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=Int8CacheLayer)

    @property
    def nbytes(self) -> int:
        """Bytes of all values and scales held."""
        return sum(layer.nbytes for layer in self.layers)


class Int8CacheLayer(CacheLayerMixin):
    """`keys` and `values` int8 [B, Hkv, T, d]; `key_scales` and `value_scales` float32 [B, Hkv, T, 1]."""

    is_sliding = False
    is_croppable = True
    STORED = ("keys", "values", "key_scales", "value_scales")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.key_scales = quantize_tokens(key_states[:, :, :0])
        self.values, self.value_scales = quantize_tokens(value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Quantise and keep the new tokens; return all keys and values as attention must see them: through int8."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, states in (("key", key_states), ("value", value_states)):
            quantized, scales = quantize_tokens(states)
            setattr(self, f"{name}s", torch.cat([getattr(self, f"{name}s"), quantized], dim=2))
            setattr(self, f"{name}_scales", torch.cat([getattr(self, f"{name}_scales"), scales], dim=2))
        return self._expanded(self.keys, self.key_scales), self._expanded(self.values, self.value_scales)

    def _expanded(self, quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return quantized.to(self.dtype).mul_(scales.to(self.dtype))

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.STORED) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.key_scales = self.value_scales = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers passes a number <= 0), as a rejected draft requires."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        if tokens_to_remove:
            self._change(lambda tensor: tensor[:, :, :tokens_to_remove].contiguous())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._change(lambda tensor: tensor.to("cpu"))

    def prefetch(self) -> None:
        self._change(lambda tensor: tensor.to(self.device))

    def _change(self, function) -> None:
        if self.is_initialized:
            for name in self.STORED:
                setattr(self, name, function(getattr(self, name)))


def quantize_tokens(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, T, d] -> int8 of the same shape and float32 scales [B, H, T, 1]; symmetric, absmax / 127, ties to even."""
    states = states.float()
    scales = states.abs().amax(dim=-1, keepdim=True) / 127
    quantized = (states / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return quantized.to(torch.int8), scales


class KVCacheQuantInference(Inference):
    """`KVCacheQuantInference().generate("Hello")`: load, switch to the int8 cache, answer."""

    def __init__(self, model: str = "auto", *, device: str = "auto"):
        super().__init__(model, device=device)
        self.model = apply(self.model)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    args = cli.parse(parser, argv)
    return experiment.run({"kv_cache_int8": [("kv_cache_quant", {})]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
