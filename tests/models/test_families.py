"""Every family against Transformers: token states under every layout, what config.json means, what is refused."""

import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.backbone import check_divisible, pipeline_layout
from megatron_embed.models.families import FAMILIES as READERS
from megatron_embed.models.families import model_shape
from megatron_embed.models.rope import rotary_factors, rotary_frequencies
from tests.helpers.families import (
    BOUND,
    DECODER,
    DECODERS,
    FAMILIES,
    LAYOUTS,
    LLAMA3,
    SLOW_GRID,
    WITH_EXPERTS,
    errors,
    expected_states,
    save_family,
    texts,
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tensor_files import edit_config
from tests.helpers.toys import open_model, pack_all, random_texts, run_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: save_family(folder / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def expected(models):
    return {name: expected_states(directory, texts()) for name, directory in models.items()}


def names_of(layout):
    names = WITH_EXPERTS if layout == "EP2" else tuple(FAMILIES)
    return names if layout == "1 rank" else [name for name in names if name not in SLOW_GRID]


def assert_close(models, layout, expected, names, **settings):
    measured = errors([models[name] for name in names], layout, [expected[name] for name in names], texts(), **settings)
    wrong = {name: error for name, error in zip(names, measured, strict=True) if not error <= BOUND}
    assert not wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_states_equal_transformers(models, expected, layout):
    assert all(states.std() > 0.5 for states in expected.values())
    assert_close(models, layout, expected, names_of(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("1 rank", "EP2")])
def test_token_states_of_the_other_families_equal_transformers(models, expected, layout):
    assert_close(models, layout, expected, SLOW_GRID)


def test_settings_of_the_toys_make_a_difference(models, expected, tmp_path):
    """A window, a rope scaling or an offset that nobody can see would prove nothing."""
    for name, settings in (("Mistral, window", {"sliding_window": None}), ("XLM-RoBERTa", {"pad_token_id": 0}),
                           ("Llama 3.x", {"rope_parameters": LLAMA3 | {"rope_type": "default"}}),
                           ("Llama, linear rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
                           ("ModernBERT", {"local_attention": 128}), ("T5", {"relative_attention_max_distance": 12}),
                           ("Gemma 2", {"attn_logit_softcapping": 50.0}), ("Gemma 3", {"query_pre_attn_scalar": 12}),
                           ("EmbeddingGemma", {"sliding_window": 64}),
                           ("ModernBERT", {"rope_parameters": {"sliding_attention": {"rope_type": "default",
                                                                                     "rope_theta": 160_000.0}}})):
        other = expected_states(save_family(tmp_path / f"{name} {settings}"[:40], name, **settings), texts())
        assert (other - expected[name]).abs().max() > 0.05, name


def test_bidirectional_decoders_equal_transformers_with_is_causal_false(models, expected):
    names = ("Qwen2", "Llama 3.x", "Mistral, window", "Mixtral")
    whole = {name: expected_states(models[name], texts(), is_causal=False) for name in names}
    assert all((whole[name] - expected[name]).abs().max() > 0.05 for name in names)
    assert_close(models, "CP2", whole, names, bidirectional=True)


def test_is_causal_false_of_a_config_is_read_by_us_as_by_transformers(models, expected, tmp_path):
    assert len(DECODERS) == 23
    directories = {name: save_family(tmp_path / name, name, is_causal=False) for name in DECODERS}
    assert all(model_shape(directory).bidirectional for directory in directories.values())
    whole = {name: expected_states(directory, texts()) for name, directory in directories.items()}
    assert all((whole[name] - expected[name]).abs().max() > 0.05 for name in DECODERS)
    assert_close(directories, "1 rank", whole, DECODERS)


def test_a_gemma_that_is_bidirectional_by_both_keys_has_transformers_wider_window(expected, tmp_path):
    """Its mask then counts the token at the border of the window in."""
    directory = save_family(tmp_path / "model", "EmbeddingGemma", is_causal=False)
    states = {"both": expected_states(directory, texts())}
    assert (states["both"] - expected["EmbeddingGemma"]).abs().max() > 0.05
    assert_close({"both": directory}, "1 rank", states, ["both"])


RELEASED = {
    "Llama 3.1": {"head_dim": 128, "rope_theta": 500000.0, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}},
    "Llama 3.2 1B": {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}},
    "original length beside rope_scaling": {"original_max_position_embeddings": 64, "rope_scaling": {
        "factor": 2, "high_freq_factor": 4, "low_freq_factor": 1, "rope_type": "llama3"}},
    "no original length": {"max_position_embeddings": 64, "rope_scaling": {
        "factor": 2.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}},
    "old spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "Qwen3 with YaRN": {"head_dim": 128, "rope_theta": 1.0e6, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "yarn, all keys": {"max_position_embeddings": 4096, "original_max_position_embeddings": 512, "rope_scaling": {
        "type": "yarn", "factor": None, "mscale": 0.8, "mscale_all_dim": 0.6, "beta_fast": 16, "beta_slow": 2,
        "truncate": False}},
    "yarn, its factor": {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 0.5}},
    "longrope": {"head_dim": 8, "original_max_position_embeddings": 48, "rope_scaling": {
        "type": "longrope", "short_factor": [1, 1.1, 1.5, 2.0], "long_factor": [1, 4.0, 8.0, 16.0]}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.5}},
    "Transformers 5": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1.0e6}},
}


