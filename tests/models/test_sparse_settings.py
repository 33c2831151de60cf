"""What the files of a sparse model's directory say, and what of it is refused."""

import json

import pytest

from megatron_embed.errors import CheckpointError
from megatron_embed.models.saved_settings import read_saved_settings

MLM = "sentence_transformers.sparse_encoder.models.MLMTransformer"
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
CAUSAL = {"transformer_task": "text-generation", "module_output_name": "token_embeddings",
          "processing_kwargs": {"text": {"logits_to_keep": 0}}}


def directory(path, *, kind=MLM, transformer=None, pooling=None, whole=None):
    """A directory without weights."""
    modules = [kind, "sentence_transformers.sparse_encoder.models.SpladePooling"]
    files = {"config.json": {"model_type": "bert"}, "sentence_bert_config.json": transformer or {},
             "modules.json": [{"idx": index, "name": str(index), "path": folder, "type": name}
                              for index, (folder, name) in enumerate(zip(("", "1_SpladePooling"), modules,
                                                                         strict=True))],
             "1_SpladePooling/config.json": {"pooling_strategy": "max", "activation_function": "relu",
                                             **(pooling or {})},
             "config_sentence_transformers.json": whole or {"model_type": "SparseEncoder"}}
    (path / "1_SpladePooling").mkdir()
    for name, values in files.items():
        (path / name).write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind, transformer", [
    (MLM, {}), (TRANSFORMER, {"transformer_task": "fill-mask"}), (TRANSFORMER, CAUSAL)])
def test_sparse_directories_are_read(kind, transformer, tmp_path):
    saved = read_saved_settings(directory(tmp_path, kind=kind, transformer=transformer))
    assert saved.sparse
    assert (saved.similarity, saved.pooling, saved.vectors, saved.dense) == ("dot", None, None, ())


@pytest.mark.parametrize("changes, message", [
    ({"kind": TRANSFORMER}, "transformer_task = 'feature-extraction'.*fill-mask"),
    ({"kind": TRANSFORMER, "transformer": {**CAUSAL, "processing_kwargs": {}}}, "logits_to_keep = 1.*write 0"),
    ({"pooling": {"pooling_strategy": "sum"}}, "pooling_strategy"),
    ({"pooling": {"activation_function": "log1p_relu"}}, "activation_function"),
    ({"whole": {"model_type": "SentenceTransformer"}}, "names a SpladePooling"),
    ({"whole": {"model_type": "SparseEncoder", "similarity_fn_name": "cosine"}}, "compared by dot product"),
], ids=["states", "last token", "sum", "two logarithms", "kind", "cosine"])
def test_other_sparse_directories_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_saved_settings(directory(tmp_path, **changes))
