"""What the embedded model answers, written down: a change of loader, rotary rows, cache or scoring shows here."""

import pytest
import torch

import quality
from inference import generate_ids

pytestmark = pytest.mark.embedded

PROMPT = "The capital of France is"
CONTINUATION = [
    7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33,
]  # fmt: skip
PERPLEXITY = 28.891


def test_greedy_continuation(embedded):
    """24 tokens in float32: `Paris.` and what this model goes on to say."""
    prompt = torch.tensor([embedded.tokenizer(PROMPT).input_ids])
    output = generate_ids(embedded.model, prompt, max_new_tokens=24)[0, prompt.shape[1] :]
    assert output.tolist() == CONTINUATION
    assert embedded.tokenizer.decode(output).startswith(" Paris.\n\nThe answer is")


def test_perplexity(embedded_reference):
    """Four windows of 256 tokens of the Lee news corpus, documents 201 to 300, within 1 % of what was measured first."""
    summary = quality.baseline_summary(embedded_reference)
    assert summary["scored_tokens"] == 4 * 255
    assert summary["perplexity"] == pytest.approx(PERPLEXITY, rel=0.01)
