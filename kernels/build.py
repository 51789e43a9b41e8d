"""Compiles the C++ kernels on first use, and says in one sentence why they are missing where they cannot be had.

The library is written next to its final name and renamed into place: two processes that build at once both succeed,
and a killed build leaves neither a lock nor half a library behind.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from kernels.packing import pack_nibble_panels, pack_panels, pack_scales

HERE = Path(__file__).parent
SOURCES, HEADERS = sorted(HERE.glob("*.cpp")), sorted(HERE.glob("*.h"))
COMPILE_TIMEOUT_S = 600
NO_TRITON = "Triton is not installed (on Linux it comes with torch's build for CUDA)"
spent: dict[str, float] = {}  # "compiling_s", where this process compiled the kernels


def load_kernels() -> str | None:
    """Makes `torch.ops.tinyopt` available, compiling it the first time on a machine.

    Returns:
        None when the kernels are ready, else one sentence with the reason. Never raises. The answer is remembered for
        this process, except that TINYOPT_NO_KERNELS=1 is obeyed at every call. With TINYOPT_SANITIZE=1 they are compiled
        to end the process at the first access out of bounds or undefined operation (`make sanitize`).
    """
    return _switched_off("C++ kernels are ") or _load_once()


def no_kernels(device: torch.device) -> str | None:
    """Why this machine has no kernels for `device`, as far as that shows without compiling anything; else None."""
    if off := _switched_off():
        return off
    if device.type == "cuda" and not find_spec("triton"):
        return NO_TRITON
    try:
        _compiler()
    except RuntimeError as error:
        return str(error)
    return None


def gpu_kernels() -> str | None:
    """None where a CUDA device can run the Triton kernels, which compile themselves, else one sentence with the reason."""
    return _switched_off("Triton kernels are ") or _try_gpu_kernels()


def _switched_off(which: str = "") -> str | None:
    return f"{which}switched off by TINYOPT_NO_KERNELS=1" if os.environ.get("TINYOPT_NO_KERNELS") == "1" else None


@cache
def _try_gpu_kernels() -> str | None:
    """Triton compiles with the machine's C compiler and driver, for the card that is there: found is not yet able to run."""
    if not find_spec("triton"):
        return NO_TRITON
    try:
        from kernels.triton_step import self_check

        return self_check("cuda")
    except Exception as error:  # as for the C++ kernels: whatever goes wrong, the twins still work
        return f"Triton kernels are not available: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def cpu_variant() -> str:
    """Returns which inner loops the kernels use on this CPU: "amx", "avx512_bf16", "avx512_vnni", "avx2" or
    "portable".

    Raises:
        RuntimeError: the kernels are not available.
    """
    if reason := load_kernels():
        raise RuntimeError(reason)
    return torch.ops.tinyopt.cpu_variant()


def cpu_note() -> str:
    """What a record's notes say of the kernels on this CPU. Raises RuntimeError like `cpu_variant`."""
    return f"C++ kernels, {cpu_variant()}" + ("" if "-fopenmp" in _flags() else ", in one thread (no OpenMP)")


@cache
def _load_once() -> str | None:
    try:
        library = _library_path()
        if not library.exists():
            start = time.perf_counter()
            _compile(library)
            spent["compiling_s"] = time.perf_counter() - start
        torch.ops.load_library(library)
        _register_fakes()
        with torch.device("cpu"):  # whatever the default is
            return _self_check()
    except Exception as error:  # a kernel is an accelerator: whatever goes wrong, the twins still work
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"C++ kernels are not available: {first_line}"


