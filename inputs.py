"""What a run feeds the model: token ids of the timed prompt, of the prompts to continue, and of the quality windows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

import quality
from benchmark import test_prompts
from speculation import NEW_TOKENS
from texts import check_apart, load_text

SUMMARIES = 4


@dataclass(frozen=True)
class Inputs:
    """`input_ids` [B, depth + P]; `prompts` and their ids; `windows` [W, T] or None with random weights.

    `speculation` holds token ids of prompts by kind, for decode loops that draft; empty with random weights.
    """

    input_ids: torch.Tensor
    prompts: list[str]
    prompt_ids: list[list[int]]
    windows: torch.Tensor | None
    quality_protocol: dict | None
    speculation: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """One hash of everything that is fed to the model while timing and continuing."""
        return hashlib.sha256(repr((self.input_ids.tolist(), self.prompt_ids, self.speculation)).encode()).hexdigest()


def prepare(tokenizer, args, *, vocab_size: int) -> Inputs:
    """Tokenise once, outside every measurement: as many rows and tokens as the largest batch and depth need.

    `args` come from `cli.parse`. Without a tokenizer (random weights) ids are seeded random numbers.

    Raises ValueError, naming the flag, if the evaluation text is missing or too short, or a prompt is too long.
    """
    workload = args.workload
    rows = max([workload.batch_size, *(batch_size for _, batch_size in args.axes)])
    length = max([workload.depth, *(depth for depth, _ in args.axes)]) + workload.prompt_tokens
    if tokenizer is None:
        generator = torch.Generator().manual_seed(workload.seed)
        ids = torch.randint(vocab_size, (rows, length), generator=generator)
        return Inputs(ids, [], [], None, None)
    prompts = args.prompts or test_prompts
    prompt_ids = [tokenizer(prompt).input_ids for prompt in prompts]
    longest, positions = max(map(len, prompt_ids)) + workload.continuation_tokens, args.config.max_position_embeddings
    if longest > positions:
        flag = "--prompts-file: the" if args.prompts else f"--model {args.source.name}: the benchmark's"
        raise ValueError(
            f"{flag} longest prompt and its {workload.continuation_tokens} new tokens are {longest}: "
            f"{args.source.name} has {positions} positions"
        )
    text = load_text(text_file=args.text_file)
    if args.text_file is not None:
        check_apart(text)
    windows = quality.cut_windows(
        tokenizer(text.content).input_ids, windows=workload.quality_windows, window=workload.quality_window
    )
    protocol = {
        "text": text.name, "text_sha256": text.sha256, "windows": len(windows), "window": windows.shape[1],
        "stride": windows.shape[1], "chunk": workload.quality_chunk, "scored_tokens": windows.numel() - len(windows),
        "bos": "as the tokenizer sets it at the start of the text, none per window", "log_softmax": "float32",
    }  # fmt: skip
    return Inputs(
        input_ids=_timed_prompt(tokenizer, prompts, rows=rows, length=length),
        prompts=prompts,
        prompt_ids=prompt_ids,
        windows=windows,
        quality_protocol=protocol,
        speculation=speculation_prompts(tokenizer, longest=max(1, args.config.max_position_embeddings - NEW_TOKENS)),
    )


def speculation_prompts(tokenizer, *, longest: int) -> dict[str, list[list[int]]]:
    """Token ids by kind: `summarising` asks for the sense of a news story in its own words (of the calibration text), `free`
    are the benchmark's own prompts, which hold nothing to quote. As a chat where the model has a template for it.

    Stories are cut where a prompt would take more than `longest` tokens.
    """
    stories = [line for line in load_text("calibration").content.splitlines() if len(line) > 400][:SUMMARIES]
    asked = {
        "summarising": [f"Summarise this news story, quoting its own words: {story[: 2 * longest]}" for story in stories],
        "free": test_prompts,
    }

    def ids_of(text: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer(text).input_ids[:longest]
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)[-longest:]

    return {kind: [ids_of(text) for text in texts] for kind, texts in asked.items()}


def _timed_prompt(tokenizer, prompts: list[str], *, rows: int, length: int) -> torch.Tensor:
    """Exactly `length` tokens a row: the prompts, then calibration text (natural text; random ids degenerate).

    Row i starts at prompt i, so that the sequences of a batch differ.
    """
    filler = load_text("calibration").content
    ids = []
    for row in range(rows):
        start = row % len(prompts)
        text = "\n".join([*prompts[start:], *prompts[:start], filler[row * 97 :][: 8 * length + 1000]])
        row_ids = tokenizer(text).input_ids
        ids.append((row_ids * (length // len(row_ids) + 1))[:length])
    return torch.tensor(ids)