@pytest.mark.parametrize("name", RELEASED)
def test_rotary_frequencies_equal_transformers_bit_for_bit(name, tmp_path):
    values = DECODER | {"model_type": "llama", "max_position_embeddings": 131072} | RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    shape = model_shape(tmp_path)
    assert rotary_factors(shape) == (factor,)
    assert torch.equal(expected, plain) == (name == "dynamic")
    assert torch.equal(rotary_frequencies(shape), expected[None])
    assert shape.longest_text == (48 if name == "longrope" else config.max_position_embeddings)


MODERNBERT_CONFIGS = {
    "as released": {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "local_attention": 128,
                    "global_attn_every_n_layers": 3, "norm_bias": False, "classifier_pooling": "mean"},
    "defaults": {},
    "Transformers 5": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "local_attention": 31,
                       "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e4},
                                           "sliding_attention": {"rope_type": "default", "rope_theta": 9e3}}},
    "every second": {"global_attn_every_n_layers": 2, "norm_bias": True, "classifier_bias": True},
}


@pytest.mark.parametrize("name", MODERNBERT_CONFIGS)
def test_spellings_of_modernbert_are_read_as_by_transformers(name, tmp_path):
    values = {"model_type": "modernbert", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
              "intermediate_size": 48, "vocab_size": 103} | MODERNBERT_CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, shape = transformers.AutoConfig.from_pretrained(tmp_path), model_shape(tmp_path)
    kinds = ["sliding_attention" if shape.is_local(layer) else "full_attention" for layer in range(4)]
    assert (kinds, shape.sliding_window) == (config.layer_types, config.sliding_window)
    assert (shape.norm_eps, shape.norm_bias) == (config.norm_eps, config.norm_bias)
    assert (shape.activation, shape.max_position_embeddings) == (config.hidden_activation, 8192)
    assert (shape.classifier.pooling, shape.classifier.dense_bias, shape.classifier.activation) == (
        config.classifier_pooling, config.classifier_bias, config.classifier_activation)
    rotary = transformers.models.modernbert.modeling_modernbert.ModernBertRotaryEmbedding(config)
    assert torch.equal(rotary_frequencies(shape), torch.stack([
        rotary.full_attention_inv_freq, rotary.sliding_attention_inv_freq]))


@pytest.mark.parametrize("family", [family for family in READERS if family not in (
    "qwen3", "qwen3_moe", "t5", "internlm2", "internlm3", "deberta-v2")])
