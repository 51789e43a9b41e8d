"""Int8 arithmetic of linear layers: how numbers are rounded, slow and exact twins of the C++ kernels, and the choice.

Symmetric int8: a group of consecutive inputs shares one scale, absmax / 127, and holds integers in [-127, 127]. Scales of
weights are kept in bfloat16, and the integers are found after that rounding, so that nothing is lost by it. The
twins in pure PyTorch run on every device and define what the kernels must return; `int8_linear` and
`int8_weight_only_linear` take the kernel where it runs and the twin where it does not; other devices than CPUs multiply many
rows by weights that are expanded block by block.

A weight is plain, [N, K] with scale [N, G], or packed for the kernels (kernels/packing.py), [P, L, 16, 4] with scale
[P, G, 16]; then `n` says how many of its channels are real.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import device_int8
from kernels.build import cpu_variant, gpu_kernels, load_kernels
from kernels.packing import pack_panels, pack_scales, unpack_panels, unpack_scales

# 1024 products of 127 * 127 stay below 2^24, so that float32 adds them exactly. It must be float32: integer matmul has
# no fast path on a CPU and none at all on CUDA, and MPS has no float64.
EXACT_CHUNK = 1024
BF16_VARIANTS = ("amx", "avx512_bf16")  # these multiply many rows in bfloat16
GPU_KERNEL_ROWS = 16  # ... on a CUDA device: many rows are arithmetic, which torch does best with expanded weights
PORTABLE_KERNEL_ROWS = 4  # the portable variant reads few bytes too, but is no match for a GEMM
BLOCK_BYTES = 2 << 20  # of dequantised weights at a time: they stay in the cache until they are multiplied
DEVICE_BLOCK_BYTES = 32 << 20  # ... and on a GPU are few calls, but not much memory


def quantize_groups(
    x: torch.Tensor, group_size: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the last dimension to symmetric int8 in groups of consecutive elements, half to even.

    Args:
        x: floating point [..., K].
        group_size: elements per scale. The last group is short where K is no multiple of it.
        scale_dtype: what the scales are rounded to before the integers are found.

    Returns:
        q int8 [..., K] in [-127, 127] and scale `scale_dtype` [..., ceil(K / group_size)]. A group of zeros has scale 0. A
        group that holds NaN or Inf has scale NaN: it spoils the result visibly instead of vanishing in it.
    """
    groups = _grouped(x.float(), group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / 127, torch.nan).to(scale_dtype).float()
    # The bound matters where the scale was rounded down, by bfloat16 or because it is denormal.
    q = torch.where(scale > 0, (groups / scale).round().clamp(-127, 127), 0).to(torch.int8)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), scale.squeeze(-1).to(scale_dtype)


