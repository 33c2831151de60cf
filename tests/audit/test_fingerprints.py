"""Fingerprints of a step's rows and texts: equal for every division, different for every change."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_embed.training.fingerprints import FIELDS, fingerprint, named
from tests.helpers.toys import MINILM, batch_of, real_records

ROWS = 8


def batch_with(records, micro_batch_size=2, first=0):
    batch = batch_of(str(MINILM), records, micro_batch_size=micro_batch_size, num_negatives=1, alignment=1,
                     uniform_size=False)
    return dataclasses.replace(batch, row_ids=torch.arange(first, first + len(records)))


def fields(*values):
    total = np.sum([value.view(np.int64) for value in values], axis=0)
    return named(total.tolist())


@pytest.fixture(scope="module")
def whole():
    return fields(fingerprint(batch_with(real_records(ROWS)), 0))


def test_any_division_has_the_same(whole):
    records = real_records(ROWS)
    assert fields(fingerprint(batch_with(records, 3), 0)) == whole
    halves = [fingerprint(batch_with(records[first : first + 4], 2, first), first) for first in (0, 4)]
    assert fields(*halves) == whole
    assert set(whole) == set(FIELDS) and whole["rows"] == whole["queries"] == ROWS


@pytest.mark.parametrize("change, different", [
    (lambda batch: dataclasses.replace(batch, row_ids=batch.row_ids.roll(1)), {"row_order"}),
    (lambda batch: dataclasses.replace(batch, row_ids=batch.row_ids + 1), {"row_order", "row_set"}),
    (lambda batch: dataclasses.replace(batch, positive_index=batch.positive_index.roll(1)), {"labels"}),
    (lambda batch: dataclasses.replace(batch, document_ids=batch.document_ids.roll(1)), {"labels"}),
    (lambda batch: dataclasses.replace(batch, num_truncated=99), {"truncated"})])
def test_changes_are_seen(whole, change, different):
    found = fields(fingerprint(change(batch_with(real_records(ROWS))), 0))
    assert {name for name in FIELDS if found[name] != whole[name]} == different


def test_one_token_is_seen(whole):
    """A changed token of a document changes the documents' hash, and not the queries'."""
    batch = batch_with(real_records(ROWS))
    micro = batch.micro_batches[0]
    micro.token_ids[int(micro.cu_seqlens[-1]) - 1] += 1
    found = fields(fingerprint(batch, 0))
    assert {name for name in FIELDS if found[name] != whole[name]} == {"document_set", "document_order"}
