"""Linear layers that read the same input as one product: q, k and v, gate and up.

One larger product quantises its input once and wakes the threads once. The weights are laid end to end, [P, L, 16, ...]
panels after panels, and each layer becomes a view of its share: nothing is held twice, and the layers still work alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from kernels.packing import CHANNELS


def fuse(layers: list[nn.Module]) -> nn.Module | None:
    """One layer whose outputs are those of `layers`, end to end; their tensors become views of its own.

    None where they cannot be joined: of different kinds, groups or precisions, or a panel would hold channels of two.
    """
    if not all(isinstance(getattr(layer, "weight", None), torch.Tensor) for layer in layers):
        return None  # torch's own quantised layers keep their weights to themselves
    first = layers[0]
    names = [name for name in ("weight", "scale", "minimum") if name in first._buffers or name in first._parameters]
    if any(_kind(layer) != _kind(first) for layer in layers) or any(layer.bias is not None for layer in layers):
        return None
    packed = first.weight.dim() == 4
    if packed and any(layer.out_features % CHANNELS for layer in layers):
        return None
    joined = copy.copy(first)
    joined._parameters, joined._buffers = dict(first._parameters), dict(first._buffers)
    joined.out_features = sum(layer.out_features for layer in layers)
    for name in names:
        whole = torch.cat([getattr(layer, name).data for layer in layers])
        parameter = name in first._parameters
        setattr(joined, name, nn.Parameter(whole, requires_grad=False) if parameter else whole)
        parts = whole.split([getattr(layer, name).shape[0] for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=False) if parameter else part)
    return joined


def _kind(layer: nn.Module) -> tuple:
    options = tuple(getattr(layer, name, None) for name in ("in_features", "group_size", "int8_activations", "native"))
    return type(layer), options, layer.weight.dtype, layer.weight.dim()
