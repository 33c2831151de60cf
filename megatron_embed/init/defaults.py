"""Defaults of other trainers that differ from ours, by the names of the table of their words."""

_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TRANSFORMERS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3,
                 "learning_rate": 5e-5, "lr_scheduler_type": "linear", "weight_decay": 0.0}
_FLAG = _TRANSFORMERS | {"query_max_len": 32, "passage_max_len": 128, "train_group_size": 8}
_TEVATRON = _TRANSFORMERS | {"train_group_size": 8, "warmup_ratio": 0.1, "lora_alpha": 64, "lora_dropout": 0.1,
                             "target_modules": _ALL_LINEAR}

DEFAULTS: dict[str, dict[str, object]] = {
    "Transformers": _TRANSFORMERS,
    "Sentence Transformers": _TRANSFORMERS | {"scale": 20.0},
    "FlagEmbedding": _FLAG | {"lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": _ALL_LINEAR},
    "FlagEmbedding embedding": {"temperature": 0.02, "pooling": "cls", "normalize": True},
    "FlagEmbedding reranker": {"max_length": 512},
    "Tevatron": _TEVATRON,
    "Tevatron embedding": {"temperature": 1.0, "pooling": "cls", "normalize": False, "query_max_len": 32,
                           "passage_max_len": 128, "lora_rank": 16},
    "Tevatron reranker": {"max_length": 512, "lora_rank": 8},
    "ms-swift": {"per_device_train_batch_size": 1, "num_train_epochs": 3, "weight_decay": 0.1, "adam_beta2": 0.95,
                 "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05},
    "ms-swift embedding": {"temperature": 0.1, "normalize": True},
    "ms-swift reranker": {"num_negatives": 7},
}
"""By trainer, and by trainer and task: Transformers 5.23, ms-swift 4.6, FlagEmbedding 1.4, Tevatron 3.0, Sentence
Transformers 6.2."""
