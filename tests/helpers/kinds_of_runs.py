"""Kinds of training runs, by name: their models and settings."""

from typing import Any

ADAPTERS = {"lora": {"rank": 4, "alpha": 16}, "training": {"learning_rate": 1e-2}}
LATE_INTERACTION = {"head": "multi_vector", "embedding_dim": 16, "query_expansion": 24, "pooling": None}
JOINT = {"embedding": {"head": "joint", "pooling": "cls", "embedding_dim": 10}, "objective": {
    "temperature": 0.2, "score_weights": [1.0, 0.5, 0.8], "self_distillation": True}}
RUNS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "bidirectional": ("qwen3", {"model": {"bidirectional": True}}),
    "late_interaction": ("bert", {"embedding": LATE_INTERACTION, "objective": {"temperature": 1.0}}),
    "late_interaction_of_positives": ("bert", {"embedding": LATE_INTERACTION, "objective": {"temperature": 1.0},
                                               "data": {"num_positives": 2}}),
    "late_interaction_taught": ("bert", {"embedding": LATE_INTERACTION, "objective": {"loss": "margin_mse"}}),
    "sparse": ("sparse", {"embedding": {"head": "sparse", "pooling": None}, "objective": {
        "temperature": 2.0, "query_regularizer_weight": 0.01, "document_regularizer_weight": 0.01}}),
    "sparse_taught": ("sparse", {"embedding": {"head": "sparse", "pooling": None}, "objective": {
        "loss": "kl_distillation", "temperature": 2.0, "query_regularizer_weight": 0.01}}),
    "joint": ("bert", JOINT),
    "joint_in_micro_batches": ("bert", {**JOINT, "objective": {**JOINT["objective"], "negatives": "micro_batch"}}),
    "rounded": ("qwen3", {"embedding": {"precision": ["float32", "int8", "rescore"], "matryoshka_dims": [32, 16]},
                          "objective": {"temperature": 0.1}}),
    "guided": ("bert", {"objective": {"guide_model": "bert", "mask_margin": -0.02}}),
    "compatible": ("bert", {"objective": {"compatible_with": "bert"}}),
    "query_side": ("bert", {"training": {"query_side_only": True}}),
    "teacher": ("bert", {"objective": {"loss": "embedding_distillation", "teacher_model": "bert", "temperature": 0.02,
                                       "teacher_distance": "mse", "teacher_projection": True}}),
    "lora": ("qwen3", ADAPTERS),
    "nf4": ("wide", {"model": {"quantization": "nf4", "double_quantization": False}, **ADAPTERS}),
    "nf4_of_scales_too": ("wide", {"model": {"quantization": "nf4"}, **ADAPTERS}),
    "int8": ("wide", {"model": {"quantization": "int8"}, **ADAPTERS}),
    "adamw_8bit": ("qwen3", {"optimizer": {"name": "adamw_8bit"}}),
    "muon": ("qwen3", {"optimizer": {"name": "muon", "distributed": False}}),
    "three_layers": ("three_layers", {}),
    "workers": ("qwen3", {"data": {"workers": 2}}),
}
"""Name -> model and sections; the name of a model in `objective` stands for its directory."""


def sections_of(name, directories, rows):
    """The sections of one of RUNS, on rows with a negative each."""
    kind, sections = RUNS[name]
    objective = {key: directories.get(value, value) if isinstance(value, str) else value
                 for key, value in sections.get("objective", {}).items()}
    data = {"train": [rows], "num_negatives": 1, "shuffle": False, **sections.get("data", {})}
    return directories[kind], {**sections, "objective": objective, "data": data}
