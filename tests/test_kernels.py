"""The C++ kernels against their twins in pure PyTorch, and the twins against plain arithmetic."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import device_int8, int4, int8, packing
from kernels.build import cpu_variant, load_kernels
from kernels.half import bf16_linear, bf16_linear_reference
from kernels.packing import pack_nibble_panels, pack_panels, pack_scales

SHAPES = [(1, 5), (7, 13), (40, 96), (64, 300), (449, 100), (576, 576)]  # N, K: also none a multiple of 16 or 4
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 129, 600]
GROUPS = [32, 64, 128, None]  # None: one scale per row


def make(m, n, k, group, seed=0):
    """Returns x [m, k], int8 weight [n, k], its scale and bias, with group resolved and usable for this k."""
    generator = torch.Generator().manual_seed(seed)
    group = k if group is None or group >= k else group
    x = torch.randn(m, k, generator=generator)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, -(-k // group), generator=generator) / 100 + 1e-3).bfloat16()
    return x, weight, scale, torch.randn(n, generator=generator), group


def assert_close(actual, expected, tolerance=1e-5):
    """Largest difference, relative to the largest value: single sums may cancel to almost nothing."""
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same(actual, expected):
    """Bit for bit, but in portable C++: that rounds products before it adds them, or not, as the compiler likes."""
    if cpu_variant() == "portable":
        assert_close(actual, expected, 2e-5)
    else:
        assert torch.equal(actual, expected)


def too_slow(m, n, k, size):
    """Made of the same calls as fewer rows."""
    return m * n * k > 20_000_000 and (cpu_variant() == "portable" or size != 64)


def float_tolerance(m):
    """More than 16 rows are rounded to bfloat16 where there is an instruction for it."""
    return 1e-5 if cpu_variant() not in int8.BF16_VARIANTS or m <= 16 else 1e-2


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("n,k", SHAPES)
def test_int8_products_equal_their_twins(kernels, n, k, group):
    for m in ROWS:
        x, weight, scale, bias, size = make(m, n, k, group)
        if too_slow(m, n, k, size):
            continue
        packed, scales = pack_panels(weight), pack_scales(scale)
        expected = int8.int8_linear_reference(x, weight, scale, size, bias)
        assert_same(kernels.int8_linear(x, packed, scales, n, size, bias), expected)
        assert_same(int8.int8_linear(x, packed, scales, n, size, bias), expected)
        assert_close(kernels.int8_linear(x, packed, scales, n, size), expected - bias)
        expected = int8.int8_weight_only_reference(x, weight, scale, size, bias)
        tolerance = float_tolerance(m)
        assert_close(kernels.int8_weight_only_linear(x, packed, scales, n, size, bias), expected, tolerance)
        assert_close(int8.int8_weight_only_linear(x, packed, scales, n, size, bias), expected, tolerance)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("n,k", SHAPES)
def test_int4_product_equals_its_twin(kernels, n, k, group):
    for m in ROWS:
        x, weight, _, bias, _ = make(m, n, k, None)
        if too_slow(m, n, k, group):
            continue
        size = min(group, k)
        codes, scale, minimum = int4.quantize_int4(weight.float() / 100, size)
        packed = packing.pack_nibble_panels(codes), pack_scales(scale), pack_scales(minimum)
        expected = int4.int4_linear_reference(x, codes, scale, minimum, size, bias)
        assert_same(kernels.int4_linear(x, *packed, n, size, bias), expected)
        assert_same(int4.int4_linear(x, *packed, n, size, bias), expected)


@pytest.mark.parametrize("n,k", SHAPES)
def test_bf16_product_equals_its_twin(kernels, n, k):
    for m in ROWS:
        if too_slow(m, n, k, 64):
            continue
        x, weight, _, bias, _ = make(m, n, k, None)
        half = weight.bfloat16() / 100
        expected = bf16_linear_reference(x, half, bias)
        assert_close(kernels.bf16_linear(x, pack_panels(half), n, bias), expected, float_tolerance(m))
        assert_close(bf16_linear(x, pack_panels(half), n, bias), expected, float_tolerance(m))


def test_few_rows_and_many_take_the_same_sums(kernels):
    """A draft that is checked 12 tokens at a time must come out as one token at a time would, bit for bit."""
    x, weight, scale, _, group = make(40, 96, 640, 64)
    codes, low, minimum = int4.quantize_int4(weight.float() / 100, 64)
    nibbles = packing.pack_nibble_panels(codes), pack_scales(low), pack_scales(minimum)
    packed, scales = pack_panels(weight), pack_scales(scale)
    for product in (
        lambda rows: kernels.int8_linear(rows, packed, scales, 96, group),
        lambda rows: kernels.int4_linear(rows, *nibbles, 96, 64),
        lambda rows: kernels.bf16_linear(rows[:12], pack_panels(weight.bfloat16()), 96),
    ):
        alone = torch.cat([product(row[None]) for row in x])
        together = product(x)
        assert torch.equal(product(x[:12]), alone[:12])
        assert torch.equal(together, alone[: len(together)])


@pytest.mark.parametrize("group", [32, 64, 1000])
@pytest.mark.parametrize("m", [17, 25, 31, 47, 101])
def test_blocks_of_rows_leave_nothing_out(kernels, m, group):
    """Rows that fill no block, a panel without a partner, a last group of 40 or 8 inputs; one bad row spoils no other."""
    x, weight, scale, bias, size = make(m, 40, 1000, group)
    codes, low, minimum = int4.quantize_int4(weight.float() / 100, size)
    nibbles = packing.pack_nibble_panels(codes), pack_scales(low), pack_scales(minimum)
    x[m - 2, 3] = float("nan")
    good = torch.arange(m) != m - 2
    products = {
        "int8": kernels.int8_linear(x, pack_panels(weight), pack_scales(scale), 40, size, bias),
        "int4": kernels.int4_linear(x, *nibbles, 40, size, bias),
        "weight_only": kernels.int8_weight_only_linear(x, pack_panels(weight), pack_scales(scale), 40, size, bias),
        "bf16": kernels.bf16_linear(x, pack_panels(weight.bfloat16()), 40, bias),
    }
    expected = {
        "int8": int8.int8_linear_reference(x, weight, scale, size, bias),
        "int4": int4.int4_linear_reference(x, codes, low, minimum, size, bias),
        "weight_only": int8.int8_weight_only_reference(x, weight, scale, size, bias),
        "bf16": bf16_linear_reference(x, weight.bfloat16(), bias),
    }
    for name, product in products.items():
        assert product[m - 2].isnan().all(), name
        if name in ("int8", "int4"):
            assert_same(product[good], expected[name][good])
        else:
            assert_close(product[good], expected[name][good], float_tolerance(m))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("m", [9, 70])
def test_result_does_not_depend_on_threads(kernels, m, threads):
    x, weight, scale, bias, group = make(m, 449, 1000, 64)
    packed, scale, half = pack_panels(weight), pack_scales(scale), pack_panels(weight.bfloat16())
    codes, low, minimum = int4.quantize_int4(weight.float() / 100, group)
    nibbles = packing.pack_nibble_panels(codes), pack_scales(low), pack_scales(minimum)

    def products() -> list[torch.Tensor]:
        return [
            kernels.int8_linear(x, packed, scale, 449, group, bias),
            kernels.int4_linear(x, *nibbles, 449, group, bias),
            kernels.int8_weight_only_linear(x, packed, scale, 449, group, bias),
            kernels.bf16_linear(x, half, 449),
        ]

    expected, before = products(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, products(), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", [32, 2048])
def test_largest_values_do_not_saturate(kernels, group):
    """With scale 1 every product and sum is an integer: the result must be equal, not close."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = 127.0 * (torch.randint(0, 2, (6 + 30 * (seed % 2), 2048), generator=generator) * 2 - 1)
        weight = (127 * (torch.randint(0, 2, (24, 2048), generator=generator) * 2 - 1)).to(torch.int8)
        x[0], weight[0], weight[1] = 127.0, 127, -127
        scale = torch.ones(24, 2048 // group)
        expected = (x.double() @ weight.double().T).float()
        packed, scales = pack_panels(weight), pack_scales(scale.bfloat16())
        assert torch.equal(kernels.int8_linear(x, packed, scales, 24, group), expected)
        assert torch.equal(int8.int8_linear_reference(x, weight, scale, group), expected)
        codes, none = torch.where(weight > 0, 15, 0).to(torch.uint8), torch.zeros_like(scales)
        expected = (x.double() @ codes.double().T).float()
        assert torch.equal(kernels.int4_linear(x, pack_nibble_panels(codes), scales, none, 24, group), expected)


def test_outliers_zeros_and_denormals_quantise_like_the_twin(kernels):
    x, _, _, _, group = make(6, 8, 128, 32)
    x[0] = 0
    x[1, 5] = 1e6
    x[2] *= 1e-44  # a scale of one denormal step: quotients above 127 must be cut
    x[3] = torch.arange(128) - 63.5  # ties
    x[4] *= 1e38
    identity = torch.eye(128, dtype=torch.int8)
    out = kernels.int8_linear(x, pack_panels(identity), pack_scales(torch.ones(128, 4).bfloat16()), 128, group)
    assert torch.equal(out, int8.dequantize_groups(*int8.quantize_groups(x, group), group))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_becomes_nan_and_the_others_stay(kernels, bad):
    x, weight, scale, bias, group = make(6, 20, 100, 32)
    scales = pack_scales(scale)
    clean = kernels.int8_linear(x, pack_panels(weight), scales, 20, group, bias)
    x[4, 77] = bad
    for product in (kernels.int8_linear, kernels.int8_weight_only_linear):
        out = product(x, pack_panels(weight.clamp(min=1)), scales, 20, group, bias)
        assert not out[4].isfinite().any() and out[[0, 1, 2, 3, 5]].isfinite().all()
    out = kernels.int8_linear(x, pack_panels(weight), scales, 20, group, bias)
    assert out[4].isnan().all() and torch.equal(out[:4], clean[:4]) and torch.equal(out[5], clean[5])
    assert int8.int8_linear_reference(x, weight, scale, group)[4].isnan().all()


def test_other_dtypes_and_strides(kernels):
    x, weight, scale, bias, group = make(10, 40, 96, 32)
    packed, scales = pack_panels(weight), pack_scales(scale)
    for dtype in (torch.bfloat16, torch.float16):
        expected = int8.int8_linear_reference(x.to(dtype), weight, scale, group, bias)
        assert_close(kernels.int8_linear(x.to(dtype), packed, scales, 40, group, bias), expected)
    expected = kernels.int8_linear(x[::2].contiguous(), packed, scales, 40, group, bias)
    assert torch.equal(kernels.int8_linear(x[::2], packed, scales, 40, group, bias), expected)
    batched = int8.int8_linear(x.view(2, 5, 96), packed, scales, 40, group, bias)
    assert_close(batched.view(10, 40), kernels.int8_linear(x, packed, scales, 40, group, bias))
    assert kernels.int8_linear(x[:0], packed, scales, 40, group, bias).shape == (0, 40)


@pytest.mark.parametrize("n,k", SHAPES)
def test_packing_round_trip(n, k):
    weight, scale = make(1, n, k, 32)[1:3]
    packed = pack_panels(weight)
    assert packed.shape == (-(-n // 16), -(-k // 64) * 16, 16, 4)
    assert torch.equal(packing.unpack_panels(packed, n, k), weight)
    half = weight.bfloat16()
    assert torch.equal(packing.unpack_panels(pack_panels(half), n, k), half)
    codes = weight.remainder(16).to(torch.uint8)
    assert torch.equal(packing.unpack_nibble_panels(packing.pack_nibble_panels(codes), n, k), codes)
    assert torch.equal(packing.unpack_scales(pack_scales(scale), n), scale)
    ids = torch.tensor([[0, n - 1]])
    assert torch.equal(packing.panel_rows(packed, ids, k), weight[ids])
    assert torch.equal(packing.scale_rows(pack_scales(scale), ids), scale[ids])


def test_bad_arguments_are_refused(kernels):
    x, weight, scale, bias, group = make(2, 16, 64, 32)
    packed, scales = pack_panels(weight), pack_scales(scale)
    with pytest.raises(RuntimeError, match="scales must be"):
        kernels.int8_linear(x, packed, scales[:, :1], 16, group)
    with pytest.raises(RuntimeError, match="scales must be"):
        kernels.int8_linear(x, packed, scales.float(), 16, group)
    with pytest.raises(RuntimeError, match="multiple of 4"):
        kernels.int8_linear(x, packed, scales, 16, 30)
    with pytest.raises(RuntimeError, match="packed must be"):
        kernels.int8_linear(torch.randn(2, 100), packed, scales, 16, group)
    with pytest.raises(RuntimeError, match="packed must be"):
        kernels.int8_linear(x, packed, scales, 17, group)
    with pytest.raises(RuntimeError, match="bias"):
        kernels.int8_linear(x, packed, scales, 16, group, bias[:3])
    with pytest.raises(RuntimeError, match="packed must be"):
        kernels.bf16_linear(x, packed, 16)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        kernels.int4_linear(x, packed.view(torch.uint8)[:, :8].contiguous(), scales, scales, 16, 36)


def test_torch_compile_sees_through(kernels):
    x, weight, scale, bias, group = make(3, 16, 64, 32)
    packed, scales, half = pack_panels(weight), pack_scales(scale), pack_panels(weight.bfloat16())

    def forward(x):
        y = int8.int8_linear(x, packed, scales, 16, group, bias)
        return y + int8.int8_weight_only_linear(x, packed, scales, 16, group) + bf16_linear(x, half, 16)

    assert torch.equal(torch.compile(forward, backend="aot_eager", fullgraph=True)(x), forward(x))


def test_quantisation_is_symmetric_and_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0, 0.0, 0.0, 0.0, 3.0]])
    q, scale = int8.quantize_groups(x, 4)
    assert q.tolist() == [[127, 0, 2, -2, -127, 0, 0, 0, 127]]
    assert_close(scale, torch.tensor([[1.0, 1.0, 3 / 127]]))
    assert_close(int8.dequantize_groups(q, scale, 4), q * scale.repeat_interleave(4, 1)[:, :9])


