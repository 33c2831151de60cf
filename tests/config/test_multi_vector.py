"""Settings that do not go with a vector per token, or have no effect without."""

import pytest

from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.run_checks import check_score_temperature
from megatron_embed.config.schema import EmbeddingConfig
from megatron_embed.config.vector_format import (
    PUNCTUATION,
    QueryExpansion,
    VectorFormat,
    format_of_run,
    why_query_length_is_idle,
    with_format,
)
from megatron_embed.errors import ConfigError

MULTI = ["model.path=m", "embedding.head=multi_vector", "objective.temperature=1"]
REFUSED = {
    "pooling": (["embedding.pooling=mean"], "embedding.pooling = 'mean'.*nothing is pooled"),
    "matryoshka": (["embedding.matryoshka_dims=[64]"], "matryoshka_dims.*keep all their dimensions"),
    "loss": (["objective.loss=triplet", "objective.temperature=0.02", "data.num_negatives=1"],
             "objective.loss = 'triplet'.*info_nce, margin_mse, kl_distillation"),
    "pairs": (["objective.loss=cosent"], "objective.loss = 'cosent'.*is not a loss with"),
    "directions": (["objective.directions=[query_to_document, query_to_query]"], "directions.*documents alone"),
    "sts": (["evaluation.sts=[a.jsonl]"], "evaluation.sts.*not two texts alike"),
    "formats": (["checkpoint.directory=a", "checkpoint.export_at_end=b", "checkpoint.export_formats=[onnx]"],
                "export_formats.*none of these formats holds such a model"),
    "attention": (["embedding.attend_to_expansion=true", "embedding.query_expansion=0"],
                  "attend_to_expansion.*no query is expanded"),
    "length": (["embedding.query_expansion=-1"], "query_expansion = -1.*>= 0"),
    "reranker": (["task=reranker", "objective.loss=pointwise", "objective.temperature=0.02"],
                 "embedding.head = 'multi_vector'.*reranker"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_vector_per_token(name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        config_of_overrides([*MULTI, *overrides])


@pytest.mark.parametrize("length, words", [(16, "gives every query at least 32 tokens"), (32, None), (64, None)])
def test_an_expansion_that_cuts_no_query_leaves_longer_ones(length, words):
    vectors = VectorFormat(expansion=QueryExpansion(length=32, truncates=False))
    idle = why_query_length_is_idle(length, vectors)
    assert idle is None if words is None else words in idle
    assert why_query_length_is_idle(length, VectorFormat()) is why_query_length_is_idle(length, None) is None


@pytest.mark.parametrize("key, value", [("skiplist_words", '["."]'), ("query_expansion", "32"),
                                        ("attend_to_expansion", "true")])
def test_refused_with_one_vector(key, value):
    with pytest.raises(ConfigError, match=f"embedding.{key}.*one vector for a text"):
        config_of_overrides(["model.path=m", "embedding.head=dense", f"embedding.{key}={value}"])


def test_the_temperature_of_cosines_is_refused():
    with pytest.raises(ConfigError, match=r"temperature = 0.02.*>= 0.1.*usual: 1"):
        check_score_temperature(config_of_overrides(["model.path=m", "embedding.head=multi_vector"]))
    check_score_temperature(config_of_overrides(MULTI))
    check_score_temperature(config_of_overrides(["model.path=m", "embedding.head=multi_vector",
                                                  "objective.loss=margin_mse", "data.num_negatives=1"]))
    check_score_temperature(config_of_overrides(["model.path=m"]))


def test_what_is_not_set_is_the_model_s_own():
    own = VectorFormat(skiplist_words=("a",), expansion=QueryExpansion(length=20, attend=True, token="x"))
    taken = with_format(EmbeddingConfig(), own)
    assert taken == EmbeddingConfig(head="multi_vector", skiplist_words=("a",), query_expansion=20,
                                    attend_to_expansion=True)
    assert format_of_run(taken, own) == own
    assert with_format(EmbeddingConfig(), None) == EmbeddingConfig(head="dense")
    new = with_format(EmbeddingConfig(head="multi_vector"), None)
    assert format_of_run(new, None) == VectorFormat(skiplist_words=PUNCTUATION)
    changed = with_format(EmbeddingConfig(query_expansion=0, skiplist_words=()), own)
    assert format_of_run(changed, own) == VectorFormat()
    assert format_of_run(with_format(EmbeddingConfig(head="dense"), own), own) is None


def test_an_export_names_no_query_length_below_that_of_the_expansion():
    """Sentence Transformers does not load one; a run raises it in the same way."""
    from megatron_embed.config.vector_format import QueryExpansion, VectorFormat
    from megatron_embed.export.multi_vector import lengths
    from megatron_embed.models.saved_settings import SavedSettings

    for query, truncates, expected in ((8, False, 14), (20, False, 20), (8, True, None)):
        vectors = VectorFormat(expansion=QueryExpansion(length=14, truncates=truncates))
        keys = lengths(SavedSettings(vectors=vectors, role_lengths={"query": query, "document": 30}))
        assert (keys.get("query_length"), keys["document_length"], keys["query_expansion"]["length"]) == (
            expected, 30, 14)
