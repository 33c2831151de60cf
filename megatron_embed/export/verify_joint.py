"""Are the joint heads of an export those that were trained? Transformers' model and the two files answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_embed.batch import TextVectors
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.errors import CheckpointError
from megatron_embed.evaluation.joint_vectors import text_vectors
from megatron_embed.export.verify import Report, compare_vectors, library_errors, load_transformers, token_states
from megatron_embed.models.joint_files import read_joint_heads


@dataclass(frozen=True, kw_only=True)
class JointProbe:
    """What the trained model gives for some texts."""

    ids: Sequence[Sequence[int]]
    """Ids of the tokens of each text."""
    rows: TextVectors
    """On the CPU, in this format."""
    format: JointFormat

    @property
    def dense(self) -> torch.Tensor:
        """[texts, hidden], the texts' own vectors."""
        return text_vectors(self.rows, self.format)


def compare_joint_heads(directory: str | Path, texts: Sequence[str], probe: JointProbe, *, minimum_cosine: float,
                        bidirectional: bool) -> Report:
    """Compute every token's vector and weight from the export's files with Transformers, and compare them with ours.

    Args:
        texts: those of the probe, for messages.
        minimum_cosine: of every token's vector with its weight behind it.
        bidirectional: a decoder whose tokens attend to the whole text.
    Raises:
        CheckpointError: the files cannot be loaded, or give something else.
    """
    directory = Path(directory)
    heads = read_joint_heads(directory)
    if heads is None:
        raise CheckpointError(f"{directory}: has no joint heads; the export must not be used")
    weight, bias, theirs = heads["weight"].float(), heads["bias"].float(), []
    with library_errors(directory, "Transformers"):
        model = load_transformers(directory)
        for ids in probe.ids:
            projected = torch.nn.functional.linear(token_states(model, ids, bidirectional)[1:], weight, bias)
            vectors = torch.nn.functional.normalize(projected[:, :-1], dim=1)
            theirs.append(torch.cat([vectors, projected[:, -1:].relu()], dim=1))
    starts = probe.rows.counts.cumsum(0) - probe.rows.counts + probe.format.dense_rows
    ours = [probe.rows.vectors[first:last, :-1] for first, last in zip(
        starts.tolist(), probe.rows.counts.cumsum(0).tolist(), strict=True)]
    named = [text for text, rows in zip(texts, theirs, strict=True) for _ in rows]
    return compare_vectors(directory, "Transformers with the joint heads", named, torch.cat(theirs), torch.cat(ours),
                           minimum_cosine, num_texts=len(texts))
