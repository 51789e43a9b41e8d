"""Prompt lookup decoding: what comes next is guessed from what was said before, and the model only checks the guess.

Idea    The longest run of last tokens that occurred before, in its latest place, was followed by something: draft that. One
        forward pass judges the whole draft, for a pass over few rows reads the same weights as one over a single row. Tokens
        are kept as far as the model's own greedy choice agrees, and its choice comes after them: a pass gives one token at
        least, and the output is that of plain greedy decoding, whatever was drafted. No second model, no training.
Helps   Where the answer quotes the prompt or repeats itself: summaries, edits, code, questions about a text.
Loses   A rejected token costs its row: little where decode waits for memory, a tenth of a pass on a small int8 model, so free
        text gains nothing. A draft is therefore no longer than twice its match. One sequence at a time: batches decode plainly.
Exact   Token for token where a pass over few rows gives the bits of single rows: packed recipes (int8, int4, bf16) under
        lean_decode, on a CPU with the kernels or on CUDA. `apply` tries it and notes the outcome. Other products (float32 by a
        BLAS library) add in another order for several rows, which could tip a near-tie between two tokens: where the best two
        are nearer than such passes differ, the token is judged again, alone.
Papers  Saxena 2023: https://github.com/apoorvumang/prompt-lookup-decoding; Leviathan et al. 2022, drafts that are checked:
        https://arxiv.org/abs/2211.17192. transformers (`prompt_lookup_num_tokens`) takes the first match of two tokens.
Writes  prompt_lookup_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/prompt_lookup.py
    python optimizations/prompt_lookup.py --draft-tokens 6 --ngram 3 --model smollm2-135m
    python run_optimization.py --recipes int8+lean,int8+lean+lookup
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

import benchmark
import cli
from devices import Unsupported
from inference import Inference
from kernels.modules import add_notes
from kernels.step import FEW_ROWS

LONGEST_MATCH = 64  # longer ones are not told apart: the latest wins
DOUBT = 4  # times what passes over several rows and single ones were seen to differ by: nearer logits are judged again


def apply(model, *, draft_tokens: int = 10, ngram: int = 2):
    """Give the model a decode loop that drafts up to `draft_tokens` tokens where `ngram` or more of the last ones recur.

    Last of all techniques: it changes no weight and notes whether drafts are judged bit for bit as single tokens are.
    Raises ValueError if it was applied before or the model's cache cannot forget rejected tokens; Unsupported for random
    weights, which fall into loops: any figure would be about these.
    """
    check(model.config, draft_tokens=draft_tokens, ngram=ngram)
    if getattr(model, "greedy_steps", None) is not None:
        raise ValueError("this model has a decode loop of its own already: apply prompt_lookup once")
    if getattr(getattr(model, "source", None), "random_weights", False):
        raise Unsupported(
            "random weights write loops instead of text: what a draft from the prompt gains cannot be seen on them"
        )
    largest = judges_as_single(model, rows=draft_tokens + 1)
    doubt = DOUBT * largest
    model.greedy_steps = functools.partial(lookup_steps, draft_tokens=draft_tokens, ngram=ngram, doubt=doubt)
    exact = "bit for bit as single ones: the output is plain greedy decoding's"
    close = f"within {largest:.1g} of single ones' logits, and alone where the best two are nearer than {doubt:.1g}"
    note = f"drafts of up to {draft_tokens} tokens after {ngram} or more that recur, judged {close if largest else exact}"
    add_notes(model, note)
    return model


def check(config, *, draft_tokens: int, ngram: int) -> None:
    """What can be known before weights are loaded. Raises ValueError naming the flag."""
    if not 1 <= draft_tokens < FEW_ROWS:
        raise ValueError(f"--draft-tokens {draft_tokens}: choose 1 to {FEW_ROWS - 1}, as many rows as one pass takes cheaply")
    if not 1 <= ngram <= LONGEST_MATCH:
        raise ValueError(f"--ngram {ngram}: choose 1 to {LONGEST_MATCH} tokens")


def lookup_steps(
    model, ids: torch.Tensor, cache, *, new_tokens: int, draft_tokens: int, ngram: int, doubt: float = 0.0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As benchmark.greedy_steps, with several tokens a pass where drafts are right.

    A choice that a draft's pass made between logits nearer than `doubt` does not count: the next pass makes it, over one row.
    """
    if len(ids) > 1:  # rows would accept different numbers of tokens, and the cache has one length
        yield from benchmark.greedy_steps(model, ids, cache, new_tokens=new_tokens)
        return
    history = ids[0].tolist()
    left, alone = new_tokens, False
    while left > 0:
        draft = [] if alone else find_draft(history, limit=min(draft_tokens, left - 1), ngram=ngram)
        fed = ids.new_tensor([[history[-1], *draft]])
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=fed.shape[1]).logits
        choices = logits.argmax(-1).cpu()
        wrong = (place for place, token in enumerate(draft) if token != choices[0, place])
        kept = next(wrong, len(draft)) + 1
        if alone := bool(draft and doubt and (near := _near_ties(logits[0, :kept], doubt))):
            kept = near[0]
        if kept < len(fed[0]):
            cache.crop(kept - len(fed[0]))
        tokens = choices[:, :kept]
        history += tokens[0].tolist()
        left -= kept
        yield tokens, logits


