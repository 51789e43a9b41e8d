"""Compiles every Triton kernel for a CUDA device that need not be there: types are checked here, not by the interpreter."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import bfloat16, float32, int8

from kernels import triton_products, triton_step

TYPES = dict.fromkeys(("x", "out", "residual", "update", "weight", "gate_up", "qkv", "cos", "sin", "q", "parts"), "*fp32") | {
    "scale": "*bf16", "minimum": "*bf16", "past": "*i32", "place": "*i64", "kv_of_head": "*i64", "eps": "fp32",
    "scaling": "fp32",
}  # fmt: skip
KINDS = [float32, bfloat16, int8]


def compile_kernel(kernel, types: dict | None = None, **constants) -> None:
    signature = {name: (TYPES | (types or {})).get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel, signature, constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()}
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


def main() -> None:
    size = {"GROUP": 64, "GROUPS": 8, "CHANNELS": 8}
    for weight in ("*fp32", "*fp16", "*bf16"):
        compile_kernel(triton_products._product, {"weight": weight}, ROUNDS=False, SCALED=False, SHARED=False, **size)
    for rounds, shared in ((True, False), (False, True), (True, True), (False, False)):
        compile_kernel(triton_products._product, {"weight": "*i8"}, ROUNDS=rounds, SCALED=True, SHARED=shared, **size)
    compile_kernel(triton_products._int4_product, {"weight": "*u8"}, PAIRS=32, GROUPS=8, CHANNELS=8)
    for adds in (True, False):
        compile_kernel(triton_step._add_rms_norm, ADDS=adds, WIDTH=2048)
    compile_kernel(triton_step._silu_mul, WIDTH=1024)
    for kind in KINDS:
        compile_kernel(triton_step._rope_append, KIND=kind, HALF=32)
        for mapped, splits in ((False, 1), (True, 4)):
            constants = {"KIND": kind, "MAPPED": mapped, "SPLITS": splits, "SPLIT": 256, "BLOCK": 64, "WIDTH": 64}
            compile_kernel(triton_step._attend, **constants)
    compile_kernel(triton_step._join, SPLITS=4, WIDTH=64)


if __name__ == "__main__":
    main()