def test_missing_keys_mean_what_transformers_takes_them_for(family, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": 1, "intermediate_size": 48,
             "vocab_size": 103, "max_position_embeddings": 96}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    (tmp_path / "config.json").write_text(json.dumps(sizes | experts | {"model_type": family}))
    config, shape = transformers.AutoConfig.from_pretrained(tmp_path), model_shape(tmp_path)
    assert shape.tie_word_embeddings == config.tie_word_embeddings
    if family == "nomic_bert":
        assert (shape.rotary_base, shape.norm_eps) == (config.rope_parameters["rope_theta"], config.layer_norm_eps)
        return
    if family == "modernbert" or family.startswith("gemma"):
        return  # test_spellings_of_modernbert_are_read_as_by_transformers, and of Gemma
    assert shape.activation == config.hidden_act
    if "bert" in family:
        assert (shape.norm_eps, shape.type_vocab_size) == (config.layer_norm_eps, config.type_vocab_size)
        assert shape.position_offset == (0 if family == "bert" else config.pad_token_id + 1)
        assert shape.longest_text == 96 - shape.position_offset
        return
    assert shape.norm_eps == config.rms_norm_eps
    assert shape.num_query_groups == config.num_key_value_heads
    assert shape.rotary_base == config.rope_parameters["rope_theta"]
    assert (shape.rotary_dim or shape.head_dim) == shape.head_dim * config.rope_parameters.get(
        "partial_rotary_factor", 1.0)
    assert shape.sliding_window == (
        None if family in ("llama", "qwen2", "glm", "glm4") else config.sliding_window)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_longrope_of_either_kind_of_layers_bounds_the_texts(kind, tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 48}
    values = {"model_type": "modernbert", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
              "intermediate_size": 48, "vocab_size": 103, "max_position_embeddings": 96,
              "rope_parameters": {kind: rope}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_shape(tmp_path).longest_text == 48
    edit_config(tmp_path, rope_parameters={kind: rope | {"short_factor": [1.0]}})
    with pytest.raises(CheckpointError, match="short_factor has 1 numbers, but a head has 8"):
        model_shape(tmp_path)


GEMMA_CONFIGS = {
    "Gemma 2": ("gemma2", {}), "Gemma 2, no caps": ("gemma2", {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 5.0e4,
        "query_pre_attn_scalar": 7}),
    "Gemma 3, defaults": ("gemma3_text", {}),
    "Gemma 3, as released": ("gemma3_text", {
        "rope_theta": 1.0e6, "rope_local_base_freq": 2.0e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 512, "sliding_window_pattern": 4, "num_key_value_heads": 1, "head_dim": 32}),
    "Gemma 3, yarn": ("gemma3_text", {  # the length beside rope_scaling is not read in this family
        "original_max_position_embeddings": 16, "head_dim": 32, "rope_theta": 100.0, "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}}),
    "EmbeddingGemma": ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 512, "layer_types": [
        *["sliding_attention"] * 5, "full_attention", "sliding_attention"]}),
}


@pytest.mark.parametrize("name", GEMMA_CONFIGS)
def test_spellings_of_gemma_are_read_as_by_transformers(name, tmp_path):
    family, values = GEMMA_CONFIGS[name]
    values = {"model_type": family, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 7,
              "intermediate_size": 48, "vocab_size": 103, "max_position_embeddings": 96} | values
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, shape = transformers.AutoConfig.from_pretrained(tmp_path), model_shape(tmp_path)
    kinds = ["sliding_attention" if shape.is_local(layer) else "full_attention" for layer in range(7)]
    assert kinds == config.layer_types
    # Transformers' bidirectional window leaves out the token at its very end.
    assert shape.sliding_window == config.sliding_window - shape.bidirectional
    assert shape.bidirectional == bool(config.use_bidirectional_attention)
    assert (shape.norm_eps, shape.num_query_groups, shape.head_dim, shape.tie_word_embeddings) == (
        config.rms_norm_eps, config.num_key_value_heads, config.head_dim, config.tie_word_embeddings)
    assert (shape.activation, shape.attention_scale) == ("gelu_tanh", config.query_pre_attn_scalar**-0.5)
    assert config.hidden_activation == "gelu_pytorch_tanh"
    assert (shape.attention_softcap, shape.logit_softcap) == (
        config.attn_logit_softcapping, config.final_logit_softcapping)
    if family == "gemma2":
        frequencies = [transformers.models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding(config).inv_freq]
    else:
        rotary = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(config)
        frequencies = [rotary.full_attention_inv_freq, rotary.sliding_attention_inv_freq]
    assert torch.equal(rotary_frequencies(shape), torch.stack(frequencies))


REFUSED = {
    "gemma2": [({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
               ({"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0 must be above 0"),
               ({"sliding_window": None}, "sliding_window = None, but 2 layers have a window")],
    "gemma3_text": [({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
                    ({"attention_bias": True}, "attention_bias = True is not supported"),
                    ({"use_bidirectional_attention": "all"}, "must be true or false"),
                    ({"use_bidirectional_attention": True, "sliding_window": 1}, "sliding_window = 1 is not suppo"),
                    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type = 'linear' is not suppo"),
                    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False}}, "truncate = False is"),
                    ({"rope_parameters": {"truncate": False}}, "truncate = False is not supported")],
    "phi3": [({"rope_scaling": {"type": "yarn", "factor": 4.0, "short_factor": [1.0] * 4}}, "rope type 'yarn' is not"),
             ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope type 'linear' is not supported"),
             ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
              "short_factor has 1 numbers, but a head has 4 rotary frequencies"),
             ({"partial_rotary_factor": 0.1}, "partial_rotary_factor = 0.1 must rotate an even number of the 8")],
    "nomic_bert": [({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported")],
    "llama": [({"rope_scaling": {"rope_type": "other", "factor": 4.0}}, "rope type 'other' is not supp.*remove it"),
              ({"rope_scaling": {"type": "dynamic"}}, "rope type 'dynamic' without 'factor'"),
              ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate = 1 must be true or false"),
              ({"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": "1"}}, "must be a list of numbers"),
              ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' without 'factor'"),
              ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
              ({"head_dim": 7}, "head_dim = 7 must be even"),
              ({"attention_bias": True}, "attention_bias = True with mlp_bias = False is not supported")],
    "qwen2": [({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
              ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .* is not supported")],
    "mistral": [({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types = .* is not supported"),
                ({"sliding_window": 0}, "sliding_window = 0 must be a whole number from 1"),
                ({"sliding_window": "long"}, "must be a whole number from 1")],
    "mixtral": [({"num_experts_per_tok": 1}, "num_experts_per_tok = 1 is not supported"),
                ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported")],
    "modernbert": [({"attention_bias": True}, "attention_bias = True is not supported"),
                   ({"layer_types": ["full_attention", "other"]}, "layer_types = .* must name full_attention or"),
                   ({"hidden_size": 36}, "head_dim = 9 must be even"),
                   ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type = 'linear' is not suppo"),
                   ({"local_attention": 1}, "local_attention = 1 is not supported"),
                   ({"rope_parameters": {"full_attention": [1]}}, "must be an object"),
                   ({"classifier_pooling": "max"}, "classifier_pooling = 'max' is not supported"),
                   ({"hidden_activation": "swish"}, "hidden_activation = 'swish' is not supported")],
    "internlm2": [({"bias": True}, "bias = True is not supported"), ({"bias": None}, "without the key it is true")],
    "internlm3": [({"bias": True}, "bias = True with qkv_bias = False is not supported"),
                  ({"qkv_bias": "yes"}, "must be true or false")],
    "xlm-roberta": [({"is_decoder": True}, "is_decoder = True is not supported"),
                    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'")],
}


@pytest.mark.parametrize("family, change, match",
                         [(family, *case) for family, cases in REFUSED.items() for case in cases])
def test_what_is_not_computed_is_refused(family, change, match, tmp_path):
    values = DECODER | {"model_type": family, "num_local_experts": 4, "num_experts_per_tok": 2, "bias": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_shape(tmp_path).family == family
    edit_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match=match) as caught:
        model_shape(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_gte_qwen2_is_qwen2_whose_tokens_attend_to_the_whole_text(tmp_path):
    code = {"AutoModel": "modeling_qwen.Qwen2Model", "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}
    values = DECODER | {"model_type": "qwen2", "auto_map": code, "is_causal": False, "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_shape(tmp_path).bidirectional
    for change in ({"is_causal": True}, {"is_causal": None}, {"auto_map": {"AutoModel": "modeling_other.Qwen2Model"}},
                   {"model_type": "llama"}, {"auto_map": "modeling_qwen.Qwen2Model"}):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match="auto_map asks for code"):
            model_shape(tmp_path)


@pytest.mark.parametrize("family, prefix, config, model", [
    ("phi3", "", "configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"),
    ("phi3", "microsoft/Phi-3-mini-4k-instruct--", "configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"),
    ("qwen2", "Alibaba-NLP/gte-Qwen2-1.5B-instruct--", "modeling_qwen.Qwen2Model", "modeling_qwen.Qwen2ForCausalLM"),
    ("internlm2", "internlm/internlm2-1_8b--", "configuration_internlm2.InternLM2Config",
     "modeling_internlm2.InternLM2ForCausalLM")])
def test_releases_and_what_transformers_saves_of_them_are_known(tmp_path, family, prefix, config, model):
    """All releases of Phi-3 and Phi-4-mini name code that Transformers does not take either, having its own class."""
    code = {"AutoConfig": prefix + config, "AutoModelForCausalLM": prefix + model}
    code |= {"AutoTokenizer": "Xenova/gpt-4o"} if family == "phi3" else {}
    values = DECODER | {"model_type": family, "auto_map": code, "bias": False}
    values |= {"is_causal": False} if family == "qwen2" else {}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_shape(tmp_path).family == family
    edit_config(tmp_path, auto_map=code | {"AutoModel": f"someone/else--{model}"})
    with pytest.raises(CheckpointError, match="auto_map asks for code"):
        model_shape(tmp_path)


def test_layers_that_do_not_divide_go_to_the_last_stages(models):
    assert pipeline_layout(4, 2) is None
    assert pipeline_layout(5, 2) == [["embedding", "decoder", "decoder"], ["decoder"] * 3 + ["loss"]]
    assert [len(stage) for stage in pipeline_layout(30, 8)] == [4, 3, 4, 4, 4, 4, 4, 5]
    shape = model_shape(models["Llama 2"])
    assert shape.num_layers == 5
    check_divisible(shape, ParallelConfig(pipeline_model_parallel_size=5))
    for sizes in ({"pipeline_model_parallel_size": 6},
                  {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}):
        with pytest.raises(ConfigError, match="makes 6 stages, more than the model's 5 layers; largest valid total: 5"):
            check_divisible(shape, ParallelConfig(**sizes))


def stopped(config, told):
    """Whether an assertion stops the model on a batch that was (not) prepared for its shape."""
    from megatron_embed.models.encoder import to_device

    opened = open_model(config)
    (chunk,) = opened.chunks
    batch = to_device(pack_all(random_texts((12, 5)), config), opened.topology, "mean", kernel="sdpa",
                      causal=chunk.causal, shape=chunk.shape if told else None)
    try:
        assert chunk(batch).isfinite().all()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", ["Mistral, window", "XLM-RoBERTa"])
def test_a_batch_that_does_not_know_the_model_stops(models, name):
    config = run_config(models[name])
    assert [run_on_ranks(stopped, 1, config, told) for told in (True, False)] == [[False], [True]]