def dequantize_groups(q: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """Undoes quantize_groups: q int8 [..., K], scale [..., G] -> float32 [..., K]."""
    return (_grouped(q.float(), group_size) * scale.float().unsqueeze(-1)).flatten(-2)[..., : q.shape[-1]]


def int8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of int8_linear: the same integers, exact sums within a group, float32 over groups, one after another.

    Bit for bit what the kernels for x86-64 vectors and matrix units give; portable C++ may round products on the way.

    Args:
        x: floating point [..., K], quantised here per row and group.
        weight: int8 [N, K], plain.
        scale: floating point [N, ceil(K / group_size)].
        group_size: inputs per scale, of x and of the weight.
        bias: float32 [N].

    Returns:
        float32 [..., N]; NaN for every row of x that holds NaN or Inf.
    """
    q, x_scale = quantize_groups(x.reshape(-1, x.shape[-1]), group_size)
    out = torch.zeros(q.shape[0], weight.shape[0], device=x.device)
    for group, start in enumerate(range(0, x.shape[-1], group_size)):
        stop = min(start + group_size, x.shape[-1])
        exact = torch.zeros(out.shape, dtype=torch.int32, device=x.device)
        for first in range(start, stop, EXACT_CHUNK):
            chunk = slice(first, min(first + EXACT_CHUNK, stop))
            exact += (q[:, chunk].float() @ weight[:, chunk].float().T).to(torch.int32)
        out = multiply_add(exact.float(), x_scale[:, group, None] * scale[:, group].float(), out)
    return finish(out, x, bias)


def multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of float32 tensors, rounded once like a fused one: float64, which MPS lacks, holds the product."""
    return torch.addcmul(c.double(), a.double(), b.double()).float()


def int8_weight_only_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of int8_weight_only_linear: float32 activations [..., K]. Otherwise like int8_linear_reference.

    On a CPU that multiplies bfloat16, more than 16 rows are rounded to it, and so are weights times their groups' scales; the
    twin does not round.
    """
    return F.linear(x.float(), dequantize_groups(weight, scale, group_size), bias)


def pack(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and bfloat16 [N, G] as the C++ kernels want them. Without kernels they come back as they are."""
    return (pack_panels(weight), pack_scales(scale)) if kernels_run(weight) else (weight, scale)


def unpack(weight: torch.Tensor, scale: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [n, k] and scale [n, G] from plain or packed ones, on any device."""
    return (weight, scale) if weight.dim() == 2 else (unpack_panels(weight, n, k).contiguous(), unpack_scales(scale, n))


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies in int8, x [..., K] quantised on the fly: float32 [..., n]. Weight and scale plain or packed."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.dim() == 4 and kernels_run(x) and kernel_is_fastest(rows):
        return shaped_like(x, torch.ops.tinyopt.int8_linear(rows, weight, scale, n, group_size, bias))
    weight, scale = unpack(weight, scale, n, x.shape[-1])
    if x.device.type == "cpu":
        return int8_linear_reference(x, weight, scale, group_size, bias)
    if (products := gpu_products(rows, group_size)) is not None:
        return finish(products.int8_product(rows, weight, scale, group_size, int8_activations=True), x, bias)
    quantized = quantize_groups(rows, group_size)
    if device_int8.serves("dynamic", weight, scale):
        return finish(device_int8.dynamic_product(*quantized, weight, scale), x, bias)
    # The same integers times the same scales, multiplied as float32: the twin takes three calls for every group.
    return finish(_multiply_expanded(dequantize_groups(*quantized, group_size), weight, scale, group_size), x, bias)


def int8_weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, n: int, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies float activations [..., K] with int8 weights: float32 [..., n]. Weight and scale plain or packed."""
    rows = x.reshape(-1, x.shape[-1])
    if weight.dim() != 4 or not kernels_run(x):
        weight, scale = unpack(weight, scale, n, x.shape[-1])
        if (products := gpu_products(rows, group_size if scale.shape[1] > 1 else None)) is not None:
            return finish(products.int8_product(rows, weight, scale, group_size, int8_activations=False), x, bias)
        few = x.device.type == "mps" or len(rows) <= GPU_KERNEL_ROWS  # CUDA's operator takes ten times as long for a prompt
        if x.device.type != "cpu" and few and device_int8.serves("weight-only", weight, scale):
            return finish(device_int8.weight_only_product(rows, weight, scale), x, bias)
        if x.device.type != "cpu":
            return finish(_multiply_expanded(rows, weight, scale, group_size), x, bias)
        return int8_weight_only_reference(x, weight, scale, group_size, bias)
    if kernel_is_fastest(rows):
        return shaped_like(x, torch.ops.tinyopt.int8_weight_only_linear(rows, weight, scale, n, group_size, bias))

    def expand(first: int, last: int) -> torch.Tensor:
        panels = slice(first // 16, -(-last // 16))
        return dequantize_groups(*unpack(weight[panels], scale[panels], last - first, x.shape[-1]), group_size)

    return finish(multiply_in_blocks(rows, n, expand), x, bias)


@torch.compiler.assume_constant_result
def _ready() -> bool:
    return load_kernels() is None


def kernels_run(x: torch.Tensor) -> bool:
    """Whether the C++ kernels can work on this tensor."""
    return x.device.type == "cpu" and _ready()


@torch.compiler.assume_constant_result
def _variant() -> str:
    return cpu_variant()


def kernel_is_fastest(rows: torch.Tensor) -> bool:
    """Whether no other way multiplies so many rows faster: everywhere but in portable C++, where only few are worth it."""
    return _variant() != "portable" or rows.shape[0] <= PORTABLE_KERNEL_ROWS


def gpu_products(rows: torch.Tensor, group_size: int | None):
    """kernels/triton_products.py where its kernels multiply these few rows: on a CUDA device, in groups (if any) of a power of
    two; else None."""
    if rows.device.type != "cuda" or len(rows) > GPU_KERNEL_ROWS or gpu_kernels() is not None:
        return None
    from kernels import triton_products  # its import needs Triton

    return triton_products if group_size is None or triton_products.serves_group(group_size) else None


def multiply_in_blocks(rows: torch.Tensor, n: int, expand: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """rows [M, K] times n output channels, of which `expand(first, last)` gives float32 weights [last - first, K]."""
    out = torch.empty(rows.shape[0], n, device=rows.device)
    block_bytes = BLOCK_BYTES if rows.device.type == "cpu" else DEVICE_BLOCK_BYTES
    step = max(16, block_bytes // (4 * rows.shape[1]) // 16 * 16)  # whole panels
    for first in range(0, n, step):
        last = min(first + step, n)
        out[:, first:last] = F.linear(rows.float(), expand(first, last))
    return out


def _multiply_expanded(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """rows [M, K], weight int8 [N, K] and scale [N, G], plain -> float32 [M, N]."""

    def expand(first: int, last: int) -> torch.Tensor:
        return dequantize_groups(weight[first:last], scale[first:last], group_size)

    return multiply_in_blocks(rows, len(weight), expand)


def _grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., K] -> [..., G, group_size], padded with zeros."""
    missing = -x.shape[-1] % group_size
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, group_size))


def shaped_like(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.view(*x.shape[:-1], out.shape[-1])


def finish(out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return shaped_like(x, out if bias is None else out + bias)
