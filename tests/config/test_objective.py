"""Settings of the loss that do not go together, or with the data, are refused with the words of the rule."""

import pytest

from megatron_embed.config.evaluation import EvaluationConfig, EvaluationSet
from megatron_embed.config.objective import CONTRASTIVE, LABELLED_PAIRS, WITH_HARD_NEGATIVES, ObjectiveConfig
from megatron_embed.config.schema import DataConfig, EmbeddingConfig, ModelConfig, RunConfig, TrainFile, TrainingConfig
from megatron_embed.errors import ConfigError

QUERY_SIDE = TrainingConfig(query_side_only=True)
ALL = ("query_to_document", "query_to_query", "document_to_document", "document_to_query")


@pytest.mark.parametrize("settings, words", [
    ({"directions": ("query_to_query",)}, "objective.directions = .*must contain query_to_document"),
    ({"directions": ("query_to_document",) * 2}, "nothing twice"),
    ({"partition": "per_direction"}, "objective.partition = 'per_direction': needs objective.directions"),
    ({"partition": "per_direction", "directions": ALL}, "the other directions have no positive"),
    ({"mask_margin_type": "relative"}, "has no effect without objective.mask_margin"),
    ({"hardness": "hard_negatives"}, "not compatible with objective.hardness = 'hard_negatives'; set both or neither"),
    ({"hardness_strength": 5.0}, "is not compatible with objective.hardness = None"),
    ({"hardness": "hard_negatives", "hardness_strength": -1.0}, "objective.hardness_strength = -1.0: must be >= 0"),
    ({"temperature": 0.0}, "objective.temperature = 0.0: must be > 0"),
    ({"matryoshka_weights": (1.0, 0.0)}, "must be > 0 each"),
    ({"bias": -3.0}, "objective.bias = -3.0: has no effect with loss = 'info_nce', only with sigmoid; remove it"),
    ({"loss": "cosent", "directions": ALL}, "objective.directions = .*has no effect with loss = 'cosent'"),
    ({"loss": "cosine_similarity", "temperature": 0.1}, "has no effect with loss = 'cosine_similarity'"),
    ({"loss": "contrastive", "margin": -0.1}, "objective.margin = -0.1: must be >= 0 or null"),
    ({"loss": "kl_distillation", "teacher_temperature": 0.0}, "objective.teacher_temperature = 0.0: must be > 0"),
    ({"learnable_temperature": True, "temperature": 0.009}, "objective.temperature = 0.009: must be >= 0.01 if it"),
    ({"temperature_learning_rate": 0.1}, "has no effect without objective.learnable_temperature: true"),
    ({"learnable_temperature": True, "temperature_learning_rate": 0.0}, "temperature_learning_rate = 0.0: must be > 0"),
    ({"loss": "cosent", "learnable_temperature": True}, "only with info_nce, sigmoid; remove it"),
    ({"loss": "sigmoid", "hardness": "all_negatives", "hardness_strength": 1.0}, "has no effect with loss = 'sigmoid'"),
    ({"compatible_with": "old", "compatible_weight": 0.0}, "objective.compatible_weight = 0.0: must be > 0"),
    ({"compatible_weight": 2.0}, "compatible_weight = 2.0: has no effect without objective.compatible_with"),
    ({"compatible_texts": "a.jsonl"}, "compatible_texts = 'a.jsonl': has no effect without objective.compatible_with"),
    ({"loss": "cosent", "compatible_with": "old"}, "objective.compatible_with = 'old': has no effect with loss"),
    ({"loss": "triplet", "guide_model": "guide"}, "objective.guide_model = 'guide': has no effect with loss"),
    ({"loss": "embedding_distillation"}, "objective.teacher_model = None: must name the teacher's directory"),
    ({"teacher_model": "teacher"}, "only with embedding_distillation; remove it"),
    ({"teacher_projection": True}, "only with embedding_distillation; remove it"),
])
def test_settings_of_the_loss_that_do_not_go_together(settings, words):
    with pytest.raises(ConfigError, match=words):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize("objective, data, dims, words", [
    ({}, {"train": (TrainFile(path="a", in_batch_negatives=False),)}, (), "data.num_negatives = 0: without in-batch"),
    ({"loss": "cosent"}, {"num_negatives": 1}, (), "data.num_negatives = 1: .*takes pairs, which have no negatives"),
    ({"loss": "triplet"}, {}, (), "data.num_negatives = 0: .*compares a query's positive with its own hard negatives"),
    ({"loss": "triplet"}, {"num_negatives": 1, "num_positives": 2}, (), "data.num_positives = 2: .*one positive"),
    ({"loss": "cosent"}, {"train": (TrainFile(path="a", in_batch_negatives=False),)}, (), "has no in-batch negatives"),
    ({}, {"num_positives": 0}, (), "data.num_positives = 0: must be >= 1"),
    ({"matryoshka_weights": (1.0,)}, {}, (8, 4), r"must have one weight per entry of embedding.matryoshka_dims = \[8"),
    ({}, {}, (4, 8), "embedding.matryoshka_dims = .*largest first"),
    ({}, {}, (4, 4), "different dimensions"),
])
def test_settings_that_do_not_go_with_other_sections(objective, data, dims, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig(model=ModelConfig(path="m"), objective=ObjectiveConfig(**objective), data=DataConfig(**data),
                  embedding=EmbeddingConfig(matryoshka_dims=dims))


@pytest.mark.parametrize("objective, sections, words", [
    ({"vector_cache": "cache"}, {}, "objective.vector_cache = 'cache': no other model embeds texts"),
    ({"compatible_with": "old", "temperature": 1.0}, {"embedding": EmbeddingConfig(head="multi_vector")},
     "objective.compatible_with = 'old': this needs one dense vector for each text"),
    ({"guide_model": "guide", "temperature": 1.0}, {"embedding": EmbeddingConfig(head="multi_vector")},
     "objective.guide_model = 'guide': this needs one dense vector for each text"),
    ({"loss": "embedding_distillation", "teacher_model": "t"}, {"embedding": EmbeddingConfig(matryoshka_dims=(8,))},
     "a teacher's vectors have all their dimensions"),
    ({"loss": "cosent"}, {"training": QUERY_SIDE}, "training.query_side_only = True: .*trains documents too"),
    ({"negatives": "micro_batch"}, {"training": QUERY_SIDE}, "set it to global_batch"),
    ({"compatible_with": "old", "compatible_weight": 2.0}, {"training": QUERY_SIDE}, "which has that loss alone"),
    ({"directions": ALL}, {"training": QUERY_SIDE}, "only query_to_document and query_to_query have an effect"),
    ({}, {"training": QUERY_SIDE, "evaluation": EvaluationConfig(sts=(EvaluationSet(path="pairs.jsonl"),))},
     "evaluation.sts = .*documents come from the index"),
    ({}, {"training": QUERY_SIDE, "evaluation": EvaluationConfig(reranking=("lists.jsonl",))},
     "evaluation.reranking = .*documents come from the index"),
])
def test_settings_that_do_not_go_with_vectors_of_other_models(objective, sections, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig(model=ModelConfig(path="m"), objective=ObjectiveConfig(**objective), **sections)


def test_which_losses_couple_the_batch():
    assert all(ObjectiveConfig(loss=loss).couples_batch for loss in CONTRASTIVE)
    assert not any(ObjectiveConfig(loss=loss, negatives="micro_batch").couples_batch for loss in CONTRASTIVE)
    assert [loss for loss in LABELLED_PAIRS if ObjectiveConfig(loss=loss).couples_batch] == [
        "online_contrastive", "cosent", "angle"]
    assert not any(ObjectiveConfig(loss=loss).couples_batch for loss in WITH_HARD_NEGATIVES)
