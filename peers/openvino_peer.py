"""OpenVINO's CPU plugin on the stateful model that optimum-intel exports: one inference for the prompt, one for each token.

Measures prefill and decode of TinyLlama's architecture as `benchmark.py` defines them: the first token belongs to prefill,
end-of-sequence ignored, greedy. The exported graph computes the logits of all positions; a slice put before lm_head leaves the
last, as openvino-genai does and as our own prefill does. Driven without openvino-genai's pipeline, which keeps the KV cache
of a prompt it has seen (prefix caching): on a repeated prompt its prefill would read one token. Defaults of the plugin
otherwise: bf16 where there is AMX, 8-bit KV cache, dynamically quantised activations; the record's evidence names them.

    python peers/openvino_peer.py --peers-python .venv-peers/bin/python --quantization int8 -o results/peers
    python peers/openvino_peer.py --peers-python .venv-peers/bin/python --quantization int4 --new-tokens 64
"""

from __future__ import annotations

import sys
import time

from peers import serving

QUANTIZATIONS = {"int8": 8, "int4": 4}
SETTINGS = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "INFERENCE_NUM_THREADS")
LAST = 2**31 - 1  # a slice that ends here ends with the axis


class OpenVino:
    """One compiled model and one infer request; its KV cache is its state, emptied between blocks outside the timing."""

    def import_library(self) -> str:
        import numpy
        import openvino

        self.numpy, self.core = numpy, openvino.Core()
        return openvino.__version__

    def load(self, *, model: str, quantization: str, threads: int, prompt_ids: list[int], new_tokens: int) -> dict:
        numpy, self.new_tokens = self.numpy, new_tokens
        graph = self.core.read_model(f"{model}/openvino_model.xml")
        notes = (
            None if _cut_to_last_position(graph) else ["lm_head could not be cut to the last position: prefill computes all"]
        )
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = self.core.compile_model(graph, "CPU", options)
        self.request = compiled.create_infer_request()
        self.prompt = numpy.array([prompt_ids], dtype=numpy.int64)
        self.beam = numpy.zeros(1, dtype=numpy.int32)
        self.mask = numpy.ones((1, len(prompt_ids) + new_tokens), dtype=numpy.int64)
        self.positions = numpy.arange(len(prompt_ids) + new_tokens, dtype=numpy.int64)[None]
        settings = {key: _plain(compiled.get_property(key)) for key in SETTINGS}
        return {"settings": settings, "notes": notes}

    def block(self) -> dict:
        self.request.reset_state()
        length = self.prompt.shape[1]
        start = time.perf_counter()
        token = self._next(self.prompt, 0)
        first = time.perf_counter()
        for step in range(self.new_tokens - 1):
            token = self._next(self.numpy.array([[token]]), length + step)
        end = time.perf_counter()
        times = {"prefill_s": first - start, "ttft_s": first - start, "decode_s": end - first}
        return times | {"tokens": self.new_tokens, "last_token": int(token)}

    def _next(self, ids, start: int):
        end = start + ids.shape[1]
        inputs = {"input_ids": ids, "attention_mask": self.mask[:, :end], "position_ids": self.positions[:, start:end]}
        outputs = self.request.infer(inputs | {"beam_idx": self.beam}, share_inputs=True, share_outputs=True)
        return outputs["logits"][0, -1].argmax()


def _cut_to_last_position(graph) -> bool:
    """Put a slice before lm_head, so that only the last position's logits are computed; False where the graph is another."""
    from openvino import opset13

    product = graph.output("logits").get_node().input_value(0).get_node()
    while product.get_type_name() in ("Convert", "Add", "Multiply") and product.get_input_size():
        product = product.input_value(0).get_node()
    if product.get_type_name() != "MatMul":
        return False
    bounds = [opset13.constant([value], dtype="int64") for value in (-1, LAST, 1, 1)]
    product.input(0).replace_source_output(opset13.slice(product.input_value(0), *bounds).output(0))
    graph.validate_nodes_and_infer_types()
    return True


def _plain(value):
    return value if isinstance(value, int | float | str | bool) else getattr(value, "to_string", value.__str__)()


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serving.serve(OpenVino())
    from peers import standalone

    raise SystemExit(standalone.main("openvino", __doc__))
