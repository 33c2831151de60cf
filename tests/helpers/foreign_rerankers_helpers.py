"""Helpers of tests/cli/test_foreign_rerankers.py and other tests."""

from megatron_embed.api import open_any
from megatron_embed.errors import UserError
from tests.helpers import foreign_rerankers as toys


def own_scores(cases):
    """Of every (directory, query), or the sentence that refuses it."""
    found = []
    for directory, query in cases:
        try:
            model = open_any(directory, pooling=None, max_length=None, dtype=None, normalize=True)
            found.append(model.rerank(query, toys.DOCUMENTS).tolist())
        except UserError as error:
            found.append(str(error))
    return found
