"""llama.cpp through its own C interface: one `llama_decode` for the prompt, one for each token, greedy.

Measures prefill and decode of TinyLlama's architecture as `benchmark.py` defines them: logits of the last position only, the
first token belongs to prefill, end-of-sequence ignored. Defaults of the library: flash attention auto, float16 KV
cache, weights repacked for the CPU's vector units. Tokenising and detokenising are never inside.

    python peers/llama_cpp_peer.py --peers-python .venv-peers/bin/python --quantization Q8_0 -o results/peers
    python peers/llama_cpp_peer.py --peers-python .venv-peers/bin/python --quantization Q4_K_M --new-tokens 64 --threads 4
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from peers import serving

QUANTIZATIONS = {"F16": 16, "Q8_0": 8, "Q4_0": 4, "Q4_K_M": 4}  # bits of a weight, as these are commonly called


class LlamaCpp:
    """One model and one context of one sequence; its cache is emptied between blocks, outside the timing."""

    def import_library(self) -> str:
        import llama_cpp
        import numpy

        self.api, self.numpy = llama_cpp, numpy
        return llama_cpp.__version__

    def load(self, *, model: str, quantization: str, threads: int, prompt_ids: list[int], new_tokens: int) -> dict:
        llama_cpp = self.api
        self.new_tokens, self.prompt_tokens = new_tokens, len(prompt_ids)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {Path(model).name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = self.prompt_tokens + new_tokens
        options.n_batch = options.n_ubatch = max(512, self.prompt_tokens)
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp could not create a context")
        self.prompt = (ctypes.c_int32 * self.prompt_tokens)(*prompt_ids)
        self.token = (ctypes.c_int32 * 1)()
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return {
            "parameters": llama_cpp.llama_model_n_params(self.model),
            "weights_mb": llama_cpp.llama_model_size(self.model) / serving.MB,
            "settings": {"system": llama_cpp.llama_print_system_info().decode().strip()},
        }

    def block(self) -> dict:
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self._decode(self.prompt, self.prompt_tokens)
        api.llama_synchronize(self.context)
        prefilled = time.perf_counter()
        self.token[0] = self._greedy()
        first = time.perf_counter()
        for _ in range(self.new_tokens - 1):
            self._decode(self.token, 1)
            self.token[0] = self._greedy()
        end = time.perf_counter()
        times = {"prefill_s": prefilled - start, "ttft_s": first - start, "decode_s": end - first}
        return times | {"tokens": self.new_tokens, "last_token": self.token[0]}

    def _decode(self, tokens, count: int) -> None:
        code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, count))
        if code != 0:
            raise RuntimeError(f"llama_decode ended with code {code}")

    def _greedy(self) -> int:
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serving.serve(LlamaCpp())
    from peers import standalone

    raise SystemExit(standalone.main("llama_cpp", __doc__))
