"""KV caches with room to grow: keys and values lie in one place, and a decode step writes its token there.

transformers' own cache joins old and new tokens into a fresh tensor at every step, which copies the whole cache. Here a
layer holds [B, Hkv, capacity, d] and how many tokens of it are real. It begins with `room` where that is known beforehand,
else with what the first prompt needs, and then grows by a thirty-second at a time: what is never used must not cost what int8
saves. `nbytes` counts all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH, ROUND_UP_TO = 1 + 1 / 32, 4  # tokens


class RoomyLayer(CacheLayerMixin):
    """`keys` and `values` [B, Hkv, capacity, d] in `DTYPE`, of which `length` tokens are real.

    `STORED` names all tensors of a layer; dimension 0 is the batch, 2 the tokens. Subclasses say how states are kept.
    """

    is_sliding = False
    is_croppable = True
    STORED = ("keys", "values")
    DTYPE = torch.bfloat16
    room = 0  # tokens to begin with, if more than the first prompt

    def __init__(self):
        super().__init__()
        self.length = 0

    def make_room(self, batch_size: int, kv_heads: int, tokens: int, head_dim: int, *, device, dtype) -> None:
        """Room for `tokens` more; `dtype` is what `update` hands back."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = dtype, device, True
            for name in self.STORED:
                setattr(self, name, self.empty(name, (batch_size, kv_heads, max(tokens, self.room), head_dim)))
        needed = self.length + tokens
        if needed > self.keys.shape[2]:
            capacity = -(-max(needed, int(self.length * GROWTH)) // ROUND_UP_TO) * ROUND_UP_TO
            self._change(lambda tensor: _resized(tensor, self.length, capacity))

    def empty(self, name: str, shape: tuple[int, int, int, int]) -> torch.Tensor:
        return torch.empty(shape, dtype=self.DTYPE, device=self.device)

    def keep(self, places: slice, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write new tokens [B, Hkv, T, d] to `places`."""
        self.keys[:, :, places] = key_states.to(self.DTYPE)
        self.values[:, :, places] = value_states.to(self.DTYPE)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far as attention must see them, [B, Hkv, length, d]: through what is stored."""
        return self.keys[:, :, : self.length].to(self.dtype), self.values[:, :, : self.length].to(self.dtype)

    def scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scales of keys and values, [B, Hkv, capacity] each, for layers that have them."""
        return None, None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch_size, kv_heads, tokens, head_dim = key_states.shape
        self.make_room(batch_size, kv_heads, tokens, head_dim, device=key_states.device, dtype=key_states.dtype)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Keep the new tokens; return all keys and values."""
        self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keep(slice(self.length, end), key_states, value_states)
        self.length = end
        return self.expanded()

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.STORED) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for name in self.STORED:
            setattr(self, name, None)
        self.is_initialized, self.length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers passes a number <= 0), as a rejected draft requires."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda tensor: tensor[indices])

    def _change(self, function) -> None:
        if self.is_initialized:
            for name in self.STORED:
                setattr(self, name, function(getattr(self, name)))


class RoomyCache(Cache):
    """A transformers cache of such layers; works wherever `DynamicCache` does. `room` counts until a layer gets its tokens."""

    LAYER = RoomyLayer
    room = 0

    def __init__(self):
        super().__init__(layer_class_to_replicate=self._new_layer)

    def _new_layer(self) -> RoomyLayer:
        layer = self.LAYER()
        layer.room = self.room
        return layer

    def layer(self, index: int) -> RoomyLayer:
        while len(self.layers) <= index:
            self.layers.append(self._new_layer())
        return self.layers[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all values and scales held, room to grow included."""
        return sum(layer.nbytes for layer in self.layers)


def use_cache(model, make_cache: Callable[[], Cache]) -> None:
    """Give `model` a KV cache of its own: `benchmark.new_cache` asks it for one, and so does transformers' `generate` where it
    is called without a cache (`cache_implementation` and `use_cache=False` are obeyed)."""
    model.make_cache = make_cache
    prepare = model._prepare_cache_for_generation

    def prepare_own(generation_config, model_kwargs: dict, *arguments, **options):
        no_other = generation_config.cache_implementation is None and generation_config.use_cache is not False
        if model_kwargs.get("past_key_values") is None and no_other:
            model_kwargs["past_key_values"] = make_cache()
            return None
        return prepare(generation_config, model_kwargs, *arguments, **options)

    model._prepare_cache_for_generation = prepare_own


def _resized(tensor: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    larger = tensor.new_empty(*tensor.shape[:2], capacity, *tensor.shape[3:])
    larger[:, :, :length] = tensor[:, :, :length]
    return larger
