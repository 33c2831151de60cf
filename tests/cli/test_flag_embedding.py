"""Joint heads against FlagEmbedding's own classes, where that package is installed, as for none of the other tests."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.helpers.foreign_directories_helpers import change, save_directory
from tests.helpers.joint_reference import TOKEN_DIM, JointHeads, add_joint_heads, joint_loss, scores_of_texts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command

pytest.importorskip("FlagEmbedding")
pytestmark = pytest.mark.slow
TEXTS = ["the quick brown fox jumps over the lazy dog", "a fox, the dog; and the other dog", "tea is a drink",
         "what is a quick drink", "the capital of a country", "the dog drinks tea and the fox drinks too"]


@pytest.fixture
def directory(tmp_path):
    """BGE-M3's layout; as in its tokenizer, the token behind a text is its EOS."""
    path = add_joint_heads(save_directory(tmp_path / "model", kind="bert", pooling="cls"))
    change(path / "tokenizer_config.json", eos_token="[SEP]")
    return path


def flag_loss(directory, queries, documents, temperature):
    """(loss, gradients by parameter) of FlagEmbedding's training in float64; documents: two for each query."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model

    tokenizer, heads = AutoTokenizer.from_pretrained(directory), JointHeads(directory)
    base = {"model": AutoModel.from_pretrained(directory).double().eval(), **heads.layers}
    model = EncoderOnlyEmbedderM3Model(base, tokenizer=tokenizer, temperature=temperature, normalize_embeddings=True,
                                       unified_finetuning=True, use_self_distill=True)
    model.training = True
    inputs = [dict(tokenizer(texts, padding=True, return_tensors="pt")) for texts in (queries, documents)]
    loss = model(*inputs).loss
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for part, module in base.items()
                                  for name, parameter in ((f"{part}.{own}", value)
                                                          for own, value in module.named_parameters())}


def reference_loss(directory, queries, documents, temperature):
    """The same by the reference of this project's tests."""
    tokenizer, heads = AutoTokenizer.from_pretrained(directory), JointHeads(directory)
    model = AutoModel.from_pretrained(directory).double().eval()

    def given(text):
        ids = tokenizer(text)["input_ids"]
        return heads.of(ids, model(torch.tensor([ids])).last_hidden_state[0], "cls")

    scores = scores_of_texts(*zip(*map(given, queries), strict=True), *zip(*map(given, documents), strict=True))
    loss = joint_loss([score / temperature for score in scores], torch.arange(len(queries)) * 2, (1.0, 0.3, 1.0),
                      (1.0, 0.1, 1.0), distils=True).mean()
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for part, module in (("model", model), *heads.layers.items())
                                  for name, parameter in ((f"{part}.{own}", value)
                                                          for own, value in module.named_parameters())}


def test_the_reference_has_flag_embedding_s_loss_and_gradients(directory):
    texts = (directory, TEXTS[:3], [*TEXTS[3:], *TEXTS[:3]], 0.2)
    (theirs, their_gradients), (ours, our_gradients) = flag_loss(*texts), reference_loss(*texts)
    assert ours == pytest.approx(theirs, rel=1e-9)
    compared = 0
    for name, gradient in their_gradients.items():
        if gradient is not None and gradient.norm() > 0:
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-7, atol=1e-12)
            compared += 1
    assert compared > 30


def test_its_model_gives_our_vectors_and_weights(directory, tmp_path):
    from FlagEmbedding.inference.embedder.encoder_only.m3 import M3Embedder

    theirs = M3Embedder(str(directory), use_fp16=False, devices="cpu", colbert_dim=TOKEN_DIM).encode(
        TEXTS, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ours = SimpleNamespace()
    for name, suffix, options in (("dense", ".npy", []), ("sparse", ".npz", ["--head", "sparse"]),
                                  ("tokens", ".npy", ["--head", "multi_vector"])):
        output = tmp_path / f"{name}{suffix}"
        (result,) = run_on_ranks(command, 1, ["encode", "--model", str(directory), "--input",
                                              str(tmp_path / "texts.jsonl"), "--output", str(output), *options])
        assert result[0] == 0, result[2]
        setattr(ours, name, output)
    np.testing.assert_allclose(np.load(ours.dense), theirs["dense_vecs"], atol=2e-6)
    import scipy.sparse

    for row, weights in zip(scipy.sparse.load_npz(ours.sparse).toarray(), theirs["lexical_weights"], strict=True):
        assert {str(token): row[token] for token in row.nonzero()[0]} == pytest.approx(dict(weights), abs=2e-6)
    offsets = np.load(str(ours.tokens).replace(".npy", ".offsets.npy"))
    for first, last, rows in zip(offsets, offsets[1:], theirs["colbert_vecs"], strict=False):
        np.testing.assert_allclose(np.load(ours.tokens)[first:last], rows, atol=2e-6)
