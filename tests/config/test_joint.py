"""Settings that do not go with joint heads, or have no effect without."""

import pytest

from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import EmbeddingConfig
from megatron_embed.config.vector_format import JointFormat, VectorFormat, with_format
from megatron_embed.errors import ConfigError

JOINT = ["model.path=m", "embedding.head=joint"]
REFUSED = {
    "pooling": (["embedding.pooling=weightedmean"], "embedding.pooling = 'weightedmean'.*cls, mean, lasttoken"),
    "normalize": (["embedding.normalize=false"], "embedding.normalize = False.*unit vectors"),
    "matryoshka": (["embedding.matryoshka_dims=[64]"], "matryoshka_dims.*keep all their dimensions"),
    "precision": (["embedding.precision=[float32, int8]"], "embedding.precision.*head: joint"),
    "expansion": (["embedding.query_expansion=32"], "query_expansion = 32.*multi_vector"),
    "skip list": (["embedding.skiplist_words=[]"], "skiplist_words.*multi_vector"),
    "loss": (["objective.loss=sigmoid"], "objective.loss = 'sigmoid'"),
    "directions": (["objective.directions=[query_to_document, query_to_query]"], "directions.*documents alone"),
    "margin": (["objective.mask_margin=0.1"], "objective.mask_margin = 0.1.*other negatives"),
    "hardness": (["objective.hardness=all_negatives", "objective.hardness_strength=1"], "objective.hardness"),
    "guide": (["objective.guide_model=g", "objective.mask_margin=null"], "objective.guide_model.*one dense vector"),
    "adapters": (["lora.rank=8"], "lora.rank = 8.*adapter"),
    "quantization": (["model.quantization=nf4", "lora.rank=0"], "model.quantization"),
    "sts": (["evaluation.sts=[a.jsonl]"], "evaluation.sts.*not two texts alike"),
    "regularizer": (["objective.query_regularizer_weight=1"], "query_regularizer_weight.*without embedding.head: spa"),
    "two weights": (["objective.score_weights=[1, 1]"], "objective.score_weights.*one weight >= 0 each"),
    "negative": (["objective.score_loss_weights=[1, -1, 1]"], "objective.score_loss_weights.*one weight >= 0 each"),
    "nothing": (["objective.score_weights=[0, 0, 0]"], "objective.score_weights.*not all 0"),
    "format": (["checkpoint.export_at_end=e", "checkpoint.directory=d", "checkpoint.export_formats=[onnx]"],
               "checkpoint.export_formats.*holds such a model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_joint_heads(name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        config_of_overrides([*JOINT, *overrides])


@pytest.mark.parametrize("key, value", [("score_weights", "[1, 1, 1]"), ("score_loss_weights", "[1, 1, 1]"),
                                        ("self_distillation", "false")])
def test_settings_of_the_loss_are_refused_without_joint_heads(key, value):
    with pytest.raises(ConfigError, match=f"objective.{key}.*without embedding.head: joint"):
        config_of_overrides(["model.path=m", "embedding.head=dense", f"objective.{key}={value}"])


def test_a_reranker_has_no_joint_heads():
    with pytest.raises(ConfigError, match="embedding.head = 'joint'.*no vectors"):
        config_of_overrides([*JOINT, "task=reranker", "objective.loss=pointwise"])


def test_what_is_not_set_is_not_taken_from_other_heads():
    assert with_format(EmbeddingConfig(head="joint"), VectorFormat()) == EmbeddingConfig(head="joint")


def test_rows_of_a_text():
    assert JointFormat(hidden_size=1024, token_dim=1024).dense_rows == 1
    assert JointFormat(hidden_size=1024, token_dim=128).dense_rows == 8
    assert JointFormat(hidden_size=130, token_dim=128).dense_rows == 1
    assert JointFormat(hidden_size=131, token_dim=128).dense_rows == 2
