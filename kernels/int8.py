"""Int8 arithmetic of linear layers: how numbers are rounded, slow and exact twins of the C++ kernels, and the choice.

Symmetric int8: a group of consecutive inputs shares one scale, absmax / 127, and holds integers in [-127, 127]. The
twins in pure PyTorch run on every device and define what the kernels must return; `int8_linear`,
`int8_weight_only_linear` and `bf16_linear` take the kernel where it runs and the twin where it does not.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import device_int8
from kernels.build import cpu_variant, load_kernels

# 1024 products of 127 * 127 stay below 2^24, so that float32 adds them exactly. It must be float32: integer matmul has
# no fast path on a CPU and none at all on CUDA, and MPS has no float64.
EXACT_CHUNK = 1024
# Up to so many rows the kernels, which expand the weights anew for every 4 rows, beat a float32 GEMM over blocks that
# are expanded once. Unpacking int8 costs more than widening bfloat16, so its turn comes later.
INT8_KERNEL_ROWS, BF16_KERNEL_ROWS = 128, 32
PORTABLE_KERNEL_ROWS = 4  # the portable variant reads few bytes too, but is no match for a GEMM
BLOCK_BYTES = 2 << 20  # of dequantised weights at a time: they stay in the cache until they are multiplied


def quantize_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the last dimension to symmetric int8 in groups of consecutive elements, half to even.

    Args:
        x: floating point [..., K].
        group_size: elements per scale. The last group is short where K is no multiple of it.

    Returns:
        q int8 [..., K] in [-127, 127] and scale float32 [..., ceil(K / group_size)]. A group of zeros has scale 0. A
        group that holds NaN or Inf has scale NaN: it spoils the result visibly instead of vanishing in it.
    """
    groups = _grouped(x.float(), group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / 127, torch.nan)
    # The bound matters for denormal scales, which are too coarse to keep the quotient within 127.
    q = torch.where(scale > 0, (groups / scale).round().clamp(-127, 127), 0).to(torch.int8)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), scale.squeeze(-1)


