"""A thousand real texts through all-MiniLM-L6-v2: Sentence Transformers' vectors, packed or not, at TP 1 and 2."""

import dataclasses
import json

import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import MINI_EN, MINILM, layout

pytestmark = pytest.mark.slow
NUM_TEXTS = 1000


def real_texts():
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()]
    texts = list(dict.fromkeys([row["query"] for row in rows] + [text for row in rows for text in row["positive"]]
                               + [text for row in rows for text in row["negatives"]]))
    return texts[:NUM_TEXTS // 2] + texts[-NUM_TEXTS // 2:]


@pytest.fixture(scope="module")
def expected():
    texts = real_texts()
    assert len(set(texts)) == NUM_TEXTS
    return texts, torch.from_numpy(SentenceTransformer(str(MINILM), device="cpu").encode(texts))


def _encode(texts, parallel, micro_batch_tokens):
    from megatron_embed.config.schema import EmbeddingConfig, ModelConfig, ParallelConfig, RunConfig
    from megatron_embed.data.tokenizer import RoleTokenizer
    from megatron_embed.evaluation.encode import TextEncoder
    from megatron_embed.loading.model_directory import find_model, load_model_chunks
    from megatron_embed.parallel.topology import initialize

    config = RunConfig(model=ModelConfig(path=str(MINILM), dtype="float32"), parallel=ParallelConfig(**parallel),
                       embedding=EmbeddingConfig(pooling="mean"))
    topology, model = initialize(config.parallel), find_model(config.model.path)
    chunks = load_model_chunks(model, config, topology)
    length = model.saved.max_length
    tokenizer = RoleTokenizer(str(model.hf), add_eos=False, query_max_length=length, document_max_length=length)
    encoder = TextEncoder(chunks, topology, tokenizer, pooling="mean", dim=model.shape.hidden_size, kernel="sdpa",
                          causal=chunks[0].causal)
    encoder.packing = dataclasses.replace(encoder.packing, micro_batch_tokens=micro_batch_tokens)
    return encoder.encode(texts, "document")


@pytest.mark.parametrize("micro_batch_tokens", [8192, 1], ids=["packed", "one text a bin"])
@pytest.mark.parametrize("parallel", [layout(), layout(2)], ids=["1 rank", "TP2"])
def test_vectors_equal_sentence_transformers(expected, parallel, micro_batch_tokens):
    texts, vectors = expected
    ranks = run_on_ranks(_encode, parallel["tensor_model_parallel_size"], texts, parallel, micro_batch_tokens,
                         timeout_seconds=600.0)
    for encoded in ranks:
        assert (encoded - vectors).abs().max() <= 1e-5  # measured: 2.4e-7
