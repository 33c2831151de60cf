"""A toy model of every family and variant, and the error of its token states against Transformers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_embed.config.schema import RunConfig
from tests.helpers.internlm import EQUAL, stock_of, write_internlm
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import open_model, pack_all, random_texts, run_config

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
"""Llama 3's rope scaling: of the 8 frequencies of a head of 16, two stay, one is blended and five are divided."""
SMALL_IDS = {f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
"""Special token ids for configurations whose defaults exceed a small vocabulary."""
MODERNBERT = {"vocab_size": 103, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
              "intermediate_size": 48, "max_position_embeddings": 96, "local_attention": 12,
              "local_rope_theta": 50.0} | SMALL_IDS

T5 = {"vocab_size": 103, "d_model": 32, "d_kv": 12, "num_heads": 4, "num_layers": 4, "d_ff": 48, "dropout_rate": 0.0,
      "relative_attention_num_buckets": 12, "relative_attention_max_distance": 30}
DEBERTA = ENCODER | {
    "position_buckets": 16, "relative_attention": True, "position_biased_input": False, "share_att_key": True,
    "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
GEMMA = DECODER | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 10}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", ENCODER),
    "RoBERTa": ("Roberta", ENCODER | {"type_vocab_size": 1}),
    "XLM-RoBERTa": ("XLMRoberta", ENCODER | {"type_vocab_size": 1, "num_hidden_layers": 5}),
    "ModernBERT": ("ModernBert", MODERNBERT),
    "ModernBERT, biases of norms": ("ModernBert", MODERNBERT | {
        "norm_bias": True, "local_attention": 7, "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0e5},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
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
    "Gemma 2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 0.4}),
    "Gemma 2, no cap": ("Gemma2", GEMMA | {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "num_hidden_layers": 5,
        "layer_types": ["full_attention", *["sliding_attention"] * 4], "tie_word_embeddings": False}),
    "Gemma 3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 5, "sliding_window_pattern": 3, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
    "EmbeddingGemma": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 2, "use_bidirectional_attention": True,
                                              "sliding_window": 14}),
    "Phi-3": ("Phi3", DECODER | SMALL_IDS | {"num_key_value_heads": 4, "sliding_window": 12}),
    "Phi-4-mini's rope": ("Phi3", DECODER | SMALL_IDS | {"hidden_size": 64, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1.0e4, "partial_rotary_factor": 0.75}}),
    "GLM-4": ("Glm", DECODER | SMALL_IDS | {"head_dim": 8}),
    "GLM-4-0414": ("Glm4", DECODER | SMALL_IDS | {"head_dim": 16, "num_hidden_layers": 5, "attention_bias": False}),
    "NomicBERT": ("NomicBert", ENCODER),
    "Llama, yarn": ("Llama", DECODER | {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 8.0}}),
    "Qwen3, yarn": ("Qwen3", DECODER | {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1.0e3, "factor": 8.0, "original_max_position_embeddings": 16,
        "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "Phi-3, longrope": ("Phi3", DECODER | SMALL_IDS | {
        "original_max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1.0e4, "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 4.0, 8.0, 16.0]}}),
    "InternLM2": ("Llama", DECODER | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0e6, "factor": 2.0}}),
    "InternLM3": ("Llama", DECODER | {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "InternLM3, qkv_bias": ("Qwen2", DECODER | {"num_hidden_layers": 5}),
    "Mixtral": ("Mixtral", DECODER | EXPERTS | {"num_local_experts": 4, "num_hidden_layers": 5}),
    "DeBERTa-v3": ("DebertaV2", DEBERTA),
    "DeBERTa-v3, no buckets": ("DebertaV2", DEBERTA | {
        "position_buckets": -1, "max_relative_positions": 24, "type_vocab_size": 2, "num_hidden_layers": 5}),
    "T5": ("T5", T5 | {"num_layers": 5}),
    "T5 1.1": ("T5", T5 | {"feed_forward_proj": "gated-gelu"}),
}
"""Family -> prefix of Transformers' classes, settings. The vocabulary is odd, some numbers of layers too."""
WITH_EXPERTS = ("Qwen3-MoE", "Mixtral")
SLOW_GRID = ("ModernBERT", "ModernBERT, biases of norms", "T5", "T5 1.1", "Gemma 2", "Gemma 2, no cap", "Gemma 3",
             "EmbeddingGemma", "Phi-3", "Phi-4-mini's rope", "GLM-4", "GLM-4-0414", "NomicBERT", "Llama, yarn",
             "Qwen3, yarn", "Phi-3, longrope", "InternLM2", "InternLM3", "InternLM3, qkv_bias",
             "DeBERTa-v3", "DeBERTa-v3, no buckets")
"""Compared on one rank by default, under all layouts by the slow tests."""
CAUSAL_LM = tuple(name for name in FAMILIES if "BERT" not in name and "T5" not in name)
"""Families with a language-model head."""
DECODERS = tuple(name for name in CAUSAL_LM if name != "EmbeddingGemma")
"""Those that are causal by themselves."""
CLASSES = {"T5Model": "T5EncoderModel", "T5ForMaskedLM": "T5ForConditionalGeneration",
           "Gemma3TextForCausalLM": "Gemma3ForCausalLM"}
"""Transformers' class to build for a name that its family lacks or spells otherwise."""
LAYOUTS: dict[str, dict[str, int]] = {
    "1 rank": {}, "TP2": {"tensor_model_parallel_size": 2}, "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2}, "EP2": {"expert_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}}


