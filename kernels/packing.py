"""How the C++ kernels want a weight: panels of 16 output channels, see kernels/tiles.h. Pure PyTorch, exact both ways.

A panel is a run of 64-byte lines, each 16 channels times 4 consecutive inputs (int8), 8 (int4, two to a byte) or 2
(bfloat16), zero padded to a multiple of 64 inputs. Panels of layers that read the same input can be laid end to end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHANNELS = 16
PADDED_INPUTS = 64
INPUTS_A_LINE = {torch.int8: 4, torch.bfloat16: 2}


def pack_panels(weight: torch.Tensor) -> torch.Tensor:
    """int8 or bfloat16 [N, K] -> [P, L, 16, 4] or [P, L, 16, 2], P = ceil(N / 16), contiguous."""
    return _panels(weight, INPUTS_A_LINE[weight.dtype]).contiguous()


def unpack_panels(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Undoes pack_panels: [P, L, 16, inputs] -> [n, k]."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * CHANNELS, -1)[:n, :k]


def panel_rows(packed: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """Single rows of what pack_panels packed: ids [...] -> [..., k]."""
    return packed[ids // CHANNELS, :, ids % CHANNELS].flatten(-2)[..., :k]


def pack_nibble_panels(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] in 0..15 -> uint8 [P, L, 16, 4]: of eight inputs, j is the low half of byte j and j + 4 the high."""
    panels = _panels(codes, 8)
    return (panels[..., :4] | (panels[..., 4:] << 4)).contiguous()


def unpack_nibble_panels(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Undoes pack_nibble_panels: uint8 [P, L, 16, 4] -> codes uint8 [n, k]."""
    return unpack_panels(torch.cat((packed & 15, packed >> 4), dim=-1), n, k)


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    """One number per channel and group, [N, G] -> [P, G, 16], contiguous."""
    missing = -scale.shape[0] % CHANNELS
    return F.pad(scale, (0, 0, 0, missing)).unflatten(0, (-1, CHANNELS)).transpose(1, 2).contiguous()


def unpack_scales(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Undoes pack_scales: [P, G, 16] -> [n, G]."""
    return packed.transpose(1, 2).flatten(0, 1)[:n]


def scale_rows(packed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Single rows of what pack_scales packed: ids [...] -> [..., G]."""
    return packed[ids // CHANNELS, :, ids % CHANNELS]


def _panels(weight: torch.Tensor, inputs_a_line: int) -> torch.Tensor:
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % PADDED_INPUTS, 0, -n % CHANNELS))
    return padded.view(-(-n // CHANNELS), CHANNELS, -1, inputs_a_line).transpose(1, 2)
