"""What a user of an optimised model holds: `Inference(...)` loads, `.generate(prompt)` answers.

Each technique's own small class (`QuantizedInference(...)` and so on) only puts its `apply` in the place of this one's.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig

import models
from benchmark import decode_steps, new_cache
from devices import pick_device
from streaming import takes_unread


class Inference:
    """A model with its tokenizer. `model` is anything `--model` takes; `device` auto, cpu, cuda or mps; options go to `apply`.

    Raises ValueError in one sentence for a model or device that cannot be had.
    """

    @staticmethod
    def apply(model):
        """The technique: none."""
        return model

    def __init__(self, model: str = "auto", *, device: str = "auto", **options):
        source = models.find_model(model)
        if source.notice:
            print(f"NOTE  {source.notice}")
        self.tokenizer = models.load_tokenizer(source)
        loaded = models.load_model(source, device=pick_device(device), read=not takes_unread(self.apply))
        self.model = self.apply(loaded, **options)

    def generate(self, prompt: str, *, max_new_tokens: int = 64, **generation_options) -> str:
        """The continuation of `prompt`, greedy unless told otherwise; options go to transformers' `generate`."""
        if self.tokenizer is None:
            raise ValueError("random weights have no words: choose a model with a tokenizer")
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        output = generate_ids(self.model, inputs.input_ids, max_new_tokens=max_new_tokens, **generation_options)
        return self.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def generate_ids(model, input_ids: torch.Tensor, *, max_new_tokens: int, **generation_options) -> torch.Tensor:
    """Continue `input_ids` [B, P], greedy unless told otherwise; returns prompt and continuation, [B, P + new].

    One sequence is decoded by the loop that the benchmark times. Several sequences, and any option (sampling, beams,
    penalties), go to transformers' `generate`, through the model's own KV cache.
    """
    if len(input_ids) == 1 and not generation_options:
        return _generate_by_steps(model, input_ids, max_new_tokens=max_new_tokens)
    options = {"do_sample": False} | generation_options
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=model.generation_config.pad_token_id, **options)
    config.eos_token_id = model.generation_config.eos_token_id
    mask = torch.ones_like(input_ids)
    cache = new_cache(model, room=input_ids.shape[1] + max_new_tokens)
    return model.generate(input_ids, attention_mask=mask, past_key_values=cache, generation_config=config)


@torch.inference_mode()
def _generate_by_steps(model, input_ids: torch.Tensor, *, max_new_tokens: int) -> torch.Tensor:
    """Greedy tokens of one sequence, up to and including the first end-of-sequence token."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    cache = new_cache(model, room=input_ids.shape[1] + max_new_tokens)
    logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    first = logits[:, -1:].argmax(-1)
    ids, new = torch.cat((input_ids, first), 1), first[0].tolist()
    if new[0] not in ends:
        for tokens, _ in decode_steps(model)(model, ids, cache, new_tokens=max_new_tokens - 1):
            new += tokens[0].tolist()
            if end := next((place for place, token in enumerate(new, 1) if token in ends), None):
                new = new[:end]
                break
    return torch.cat((input_ids, input_ids.new_tensor([new])), 1)
