"""The check that embeddings and scores are finite."""

import torch
from torch import Tensor

from megatron_embed.errors import UserError


def require_finite(values: Tensor, what: str, source: str = "") -> Tensor:
    """The values, [rows, dim] or [rows], unchanged.

    Args:
        what: the name of the rows in the message.
        source: the data set or the option that the message begins with.
    Raises:
        UserError: a row has a value that is not finite, which would win every comparison.
    """
    finite = torch.isfinite(values)
    if finite.dim() > 1:
        finite = finite.all(dim=-1)
    if bad := int((~finite).sum()):
        prefix = f"{source}: " if source else ""
        raise UserError(f"{prefix}{bad} of {finite.numel()} {what} are not finite; the model has diverged or "
                        "overflowed; use an earlier checkpoint or a wider dtype")
    return values