def test_twin_sums_long_groups_exactly():
    x, weight = torch.full((1, 5000), 127.0), torch.full((3, 5000), 127, dtype=torch.int8)
    x[0, 0] = 126.0
    out = int8.int8_linear_reference(x, weight, torch.ones(3, 1), 5000)
    assert (out == torch.tensor(126 * 127 + 4999 * 127 * 127, dtype=torch.float32)).all()


def test_without_kernels_the_twin_answers():
    code = (
        "import torch; from kernels import build, int8\n"
        "w = torch.ones(3, 5, dtype=torch.int8)\n"
        "assert 'TINYOPT_NO_KERNELS' in build.load_kernels() and int8.pack(w, w)[0] is w\n"
        "assert int8.int8_linear(torch.ones(2, 5), w, torch.ones(3, 1), 3, 5).shape == (2, 3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TINYOPT_NO_KERNELS": "1"})


def test_with_a_compiler_the_kernels_run():
    """Or else every test of a kernel is skipped, and one that is broken looks like one that is missing."""
    reason = load_kernels()
    assert reason is None or "no C++ compiler found" in reason or "TINYOPT_NO_KERNELS" in reason


def test_a_missing_compiler_is_a_reason_not_a_crash(tmp_path):
    code = "from kernels import build; print(build.load_kernels())"
    environment = os.environ | {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    for name in ("CXX", "TINYOPT_NO_KERNELS"):
        environment.pop(name, None)
    out = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert "no C++ compiler found" in out.stdout


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_integer_product_of_torch_is_exact_when_padded(rows):
    """`_int_mm` runs on a CPU too: the padding around it, made for CUDA, is checked here."""
    x, weight = torch.randn(rows, 64), torch.randn(24, 64)
    q, x_scale = int8.quantize_groups(x, 64)
    w, w_scale = int8.quantize_groups(weight, 64)
    expected = int8.int8_linear_reference(x, w, w_scale, 64)
    assert_close(device_int8.dynamic_product(q, x_scale, w, w_scale), expected)
    assert device_int8.serves("dynamic", w, w_scale)
    assert not device_int8.serves("dynamic", w, w_scale.expand(-1, 2)), "groups are beyond it"
    assert not device_int8.serves("dynamic", w[:23], w_scale[:23])


def test_half_precision_product_of_torch_is_close():
    x, weight = torch.randn(3, 64), torch.randn(24, 64)
    w, w_scale = int8.quantize_groups(weight, 64)
    expected = int8.int8_weight_only_reference(x, w, w_scale, 64)
    assert (device_int8.weight_only_product(x, w, w_scale) - expected).abs().max() < 0.02 * expected.abs().max()
