"""A small model of every family and variant with random weights, and how far its states are from Transformers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_embed.config.schema import RunConfig
from tests.helpers.families import token_states, whole_bin
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import random_texts, run_config

LENGTHS = (5, 17, 3, 40, 41, 2, 16, 61, 17)
TOKENS = 208
"""Bin size for all layouts: 202 real tokens and padding."""
BOUND = 1e-5
DECODER = {"vocab_size": 103, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
ENCODER = {"vocab_size": 103, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
           "intermediate_size": 48, "max_position_embeddings": 96, "hidden_dropout_prob": 0.0,
           "attention_probs_dropout_prob": 0.0}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1.0e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
"""Of the 8 frequencies of a head of 16, two stay, one is blended and five are divided."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", ENCODER),
    "RoBERTa": ("Roberta", ENCODER | {"type_vocab_size": 1}),
    "XLM-RoBERTa": ("XLMRoberta", ENCODER | {"type_vocab_size": 1, "num_hidden_layers": 5}),
    "Qwen2": ("Qwen2", DECODER),
    "Qwen3": ("Qwen3", DECODER | {"head_dim": 16}),
    "Qwen3-MoE": ("Qwen3Moe", DECODER | EXPERTS | {"head_dim": 16, "moe_intermediate_size": 20, "num_experts": 4,
                                                   "norm_topk_prob": True}),
    "Llama 2": ("Llama", DECODER | {"num_key_value_heads": 4, "num_hidden_layers": 5}),
    "Llama 3.x": ("Llama", DECODER | {"head_dim": 16, "rope_parameters": LLAMA3}),
    "Llama, linear rope": ("Llama", DECODER | {"rope_parameters": {"rope_type": "linear", "factor": 2.5,
                                                                   "rope_theta": 5.0e5}}),
    "Llama, biases": ("Llama", DECODER | {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", DECODER | {"sliding_window": None, "head_dim": 12}),
    "Mistral, window": ("Mistral", DECODER | {"sliding_window": 12}),
    "Mixtral": ("Mixtral", DECODER | EXPERTS | {"num_local_experts": 4, "num_hidden_layers": 5}),
}
"""Family -> prefix of Transformers' classes, settings. The vocabulary is odd, some numbers of layers too."""
WITH_EXPERTS = ("Qwen3-MoE", "Mixtral")
DECODERS = tuple(name for name in FAMILIES if "BERT" not in name)
LAYOUTS: dict[str, dict[str, int]] = {
    "1 rank": {}, "TP2": {"tensor_model_parallel_size": 2}, "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2}, "EP2": {"expert_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}}


def save_family(path: Path, name: str, model: str = "Model", dtype: torch.dtype = torch.float32,
                shard: str | None = None, **settings: Any) -> str:
    """A directory that Transformers writes: random weights, norms and biases; `model`: end of the class's name."""
    kind, base = FAMILIES[name]
    torch.manual_seed(3)
    built = getattr(transformers, f"{kind}{model}")(getattr(transformers, f"{kind}Config")(**base | settings))
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            # Strong routers, so that no expert is chosen by a rounding error.
            scale = 1.0 if len(parameter) == base["vocab_size"] or parameter_name.endswith("gate.weight") else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    built.to(dtype).save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return str(path)


def expected_states(directory: str, ids: Sequence[list[int]], **settings: Any) -> torch.Tensor:
    """[tokens, hidden] float32: last hidden states by Transformers in float64, each text alone.

    `settings` go into the model's forward call, as `is_causal`.
    """
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"  # the default's grouped product has no float64
    with torch.no_grad():
        states = [model(torch.tensor([text]), **settings).last_hidden_state[0] for text in ids]
    return torch.cat(states).float()


def all_token_states(configs: Sequence[RunConfig], ids: Sequence[list[int]]) -> list[Any]:
    """On every rank: `token_states` of each model."""
    return [token_states(config, ids, TOKENS) for config in configs]


def errors(directories: Sequence[str], layout: str, expected: Sequence[torch.Tensor], ids: Sequence[list[int]],
           *, bidirectional: bool = False) -> list[float]:
    """Largest difference of any token's states under a layout, for each model."""
    configs = [run_config(directory, parallel=LAYOUTS[layout], bidirectional=bidirectional)
               for directory in directories]
    ranks = 1 if layout == "1 rank" else 2
    per_rank = run_on_ranks(all_token_states, ranks, configs, ids)
    found = [whole_bin([parts[number] for parts in per_rank], config, TOKENS)[: len(wanted)]
             for number, (config, wanted) in enumerate(zip(configs, expected, strict=True))]
    return [float(torch.nan_to_num((states - wanted).abs(), nan=torch.inf).max())
            for states, wanted in zip(found, expected, strict=True)]


def texts() -> list[list[int]]:
    """Token ids of the texts that are compared; one holds RoBERTa's padding token, at its beginning and later."""
    found = random_texts(LENGTHS)
    for place in (0, 7, 8, 20):
        found[3][place] = 1
    return found
