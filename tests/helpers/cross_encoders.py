"""A cross-encoder with random weights, beside the model and rows of mining."""

import pytest
import torch
import transformers

from tests.helpers.mining_runs import data, mined, model  # noqa: F401  fixtures
from tests.helpers.toys import BERT, save_model


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A BertForSequenceClassification with random weights whose probabilities differ."""
    path = tmp_path_factory.mktemp("models") / "cross-encoder"
    save_model(path, "bert", tokenizer=True)
    torch.manual_seed(4)
    config = transformers.BertConfig(**BERT, vocab_size=30522, num_labels=1)
    stock = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * (1.0 if len(parameter) == 30522 else 0.2))
    stock.save_pretrained(path)
    return path
