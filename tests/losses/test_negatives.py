"""The mask of duplicates against a loop over texts."""

import pytest
import torch

from megatron_embed.losses import info_nce as module
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, contrastive_gradients
from megatron_embed.losses.negatives import duplicate_mask

BIG = 2**63 - 5


def by_loops(query_ids, positive_index, document_ids, given):
    mask = torch.zeros(len(query_ids), len(document_ids), dtype=torch.bool)
    for row, query in enumerate(query_ids.tolist()):
        texts = {text for owner, text in given.tolist() if owner == query}
        for column, text in enumerate(document_ids.tolist()):
            mask[row, column] = text in texts and column != positive_index[row]
    return mask


def test_by_hand():
    # Queries a, b, a with positives p, q, r; r is also another positive of b. Candidates: p q r p n r.
    mask = duplicate_mask(torch.tensor([7, -8, 7]), torch.tensor([0, 1, 2]), torch.tensor([1, BIG, -3, 1, 4, -3]),
                          torch.tensor([[7, 1], [-8, BIG], [7, -3], [-8, -3], [-8, 99]]))
    assert mask.tile(0, 3).int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]]
    assert torch.equal(mask.tile(1, 2), mask.tile(0, 3)[1:2])
    assert mask.tile(1, 1).shape == (0, 6)


def random_ids(seed, rows=9, candidates=23):
    """Few texts, so that nearly all of them repeat."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-BIG, BIG, (12,), generator=generator)
    query_ids = numbers[torch.randint(0, 5, (rows,), generator=generator)]
    document_ids = numbers[torch.randint(0, 10, (candidates,), generator=generator)]
    positive_index = torch.randperm(candidates, generator=generator)[:rows]
    extra = torch.stack([query_ids[:4], numbers[torch.randint(0, 12, (4,), generator=generator)]], dim=1)
    return query_ids, positive_index, document_ids, torch.cat(
        [torch.stack([query_ids, document_ids[positive_index]], dim=1), extra])


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop_over_texts_in_every_tile(seed):
    ids = random_ids(seed)
    mask, expected = duplicate_mask(*ids), by_loops(*ids)
    assert expected.any(dim=1).sum() > 4
    assert not expected.all()
    for tile in (1, 2, 4, 9):
        mask_by_tiles = torch.cat([mask.tile(first, min(first + tile, 9)) for first in range(0, 9, tile)])
        assert torch.equal(mask_by_tiles, expected)


def test_no_part_of_the_mask_is_larger_than_a_tile(monkeypatch):
    ids = random_ids(1)
    mask, sizes = duplicate_mask(*ids), []
    monkeypatch.setattr(module, "LOSS_TILE_ELEMENTS", 2 * 23)
    generator = torch.Generator().manual_seed(2)
    query, document = torch.randn(9, 4, generator=generator), torch.randn(23, 4, generator=generator)

    def tile(first, last):
        sizes.append(last - first)
        return mask.tile(first, last)

    sums = contrastive_gradients(query, Candidates(document=document, positive_index=ids[1], excluded=tile),
                              ContrastiveSettings(temperature=0.5), total=9).sums
    assert sizes == [2, 2, 2, 2, 1]
    assert sums.masked == by_loops(*ids).sum() > 0
    assert max(value.numel() for value in vars(mask).values() if isinstance(value, torch.Tensor)) < 9 * 23 / 4


def test_no_candidates_and_no_rows():
    empty = torch.zeros(0, dtype=torch.int64)
    mask = duplicate_mask(empty, empty, empty, torch.zeros(0, 2, dtype=torch.int64))
    assert mask.tile(0, 0).shape == (0, 0)
