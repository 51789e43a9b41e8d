"""A decode step on a CUDA device: recorded once as a CUDA graph, then replayed with a single call.

A GPU reads TinyLlama's half-precision weights in half a millisecond, and Python needs twenty to launch the 900 operators of
transformers' forward: whatever is done to the weights, nothing gets faster. A recorded step has no Python in it. For that,
nothing in it may change from token to token but numbers in the device's memory: the token, how many the cache holds, and the
table that says where the cache lies (kernels/triton_step.py). One recording serves every cache of one kind, for so many tokens,
up to a length; the next is made when it is outgrown.
"""

from __future__ import annotations

import torch
import triton

from kernels import triton_products, triton_step
from kernels.int8 import GPU_KERNEL_ROWS
from kernels.kv_cache import RoomyCache

MOST_RECORDINGS = 64  # each shape of a step has one: batch sizes, drafted tokens, cache lengths


class DeviceStep:
    """`step(ids, cache)` for the layers of a LeanForward whose model is on a CUDA device.

    With `record` False every step is launched from Python, as tests without a GPU do.
    """

    def __init__(self, lean, *, record: bool = True):
        self.lean, self.record = lean, record
        self.past = torch.zeros(1, dtype=torch.int32, device=lean.cos.device)
        self.table = torch.zeros(len(lean.layers), 5, dtype=torch.int64, device=lean.cos.device)
        self.places: list | None = None  # what the table holds
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if record else None  # of memory: nothing in it outlives a replay

    def serves(self, input_ids: torch.Tensor) -> bool:
        return input_ids.numel() <= GPU_KERNEL_ROWS

    def __call__(self, input_ids: torch.Tensor, cache: RoomyCache) -> torch.Tensor:
        """int64 [B, T] -> float32 [B, T, V]; the tokens' keys and values join `cache`."""
        tokens = input_ids.shape[1]
        layers = [None if layer.qkv is None else cache.layer(layer.cache_index) for layer in self.lean.layers]
        stored = next(layer for layer in layers if layer is not None)
        past = stored.length
        self._make_room(layers, input_ids)
        splits = triton.next_power_of_2(triton.cdiv(past + tokens, triton_step.SPLIT))
        self.past.fill_(past)
        key = (*input_ids.shape, splits, stored.keys.dtype)
        if key not in self.recordings:
            logits = self._run(input_ids, stored.keys.dtype, splits)  # compiles what it launches; recording runs nothing
            if self.record:
                while len(self.recordings) >= MOST_RECORDINGS:
                    del self.recordings[next(iter(self.recordings))]
                self.recordings[key] = self._recorded(input_ids, stored.keys.dtype, splits)
        else:
            graph, ids, result = self.recordings[key]
            ids.copy_(input_ids)
            graph.replay()
            logits = result.clone()  # the next replay writes to the same place
        for layer in layers:
            if layer is not None:
                layer.length = past + tokens
        return logits.view(*input_ids.shape, -1)

    def _make_room(self, layers: list, input_ids: torch.Tensor) -> None:
        """Room for the tokens in every layer of the cache, and the table brought up to date where something moved."""
        places = []
        for ours, layer in zip(self.lean.layers, layers, strict=True):
            if layer is None:
                places.append([0] * 5)
                continue
            batch_size, tokens = input_ids.shape
            layer.make_room(batch_size, ours.kv_heads, tokens, ours.head_dim, device=input_ids.device, dtype=torch.float32)
            if len(layer.keys) != batch_size:
                raise ValueError(f"{batch_size} sequences for a KV cache of {len(layer.keys)}")
            tensors = layer.keys, layer.values, *layer.scales()
            places.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors] + [layer.keys.shape[2]])
        if places != self.places:
            self.table.copy_(torch.tensor(places))
            self.places = places

    def _recorded(self, input_ids: torch.Tensor, stored: torch.dtype, splits: int) -> tuple:
        # Tensors made in inference mode could not be written to outside of it: a recording serves generate and the benchmark.
        with torch.inference_mode(False), torch.no_grad():
            graph, ids = torch.cuda.CUDAGraph(), input_ids.clone()
            with torch.cuda.graph(graph, pool=self.pool):
                logits = self._run(ids, stored, splits)
        return graph, ids, logits

    def _run(self, input_ids: torch.Tensor, stored: torch.dtype, splits: int) -> torch.Tensor:
        """The step itself, [B * T, V]: the loop of LeanForward.logits on the operators of triton_step.py."""
        lean, tokens = self.lean, input_ids.shape[1]
        residual = lean.model.get_input_embeddings()(input_ids).float().flatten(0, 1).clone()  # it is added to in place
        update = None
        for layer, place in zip(lean.layers, self.table, strict=True):
            if layer.qkv is not None:
                inputs = triton_step.add_rms_norm(residual, update, layer.attention_norm, lean.eps)
                q = triton_step.rope_append(
                    multiply(layer.qkv, inputs), lean.cos, lean.sin, self.past, place, tokens=tokens, kv_heads=layer.kv_heads,
                    head_dim=layer.head_dim, stored=stored,
                )  # fmt: skip
                attended = triton_step.attend(
                    q, self.past, place, tokens=tokens, kv_heads=layer.kv_heads, scaling=layer.scaling, stored=stored,
                    splits=splits, kv_of_head=layer.kv_of_head,
                )  # fmt: skip
                update = multiply([layer.o_proj], attended)
            inputs = triton_step.add_rms_norm(residual, update, layer.mlp_norm, lean.eps)
            update = multiply([layer.down_proj], triton_step.silu_mul(multiply(layer.gate_up, inputs)))
        return multiply([lean.model.lm_head], triton_step.add_rms_norm(residual, update, lean.final_norm, lean.eps))


def multiply(layers: list, x: torch.Tensor) -> torch.Tensor:
    """x float32 [M, K] through layers side by side: float32 [M, N]."""
    outputs = [_multiply_one(layer, x) for layer in layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _multiply_one(layer, x: torch.Tensor) -> torch.Tensor:
    """Quantised layers find their kernel themselves; plain ones would take two casts and a product in half precision."""
    weight = getattr(layer, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point() and layer.bias is None
    return triton_products.float_product(x, weight) if plain else layer(x).float()
