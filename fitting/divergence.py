"""How far a changed model's answers are from what they were, cheaply enough to be asked hundreds of times.

Pruning chooses by measuring: what does the model lose without this head, this block, on top of what is gone already? Two
things make a reading quick. Layers before the changed one are not run again. And of each position only a few tokens of the
vocabulary are asked about: in a small model the logits of all of them take as long as half of its layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_causal_mask

from devices import fast_products

PROBES, PROBE_LENGTH = 6, 256
POSITIONS = 64  # asked at a time: the rows of lm_head that they need are copied
LIKELIEST, DRAWN = 32, 32  # tokens of the vocabulary at each position: the first so many, and of the others


def probe_windows(windows: torch.Tensor, most: int = PROBES) -> torch.Tensor:
    """The few short windows that divergences are measured on, int64 [P, T]: beginnings of the first of `windows` [W, T], which
    are of all kinds of text (calibration.py)."""
    return windows[:most, :PROBE_LENGTH]


def layer_arguments(model, hidden: torch.Tensor) -> dict:
    """What a decoder layer is called with besides hidden states [B, T, H] of windows without padding."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    mask = create_causal_mask(
        config=model.config, inputs_embeds=hidden[:1], attention_mask=None, past_key_values=None, position_ids=positions
    )
    return {"position_embeddings": model.model.rotary_emb(hidden, position_ids=positions), "attention_mask": mask}


class Divergence:
    """KL divergence of a changed model to what it was at construction, on a few windows [P, T], in nats per token.

    An estimate, from `asked_tokens`: on SmolLM2 within a few percent of the whole vocabulary's, from 0.004 to 0.16 nats. The
    same tokens are asked every time, so that what two changes cost differs by what they do, not by what was drawn.
    Layers run in bfloat16 where the device multiplies it faster, logits are float32: rounded ones alone would be 0.001 nats.
    """

    @torch.inference_mode()
    def __init__(self, model, probes: torch.Tensor):
        if type(model.lm_head) is not torch.nn.Linear:
            raise ValueError("the output layer is no nn.Linear any more: prune before precision and quantization")
        self.model = model
        hidden = model.model.embed_tokens(probes)
        self._arguments = layer_arguments(model, hidden)
        self._entering = [hidden]
        self.follow()
        self._answers = [self.model.model.norm(rows).float() for rows in self._entering[-1]]
        generator = torch.Generator().manual_seed(0)
        everything = (model.lm_head(rows).float() for rows in self._answers)
        self._asked = [asked_tokens(logits, generator, likeliest=LIKELIEST, drawn=DRAWN) for logits in everything]

    @torch.inference_mode()
    def follow(self) -> None:
        """Take the model as it is now for the layers that later calls do not run; the answers compared with stay."""
        self._entering = self._entering[:1]
        for layer in self.model.model.layers:
            self._entering.append(self._run(layer, self._entering[-1]))

    @torch.inference_mode()
    def after(self, index: int, instead: Callable | None = None) -> float:
        """The divergence when only decoder layer `index` differs (runs as `instead`): layers before it are not run again."""
        layers = list(self.model.model.layers)[index:]
        layers[0] = instead or layers[0]
        hidden = self._entering[index]
        for layer in layers:
            hidden = self._run(layer, hidden)
        apart = 0.0
        for rows, before, (tokens, shares) in zip(hidden, self._answers, self._asked, strict=True):
            moved = self.model.model.norm(rows).float() - before
            apart += float(divergence_of(asked_logits(self.model.lm_head, moved, tokens), shares))
        return apart / hidden[..., 0].numel()

    def _run(self, layer, hidden: torch.Tensor) -> torch.Tensor:
        with fast_products(hidden.device):
            return layer(hidden, **self._arguments)


def asked_tokens(
    logits: torch.Tensor, generator: torch.Generator, *, likeliest: int, drawn: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that each position is asked about, int64 [T, A], and their shares of the distribution, float32 [T, A].

    logits float32 [T, V]. The `likeliest` have their probabilities as shares; those `drawn` from all others, some of them more
    than once, divide what is left. A vocabulary of no more than A tokens is asked whole.
    """
    chances = logits.softmax(-1)
    if (whole := chances.shape[-1]) <= likeliest + drawn:
        return chances.topk(whole)[::-1]
    likely, first = chances.topk(likeliest)
    rest = chances.scatter_(1, first, 0.0)
    left = rest.sum(-1, keepdim=True) / drawn
    weights = rest.clamp_min_(torch.finfo(torch.float32).tiny).cpu()  # where nothing is left, any stand for nothing
    others = torch.multinomial(weights, drawn, replacement=True, generator=generator).to(logits.device)
    return torch.cat([first, others], 1), torch.cat([likely, left.expand(others.shape)], 1)


def asked_logits(head: torch.nn.Linear, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the asked `tokens` [T, A] at hidden states `rows` [T, H], float32 [T, A]; the others are not computed."""

    def some(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tah,th->ta", head.weight[tokens].float(), rows)

    # Copied anew for the gradient: kept, those of a whole window would be more than all of its logits.
    parts = zip(rows.float().split(POSITIONS), tokens.split(POSITIONS), strict=True)
    return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])


def divergence_of(moved: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(p, q) in nats: p are the `shares` [T, A], and q has logits that lie `moved` [T, A] higher.

    log E_p[exp(d)] - E_p[d], in float64, which MPS lacks: the two are nearly equal.
    """
    moved, shares = moved.cpu().double(), shares.cpu().double()
    shares = shares / shares.sum(-1, keepdim=True)
    return ((moved + shares.log()).logsumexp(-1) - (shares * moved).sum(-1)).sum()
