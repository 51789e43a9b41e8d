"""What drafting gains: the share of drafted tokens that are accepted depends on the text, so it is measured on two kinds.

Only models whose decode loop drafts (`model.greedy_steps`) have such figures. The speed-up is against the very same model
decoding plainly, in the same process, pair by pair in turns.
"""

from __future__ import annotations

import torch

import benchmark
import interleave

NEW_TOKENS = 48


def measure(model, prompts: dict[str, list[list[int]]], *, new_tokens: int = NEW_TOKENS, pairs: int) -> dict | None:
    """What `kind_of_text` says of each kind of prompts (token ids); None without prompts or where none are drafted."""
    if benchmark.decode_steps(model) is benchmark.greedy_steps or not prompts:
        return None
    return {kind: kind_of_text(model, rows, new_tokens=new_tokens, pairs=pairs) for kind, rows in prompts.items()}


def kind_of_text(model, prompts: list[list[int]], *, new_tokens: int, pairs: int) -> dict:
    """Figures over all of `prompts` together.

    acceptance_rate: accepted / drafted tokens, null where none were drafted. tokens_per_pass: decoded tokens / forward passes.
    speedup: median ratio of decode speeds to plain decoding, of few pairs and therefore without an interval.
    identical: share of prompts with the very tokens of plain decoding.
    """
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]

    drafts, taken = benchmark.decode_steps(model), {}

    def block(name: str, steps) -> dict[str, float]:
        taken[name] = [benchmark.time_generation(model, ids, new_tokens=new_tokens, steps=steps) for ids in rows]
        return {"decode_tokens_per_s": len(rows) * (new_tokens - 1) / sum(timing.decode_s for timing in taken[name])}

    warm_ups = rows if model.device.type == "cuda" else rows[:1]  # there each length of a draft is recorded when first met
    for steps in (benchmark.greedy_steps, drafts):
        for ids in warm_ups:
            benchmark.time_generation(model, ids, new_tokens=new_tokens, steps=steps)
    comparison = interleave.interleave(
        lambda: block("plain", benchmark.greedy_steps), lambda: block("drafts", drafts), pairs=pairs
    )
    drafting, plain = taken["drafts"], taken["plain"]
    decoded, passes, drafted = len(rows) * (new_tokens - 1), sum(t.passes for t in drafting), sum(t.drafted for t in drafting)
    same = [torch.equal(ours.tokens, theirs.tokens) for ours, theirs in zip(drafting, plain, strict=True)]
    return {
        "prompts": len(rows), "new_tokens": new_tokens, "drafted": drafted,
        "acceptance_rate": (decoded - passes) / drafted if drafted else None, "tokens_per_pass": decoded / passes,
        "speedup": comparison.ratio("decode_tokens_per_s").median, "identical": sum(same) / len(same),
    }  # fmt: skip