def save_family(path: Path, name: str, model: str = "Model", dtype: torch.dtype = torch.float32,
                shard: str | None = None, **settings: Any) -> str:
    """A directory that Transformers writes: random weights, norms and biases; `model`: end of the class's name."""
    kind, base = FAMILIES[name]
    torch.manual_seed(3)
    model = f"{kind}{model}"
    built = getattr(transformers, CLASSES.get(model, model))(getattr(transformers, f"{kind}Config")(**base | settings))
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            # Strong routers, so that no expert is chosen by a rounding error.
            strong = parameter_name.endswith(("gate.weight", "relative_attention_bias.weight"))
            scale = 1.0 if len(parameter) == base["vocab_size"] or strong else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    own_code = name.startswith("InternLM")
    stock = Path(f"{path}{EQUAL}") if own_code else path
    built.to(dtype).save_pretrained(stock, **({"max_shard_size": shard} if shard else {}))
    if own_code:
        write_internlm(stock, path, int(name[8]))
    return str(path)


def expected_states(directory: str, ids: Sequence[list[int]], **settings: Any) -> torch.Tensor:
    """[tokens, hidden] float32: last hidden states by Transformers in float64, each text alone.

    `settings` go into the model's forward call, as `is_causal`.
    """
    directory = str(stock_of(directory))
    config = transformers.AutoConfig.from_pretrained(directory)
    auto = transformers.AutoModelForTextEncoding if config.model_type == "t5" else transformers.AutoModel
    model = auto.from_pretrained(directory, dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"  # the default's grouped product has no float64
    with torch.no_grad():
        states = [model(torch.tensor([text]), **settings).last_hidden_state[0] for text in ids]
    return torch.cat(states).float()


def token_states(config, ids, tokens):
    """(tp rank, cp rank, this rank's token states after the last layer); None before the last stage."""
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import run_schedule

    opened = open_model(config)
    for chunk in opened.chunks:
        chunk.eval()
        chunk.forward = chunk.token_states
    causal = opened.chunks[0].causal
    batch = to_device(pack_all(ids, config, tokens), opened.topology, "mean", kernel="sdpa", causal=causal,
                      shape=opened.chunks[0].shape)
    with torch.no_grad():
        rounds = opened.topology.pp_size if len(opened.chunks) > 1 else 1  # an interleaved pipeline takes no fewer
        outputs = run_schedule(opened.chunks, [batch] * rounds, opened.topology, lambda index: keep_output,
                               forward_only=True)
    topology = opened.topology
    return (topology.tp_rank, topology.cp_rank, outputs[0].squeeze(1)) if topology.is_last_stage else None


def keep_output(output, non_loss_data):
    return output


def whole_bin(parts, config, tokens):
    """[tokens, hidden] from the ranks' results of `token_states`."""
    from megatron_embed.models.segments import context_chunks
    from megatron_embed.parallel.topology import uses_sequence_parallel

    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    whole = torch.full((tokens, parts[-1][2].shape[1]), torch.nan)
    for tp_rank, cp_rank, states in filter(None, parts):
        held = torch.cat([torch.arange(*chunk) for chunk in context_chunks(tokens, cp_rank, cp)])
        whole[held.chunk(tp)[tp_rank] if uses_sequence_parallel(config.parallel) else held] = states
    return whole


def all_token_states(configs: Sequence[RunConfig], ids: Sequence[list[int]]) -> list[Any]:
    """`token_states` of each model. Called by all ranks."""
    return [token_states(config, ids, TOKENS) for config in configs]


def errors(directories: Sequence[str], layout: str, expected: Sequence[torch.Tensor], ids: Sequence[list[int]],
           *, bidirectional: bool = False) -> list[float]:
    """Largest difference of any token's states under a layout, for each model."""
    configs = [run_config(directory, parallel=LAYOUTS[layout], bidirectional=bidirectional)
               for directory in directories]
    ranks = 1 if layout == "1 rank" else 2
    per_rank = run_on_ranks(all_token_states, ranks, configs, ids)
    ours = [whole_bin([results[index] for results in per_rank], config, TOKENS)[: len(wanted)]
            for index, (config, wanted) in enumerate(zip(configs, expected, strict=True))]
    return [float(torch.nan_to_num((states - wanted).abs(), nan=torch.inf).max())
            for states, wanted in zip(ours, expected, strict=True)]


def texts() -> list[list[int]]:
    """Token ids of the texts that are compared; one holds RoBERTa's padding token, at its beginning and later."""
    ids = random_texts(LENGTHS)
    for position in (0, 7, 8, 20):
        ids[3][position] = 1
    return ids
