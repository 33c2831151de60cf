"""Settings of the loss that do not go together, or with the data, are refused with the words of the rule."""

import pytest

from megatron_embed.config.objective import CONTRASTIVE, LABELLED_PAIRS, WITH_HARD_NEGATIVES, ObjectiveConfig
from megatron_embed.config.schema import DataConfig, EmbeddingConfig, ModelConfig, RunConfig, TrainFile
from megatron_embed.errors import ConfigError

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


def test_which_losses_couple_the_batch():
    assert all(ObjectiveConfig(loss=loss).couples_batch for loss in CONTRASTIVE)
    assert not any(ObjectiveConfig(loss=loss, negatives="micro_batch").couples_batch for loss in CONTRASTIVE)
    assert [loss for loss in LABELLED_PAIRS if ObjectiveConfig(loss=loss).couples_batch] == [
        "online_contrastive", "cosent", "angle"]
    assert not any(ObjectiveConfig(loss=loss).couples_batch for loss in WITH_HARD_NEGATIVES)