def _compiler() -> str:
    """Returns the path of a compiler that understands GCC's target attributes and builtins: GCC or Clang, not MSVC."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError("no C++ compiler found (install g++ or clang++, or set CXX)")


def _flags() -> list[str]:
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    if os.environ.get("TINYOPT_SANITIZE") == "1":
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if sys.platform == "darwin":  # Apple's clang ships no OpenMP: the kernels then run in the calling thread
        return [*flags, "-undefined", "dynamic_lookup"]
    # The OpenMP runtime resolves to the one torch has loaded, so that both share one pool of threads.
    return [*flags, "-fopenmp"]


def _library_path() -> Path:
    """Returns where the library for these sources, this torch, compiler and kind of machine is or will be."""
    key = hashlib.sha256()
    for path in (*SOURCES, *HEADERS):
        key.update(path.read_bytes())
    key.update(repr((torch.__version__, _compiler(), _flags(), platform.machine(), sys.platform)).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch.utils import cpp_extension  # slow to import

        root = cpp_extension.get_default_build_root()
    return Path(root) / f"tinyopt_{key.hexdigest()[:16]}.so"


def _compile(library: Path) -> None:
    from torch.utils import cpp_extension

    library.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in library.parent.glob("tinyopt_build_*"):  # by a process that was killed
        if time.time() - abandoned.stat().st_mtime > 2 * COMPILE_TIMEOUT_S:
            shutil.rmtree(abandoned, ignore_errors=True)
    print("compiling kernels/*.cpp (once, half a minute) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="tinyopt_build_") as folder:
        built = Path(folder) / library.name
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
        compiler = [_compiler(), *_flags()]
        _run_all([[*compiler, "-c", *includes, str(source), "-o", to] for source, to in zip(SOURCES, objects, strict=True)])
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        _run_all([[*compiler, *objects, "-o", str(built), *libraries, "-ltorch_cpu", "-lc10", *_standard_library()]])
        with built.open("rb") as file:
            os.fsync(file.fileno())  # half a library, as a power failure would leave it, crashes who loads it
        built.replace(library)


def _standard_library() -> list[str]:
    """What makes the linker take the C++ library that torch has loaded. Where only its static twin is installed for compiling,
    the kernels would carry a copy of their own, and the first error message that one of them writes would crash."""
    if sys.platform != "linux":
        return []
    static_only = not _found_by_compiler("libstdc++.so") and _found_by_compiler("libstdc++.so.6")
    return ["-l:libstdc++.so.6"] if static_only else []


def _found_by_compiler(file: str) -> bool:
    """A file that GCC or Clang does not find it prints as it was asked for, without a folder."""
    answer = subprocess.run([_compiler(), f"-print-file-name={file}"], capture_output=True, text=True, check=False)
    return "/" in answer.stdout


def _run_all(commands: list[list[str]]) -> None:
    """All at once; RuntimeError with the first line that says what is wrong."""
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=COMPILE_TIMEOUT_S)
            if process.returncode != 0:
                lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
                raise RuntimeError("compile error: " + next((line for line in lines if "error" in line), lines[0]))
    finally:
        for process in running:
            process.kill()
            process.wait()


def _register_fakes() -> None:
    """Tells torch.compile the shapes of the results, so that it traces through the operators."""

    @torch.library.register_fake("tinyopt::int8_linear")
    @torch.library.register_fake("tinyopt::int8_weight_only_linear")
    def _(x, packed, scale, N, group_size, bias=None):
        return x.new_empty((x.shape[0], N), dtype=torch.float32)

    @torch.library.register_fake("tinyopt::int4_linear")
    def _(x, packed, scale, minimum, N, group_size, bias=None):
        return x.new_empty((x.shape[0], N), dtype=torch.float32)

    @torch.library.register_fake("tinyopt::bf16_linear")
    def _(x, packed, N, bias=None):
        return x.new_empty((x.shape[0], N), dtype=torch.float32)

    @torch.library.register_fake("tinyopt::add_rms_norm")
    def _(residual, update, weight, eps):
        return torch.empty_like(residual)

    @torch.library.register_fake("tinyopt::silu_mul")
    def _(gate, up):
        return gate.new_empty(gate.shape)

    @torch.library.register_fake("tinyopt::rope_append")
    def _(qkv, cos, sin, keys, values, key_scale, value_scale, past):
        head_dim, kv_heads = keys.shape[-1], keys.shape[1]
        return qkv.new_empty((*qkv.shape[:2], qkv.shape[-1] // head_dim - 2 * kv_heads, head_dim))

    @torch.library.register_fake("tinyopt::attend")
    @torch.library.register_fake("tinyopt::attend_prompt")
    def _(q, keys, values, key_scale, value_scale, length, scaling, kv_of_head=None):
        return q.new_empty((*q.shape[:2], q.shape[2] * q.shape[3]))

    @torch.library.register_fake("tinyopt::decoder_layer")
    def _(*_):
        return None


def _self_check() -> str | None:
    """Multiplies the largest int8 values, where inexact 8-bit instructions saturate, and compares with integers.

    Few rows and many, because they take different instructions.
    """
    k = 256
    signs = torch.arange(24).remainder(2).mul(2).sub(1)
    weight = (127 * signs)[:, None].expand(24, k).to(torch.int8)
    packed, half = pack_panels(weight), pack_panels(weight.bfloat16())
    codes, scale = (
        pack_nibble_panels(((signs + 1) * 15 // 2)[:, None].expand(24, k).byte()),
        pack_scales(torch.ones(24, 1).bfloat16()),
    )
    ops = torch.ops.tinyopt
    for rows in (1, 40):
        x = torch.tensor([127.0, -127.0], dtype=torch.float32).repeat(rows)[:rows, None].expand(rows, k)
        expected = (x[:, :1] * (127 * k * signs)).float()
        int4 = x[:, :1] * k * (signs + 1) * 15 / 2
        products = {
            "int8_linear": (ops.int8_linear(x, packed, scale, 24, k), expected),
            "int8_weight_only_linear": (ops.int8_weight_only_linear(x, packed, scale, 24, k), expected),
            "int4_linear": (ops.int4_linear(x, codes, scale, torch.zeros_like(scale), 24, k), int4),
            "bf16_linear": (ops.bf16_linear(x, half, 24), expected),
        }
        for name, (got, wanted) in products.items():
            if not torch.equal(got, wanted):
                return f"C++ kernels are wrong on this CPU: {name} of {rows} rows differs from exact arithmetic"
    return None
