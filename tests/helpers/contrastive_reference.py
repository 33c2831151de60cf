"""The loss that `contrastive_gradients` differentiates in closed form, by autograd with all similarities at once."""

import torch
import torch.nn.functional as functional

from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, _Tile


def contrastive_loss(query: torch.Tensor, candidates: Candidates, settings: ContrastiveSettings, *, total: float,
                     weights: torch.Tensor | None = None) -> torch.Tensor:
    """Scalar, the weighted sum over these rows / total; differentiable with respect to the vectors."""
    rows, positives = len(query), candidates.positive_index
    anchors = {True: query, False: candidates.document[positives]}
    parts = [anchors[direction.startswith("query")] @ candidates.keys(direction).T for direction in settings.directions]
    similarity = torch.cat(parts, dim=1)
    widths = [part.shape[1] for part in parts]
    tile = _Tile(candidates, settings, widths, 0, rows)
    logits = similarity / settings.temperature
    bonus = tile._hardness_bonus(similarity.detach())
    if bonus is not None:
        logits = torch.cat([logits[:, : widths[0]] + bonus, logits[:, widths[0] :]], dim=1)
    for mask in tile._masks(similarity.detach()):
        if mask is not None:
            logits = logits.masked_fill(mask, float("-inf"))
    if settings.bias is not None:
        signs = torch.full_like(logits, -1.0).scatter_(1, positives[:, None], 1.0)
        losses = -functional.logsigmoid(signs * (logits + settings.bias)).sum(dim=1)
    else:
        spans = [logits] if settings.joint else list(torch.split(logits, widths, dim=1))
        normalizer = torch.stack([span.logsumexp(dim=1) for span in spans]).mean(dim=0)
        losses = normalizer - logits.gather(1, positives[:, None])[:, 0]
    return (losses if weights is None else losses * weights).sum() / total
