"""CTranslate2's Generator, greedy, its own decoding loop; a callback stamps the time of each token.

Measures prefill and decode of TinyLlama's architecture as `benchmark.py` defines them: the first token belongs to prefill,
end-of-sequence ignored (the shortest length is the longest). CTranslate2 runs all of a prompt but its last token in one
pass and that one as the first step of decoding: both are in the time to the first token, all it lets us see of prefill.
On a CPU it has 8-bit weights and none of 4 bits (its AWQ kernels need CUDA); int8_bfloat16 needs a build and a CPU
that multiply bf16, and ends as `unsupported` elsewhere.

    python peers/ctranslate2_peer.py --peers-python .venv-peers/bin/python --quantization int8 -o results/peers
    python peers/ctranslate2_peer.py --peers-python .venv-peers/bin/python --quantization int8_bfloat16
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from peers import serving

QUANTIZATIONS = {"int8": 8, "int8_bfloat16": 8, "int4": 4}


class CTranslate2:
    """One generator with one worker of all threads; it keeps no cache between calls."""

    def import_library(self) -> str:
        import ctranslate2

        self.library = ctranslate2
        return ctranslate2.__version__

    def load(self, *, model: str, quantization: str, threads: int, prompt_ids: list[int], new_tokens: int) -> dict:
        ctranslate2 = self.library
        if quantization == "int4":
            raise serving.Unsupported("CTranslate2 has no 4-bit weights on a CPU (its AWQ kernels need CUDA)")
        if quantization not in ctranslate2.get_supported_compute_types("cpu"):
            raise serving.Unsupported(f"CTranslate2 {ctranslate2.__version__} offers no {quantization} on this CPU")
        options = {"compute_type": quantization, "inter_threads": 1, "intra_threads": threads}
        self.generator = ctranslate2.Generator(model, device="cpu", **options)
        words = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))
        self.prompt, self.new_tokens = [words[index] for index in prompt_ids], new_tokens
        return {"settings": {"compute_type": self.generator.compute_type}}

    def block(self) -> dict:
        stamps: list[float] = []

        def stamp(_result) -> bool:
            stamps.append(time.perf_counter())
            return False

        start = time.perf_counter()
        result = self.generator.generate_batch(
            [self.prompt], max_length=self.new_tokens, min_length=self.new_tokens, beam_size=1, sampling_topk=1,
            include_prompt_in_result=False, callback=stamp,
        )  # fmt: skip
        times = {"prefill_s": stamps[0] - start, "ttft_s": stamps[0] - start, "decode_s": stamps[-1] - stamps[0]}
        ids = result[0].sequences_ids[0]
        return times | {"tokens": min(len(stamps), len(ids)), "last_token": ids[-1]}


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serving.serve(CTranslate2())
    from peers import standalone

    raise SystemExit(standalone.main("ctranslate2", __doc__))