def _near_ties(logits: torch.Tensor, doubt: float) -> list[int]:
    """Rows of `logits` [rows, V] whose best two are nearer than `doubt`."""
    best = logits.float().topk(2).values
    return (best[:, 0] - best[:, 1] < doubt).nonzero()[:, 0].tolist()


def find_draft(history: list[int], *, limit: int, ngram: int) -> list[int]:
    """What followed the longest earlier occurrence of the last tokens, the latest of equally long ones.

    Up to `limit` tokens and twice the match; none where fewer than `ngram` match. A match that reaches the end is read on
    into the draft itself, as in LZ77, so that what has begun to repeat is drafted as repeating.
    """
    tokens = np.asarray(history)
    ends = np.arange(1, len(history))  # an occurrence ends before this place, where its continuation begins
    matched = 0
    while matched < LONGEST_MATCH:
        longer = ends[ends > matched]
        longer = longer[tokens[longer - matched - 1] == tokens[-matched - 1]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    if matched < ngram:
        return []
    start, draft = int(ends[-1]), []
    for place in range(start, start + min(limit, 2 * matched)):
        draft.append(history[place] if place < len(history) else draft[place - len(history)])
    return draft


@torch.inference_mode()
def judges_as_single(model, *, rows: int) -> float:
    """Largest difference between logits of `rows` tokens in one pass and one by one: 0.0 where they are the same bits.

    Raises ValueError if the cache does not come back to where it was when the tokens are cropped from it.
    """
    ids = torch.randint(model.config.vocab_size, (1, 2 * rows), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = benchmark.new_cache(model)

    def logits_of(part: torch.Tensor) -> torch.Tensor:
        return model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=part.shape[1]).logits

    logits_of(ids[:, :rows])
    together = logits_of(ids[:, rows:])
    if not getattr(cache, "is_croppable", False):
        raise ValueError(f"prompt_lookup needs a cache that can be cropped, {type(cache).__name__} cannot")
    cache.crop(-rows)
    if cache.get_seq_length() != rows:
        raise ValueError(f"prompt_lookup needs a cache that can be cropped, {type(cache).__name__} kept rejected tokens")
    alone = torch.cat([logits_of(ids[:, place : place + 1]) for place in range(rows, 2 * rows)], 1)
    return (together - alone).abs().max().item()


class PromptLookupInference(Inference):
    """`PromptLookupInference().generate(prompt)`: load, look ahead in the prompt, answer as greedy decoding would.

    On top of another technique: `prompt_lookup.apply(model)` after it, then `inference.generate_ids(model, ids, ...)`.
    """

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    defaults = apply.__kwdefaults__
    parser.add_argument("--draft-tokens", type=int, default=defaults["draft_tokens"],
        help=f"longest draft, 1 to {FEW_ROWS - 1} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ngram", type=int, default=defaults["ngram"],
        help="fewest last tokens that must recur (default: %(default)s)")  # fmt: skip
    args = cli.parse(parser, argv)
    options = {name: getattr(args, name) for name in defaults}
    return experiment.run({"prompt_lookup": [("prompt_lookup", options)]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