def dequantize_groups(q: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """Undoes quantize_groups: q int8 [..., K], scale float32 [..., G] -> float32 [..., K]."""
    return (_grouped(q.float(), group_size) * scale.unsqueeze(-1)).flatten(-2)[..., : q.shape[-1]]


def int8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of int8_linear: the same integers, exact sums within a group, float32 over groups.

    Args:
        x: floating point [..., K], quantised here per row and group.
        weight: int8 [N, K] or its packed form.
        w_scale: float32 [N, ceil(K / group_size)].
        group_size: inputs per scale, of x and of the weight.
        bias: float32 [N].

    Returns:
        float32 [..., N]; NaN for every row of x that holds NaN or Inf.
    """
    weight = unpack(weight, w_scale.shape[0], x.shape[-1])
    q, x_scale = quantize_groups(x.reshape(-1, x.shape[-1]), group_size)
    out = torch.zeros(q.shape[0], weight.shape[0], device=x.device)
    for group, start in enumerate(range(0, x.shape[-1], group_size)):
        stop = min(start + group_size, x.shape[-1])
        exact = torch.zeros(out.shape, dtype=torch.int32, device=x.device)
        for first in range(start, stop, EXACT_CHUNK):
            chunk = slice(first, min(first + EXACT_CHUNK, stop))
            exact += (q[:, chunk].float() @ weight[:, chunk].float().T).to(torch.int32)
        out += exact.float() * (x_scale[:, group, None] * w_scale[:, group])
    return _finish(out, x, bias)


def int8_weight_only_reference(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of int8_weight_only_linear: float32 activations [..., K]. Otherwise like int8_linear_reference."""
    weight = unpack(weight, w_scale.shape[0], x.shape[-1])
    return F.linear(x.float(), dequantize_groups(weight, w_scale, group_size), bias)


def bf16_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of bf16_linear: x floating point [..., K], weight bfloat16 [N, K] -> float32 [..., N]."""
    return F.linear(x.float(), weight.float(), bias)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lays int8 [N, K] out for the C++ kernels: [ceil(N/8), ceil(K/4), 8, 4]. Without them it comes back as it is."""
    return torch.ops.tinyopt.pack_int8(weight) if _kernels_run(weight) else weight


def unpack(weight: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Returns int8 [n, k] from its packed form, on any device. A plain [n, k] weight passes through."""
    if weight.dim() == 2:
        return weight
    return weight.transpose(1, 2).reshape(weight.shape[0] * 8, weight.shape[1] * 4)[:n, :k]


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies in int8, x quantised on the fly. Arguments and result as in int8_linear_reference."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.dim() == 4 and _kernels_run(x) and _few(rows, None):
        return _shaped_like(x, torch.ops.tinyopt.int8_linear(rows, weight, w_scale, group_size, bias))
    if x.device.type != "cpu" and device_int8.serves("dynamic", weight, w_scale):
        q, x_scale = quantize_groups(rows, group_size)
        return _finish(device_int8.dynamic_product(q, x_scale, weight, w_scale), x, bias)
    return int8_linear_reference(x, weight, w_scale, group_size, bias)


def int8_weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies float activations with int8 weights, plain or from `pack`. float32 [..., N]."""
    if x.device.type != "cpu" and device_int8.serves("weight-only", weight, w_scale):
        return _finish(device_int8.weight_only_product(x.reshape(-1, x.shape[-1]), weight, w_scale), x, bias)
    if weight.dim() != 4 or not _kernels_run(x):
        return int8_weight_only_reference(x, weight, w_scale, group_size, bias)
    rows = x.reshape(-1, x.shape[-1])
    if _few(rows, INT8_KERNEL_ROWS):
        return _shaped_like(x, torch.ops.tinyopt.int8_weight_only_linear(rows, weight, w_scale, group_size, bias))

    def expand(first: int, last: int) -> torch.Tensor:
        block, scale = weight[first // 8 : -(-last // 8)], w_scale[first:last]
        plain = torch.ops.tinyopt.unpack_int8(block, last - first, x.shape[-1])
        return dequantize_groups(plain, scale, group_size)

    return _finish(_multiply_in_blocks(rows, w_scale.shape[0], expand), x, bias)


def bf16_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies float activations with bfloat16 weights [N, K], summing in float32. float32 [..., N]."""
    if weight.dtype != torch.bfloat16 or not _kernels_run(x):
        return bf16_linear_reference(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if _few(rows, BF16_KERNEL_ROWS):
        return _shaped_like(x, torch.ops.tinyopt.bf16_linear(rows, weight, bias))
    out = _multiply_in_blocks(rows, weight.shape[0], lambda first, last: weight[first:last].float())
    return _finish(out, x, bias)


@torch.compiler.assume_constant_result
def _ready() -> bool:
    return load_kernels() is None


def _kernels_run(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and _ready()


@torch.compiler.assume_constant_result
def _portable() -> bool:
    return cpu_variant() == "portable"


def _few(rows: torch.Tensor, limit: int | None) -> bool:
    """Whether the kernel is the fastest way to multiply so many rows; `limit` None: on AVX2 it always is."""
    limit = PORTABLE_KERNEL_ROWS if _portable() else limit
    return limit is None or rows.shape[0] <= limit


def _multiply_in_blocks(rows: torch.Tensor, n: int, expand: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """rows [M, K] times n output channels, of which `expand(first, last)` gives float32 weights [last - first, K]."""
    out = torch.empty(rows.shape[0], n)
    step = max(8, BLOCK_BYTES // (4 * rows.shape[1]) // 8 * 8)  # whole packed blocks of 8 channels
    for first in range(0, n, step):
        last = min(first + step, n)
        out[:, first:last] = F.linear(rows.float(), expand(first, last))
    return out


def _grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., K] -> [..., G, group_size], padded with zeros."""
    missing = -x.shape[-1] % group_size
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, group_size))


def _shaped_like(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.view(*x.shape[:-1], out.shape[-1])


def _finish(out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _shaped_like(x, out if bias is None else out + bias)
