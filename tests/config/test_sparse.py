"""Settings that do not go with sparse vectors, or have no effect without."""

import pytest

from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.run_checks import check_score_temperature
from megatron_embed.config.schema import EmbeddingConfig
from megatron_embed.config.vector_format import VectorFormat, with_format
from megatron_embed.errors import ConfigError

SPARSE = ["model.path=m", "embedding.head=sparse", "objective.temperature=1"]
REFUSED = {
    "pooling": (["embedding.pooling=mean"], "embedding.pooling = 'mean'.*head: sparse"),
    "normalize": (["embedding.normalize=true"], "embedding.normalize = True.*keep their length"),
    "width": (["embedding.embedding_dim=64"], "embedding_dim = 64.*as many numbers as the vocabulary"),
    "matryoshka": (["embedding.matryoshka_dims=[64]"], "matryoshka_dims.*keep all their dimensions"),
    "expansion": (["embedding.query_expansion=32"], "query_expansion = 32.*multi_vector"),
    "loss": (["objective.loss=triplet", "objective.temperature=0.02", "data.num_negatives=1"],
             "objective.loss = 'triplet'.*info_nce, margin_mse, kl_distillation"),
    "negatives": (["objective.negatives=micro_batch"], "objective.negatives.*global batch"),
    "directions": (["objective.directions=[query_to_document, query_to_query]"], "directions.*documents alone"),
    "adapters": (["lora.rank=8"], "lora.rank = 8.*vocabulary head"),
    "sts": (["evaluation.sts=[a.jsonl]"], "evaluation.sts.*not two texts alike"),
    "weight": (["objective.query_regularizer_weight=-1"], "query_regularizer_weight = -1.*>= 0"),
    "warmup": (["objective.regularizer_warmup_steps=-1"], "regularizer_warmup_steps = -1.*>= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_sparse_vectors(name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        config_of_overrides([*SPARSE, *overrides])


@pytest.mark.parametrize("key, value", [("query_regularizer", "l1"), ("document_regularizer_weight", "1e-3"),
                                        ("regularizer_warmup_steps", "10")])
def test_regularizers_are_refused_without_sparse_vectors(key, value):
    with pytest.raises(ConfigError, match=f"objective.{key}.*without embedding.head: sparse"):
        config_of_overrides(["model.path=m", "embedding.head=dense", f"objective.{key}={value}"])


def test_the_temperature_of_cosines_is_refused():
    with pytest.raises(ConfigError, match=r"temperature = 0.02.*>= 0.1.*sums over tokens"):
        check_score_temperature(config_of_overrides(["model.path=m", "embedding.head=sparse"]))
    check_score_temperature(config_of_overrides(SPARSE))


def test_the_head_is_the_model_s_own_where_it_is_not_set():
    assert with_format(EmbeddingConfig(), None, sparse=True) == EmbeddingConfig(head="sparse")
    assert with_format(EmbeddingConfig(head="dense"), None, sparse=True) == EmbeddingConfig(head="dense")
    assert with_format(EmbeddingConfig(head="sparse"), VectorFormat()).head == "sparse"


def test_weights_rise_to_their_values():
    objective = config_of_overrides([*SPARSE, "objective.query_regularizer_weight=4",
                                     "objective.regularizer_warmup_steps=10"]).objective
    assert [objective.regularizer_weights(step)[0] for step in (0, 5, 10, 99)] == [0.0, 1.0, 4.0, 4.0]
    assert objective.regularizer_weights(10)[1] == 3e-5
    linear = config_of_overrides([*SPARSE, "objective.query_regularizer_weight=4",
                                  "objective.regularizer_warmup_steps=10", "objective.regularizer_schedule=linear"])
    assert linear.objective.regularizer_weights(5)[0] == 2.0
    constant = config_of_overrides(SPARSE).objective
    assert constant.regularizer_weights(0) == (5e-5, 3e-5)
