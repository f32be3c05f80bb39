"""The next token from its logits."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from repertory.model.scheduler import Sequence

NEVER = -9999.0  # JSON has no infinity; this is what OpenAI writes
COLDEST = 1e-3  # below, the likeliest token is drawn anyway, and dividing by it may overflow


def new_sampler(seed: int | None) -> torch.Generator:
    """A random state of its own for one sequence, so that a seed gives the same draws whoever else is in the batch."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(logits_NV: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """One token for each of N sequences, as their requests say: greedy at temperature 0, else top-k, then top-p."""
    greedy = logits_NV.argmax(-1).tolist()
    return [
        best if sequence.request.temperature < COLDEST else _draw(logits_V, sequence)
        for best, logits_V, sequence in zip(greedy, logits_NV, sequences, strict=True)
    ]


def logprobs(logits_V: Tensor, token: int, count: int) -> list[tuple[int, float]]:
    """`token` and then the `count` likeliest, each with its log-probability before temperature, top-k and top-p."""
    logprobs_V = logits_V.float().log_softmax(-1).nan_to_num(nan=NEVER, neginf=NEVER)
    values, tokens = logprobs_V.topk(min(count, len(logprobs_V)))
    return [(token, float(logprobs_V[token])), *zip(tokens.tolist(), values.tolist(), strict=True)]


def _draw(logits_V: Tensor, sequence: Sequence) -> int:
    request = sequence.request
    kept = min(request.top_k or len(logits_V), len(logits_V))
    values, tokens = logits_V.topk(kept)  # sorted, so top-p is a cut
    probabilities = (values.double().cpu() / request.temperature).softmax(-1).nan_to_num()
    if not probabilities.any():  # this voice's own weights overflow; the others in the batch must not suffer for it
        return int(tokens[0])
    if request.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < request.top_p)  # the first token is always kept
    choice = torch.multinomial(probabilities, 1, generator=sequence.sampler)
    return int(tokens[int(choice)])
