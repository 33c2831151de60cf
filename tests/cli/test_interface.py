"""`megatron_embed.load` in one plain process: the stock library's vectors, several models, clear refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification

from tests.helpers.ranks import REPOSITORY
from tests.helpers.toys import BERT, MINILM, save_model

TEXTS = ["What is tea?", "Tea is a drink.", "Der Zug fährt nach Köln.", "茶是一种饮料。", "\U00020bb7野家 \U0001f600"]
SCRIPT = """
import json, sys
import megatron_embed
light = not {"torch", "numpy", "megatron", "transformers"} & set(sys.modules)
import numpy as np
from megatron_embed.errors import ConfigError, CheckpointError
minilm, other, checkpoint, reranker, output = sys.argv[1:]
texts = json.loads(sys.stdin.read())
model = megatron_embed.load(minilm)
second = megatron_embed.load(other, pooling="cls", normalize=False, max_length=16)
third = megatron_embed.load(checkpoint)
one = model.encode(texts[0], role="query")
scorer = megatron_embed.load(reranker)
refusals = []
for action in (lambda: model.rerank("a", ["b"]), lambda: model.encode(texts, role="passage"),
               lambda: megatron_embed.load("/nowhere/at/all"), lambda: megatron_embed.load(minilm, pooling="max"),
               lambda: megatron_embed.load(minilm, max_length=100000), lambda: scorer.encode("a"),
               lambda: megatron_embed.load(reranker, pooling="cls"), lambda: model.encode(["a", 1]),
               lambda: model.encode("a\\ud800"), lambda: scorer.rerank("a", "b"), lambda: scorer.rerank(None, ["b"]),
               lambda: scorer.rerank("a"), lambda: scorer.rerank("a", ["b"], passages=["b"])):
    try:
        action()
    except (ConfigError, CheckpointError) as error:
        refusals.append(str(error))
empty = [list(model.encode([]).shape), list(scorer.rerank("a", []).shape)]
np.savez(output, first=model.encode(texts, role="query"), one=one, second=second.encode(texts),
         third=third.encode(texts), scores=scorer.rerank(texts[0], texts[1:]),
         passages=scorer.rerank(query=texts[0], passages=texts[1:]))
print(json.dumps({"light": light, "dim": model.dim, "similarity": model.similarity, "refusals": refusals,
                  "empty": empty, "dtype": str(one.dtype), "repr": [repr(model), repr(scorer)]}))
"""


def save_cross_encoder(path):
    """A small BERT with a score head and a real tokenizer."""
    save_model(path, "bert", tokenizer=True)
    torch.manual_seed(5)
    BertForSequenceClassification(BertConfig(**BERT, vocab_size=30522, num_labels=1, initializer_range=0.2)
                                  ).save_pretrained(path)
    return str(path)


def test_one_process_loads_several_models(tmp_path):
    from megatron_embed.convert.convert import hf_to_megatron

    other = save_model(tmp_path / "bert", "bert", tokenizer=True)
    hf_to_megatron(MINILM, tmp_path / "checkpoint")
    reranker = save_cross_encoder(tmp_path / "reranker")
    output = tmp_path / "vectors.npz"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(MINILM), other, str(tmp_path / "checkpoint"),
                           reranker, str(output)],
                          input=json.dumps(TEXTS), capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    told, vectors = json.loads(done.stdout.splitlines()[-1]), np.load(output)
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    assert told["light"], "import megatron_embed loads libraries"
    assert (told["dim"], told["similarity"], told["dtype"]) == (384, "cosine", "float32")
    for name in ("first", "third"):
        assert vectors[name] == pytest.approx(expected, abs=1e-5)
    assert vectors["one"] == pytest.approx(expected[0], abs=1e-5)
    assert vectors["second"].shape == (5, 32) and told["empty"] == [[0, 384], [0]]
    assert np.linalg.norm(vectors["second"], axis=1).min() > 1.5  # not normalized
    scores = CrossEncoder(reranker, device="cpu").predict([(TEXTS[0], text) for text in TEXTS[1:]])
    assert vectors["scores"].dtype == np.float32 and vectors["scores"] == pytest.approx(scores, abs=1e-4)
    assert np.ptp(scores) > 1e-3 and np.array_equal(vectors["passages"], vectors["scores"])
    assert told["repr"] == [f"Embedder('{MINILM}', family='bert', dim=384, pooling='mean', similarity='cosine')",
                            f"Reranker('{reranker}', family='bert', max_length=256)"]
    words = ("an embedding model, which gives vectors and no scores of pairs; load a reranker",
             "role = 'passage': must be 'query' or 'document'", "no such directory",
             "pooling = 'max': must be one of", "--max-length 100000 is longer than the model's 512 positions",
             "a reranker, which scores pairs and gives no vectors", "has no use for pooling or normalize",
             "texts[1] = 1 is a int; it must be a string", "texts[0] = 'a\\ud800': contains an unpaired surrogate at "
             "character 2", "documents = 'b': one text, where a list of them is expected",
             "query[0] = None is a NoneType", *2 * ["give the texts to score as documents"])
    for refusal, word in zip(told["refusals"], words, strict=True):
        assert word in refusal
