"""What an engine cannot serve, known from a model's settings before anything is written; each with its source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.data.pair_tokenizer import QWEN3_RERANKER_INSTRUCTION, QWEN3_RERANKER_TEMPLATE
from megatron_embed.errors import CheckpointError
from megatron_embed.export.equal_llama import OWN_CODE
from megatron_embed.loading.model_directory import ModelDirectory, find_model
from megatron_embed.loading.reranker import is_reranker, saved_settings
from megatron_embed.models.families import ModelShape, read_hf_config
from megatron_embed.models.heads import is_encoder
from megatron_embed.models.reranker_settings import RerankerSettings
from megatron_embed.models.saved_settings import SavedSettings
from megatron_embed.names import EngineName, Pooling


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as an engine meets it."""

    architecture: str
    """The class in config.json."""
    shape: ModelShape
    saved: SavedSettings
    pooling: Pooling | None
    """None: a reranker."""
    reranker: RerankerSettings | None
    is_bidirectional_decoder: bool = False
    """Whether config.json says by `is_causal` that every token of a decoder attends to the whole text."""

    @classmethod
    def of(cls, model: ModelDirectory) -> "ServedModel":
        """The model of a directory or a checkpoint. Raises UserError if it is not readable."""
        ranks = is_reranker(model)
        config = read_hf_config(model.hf)
        return cls(architecture=str((config.get("architectures") or [""])[0]), shape=model.shape,
                   saved=model.saved, pooling=None if ranks else model.pooling(None),
                   reranker=saved_settings(model) if ranks else None,
                   is_bidirectional_decoder=config.get("is_causal") is False and not is_encoder(model.shape))

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        own = self.saved.max_length if self.reranker is None else self.reranker.max_length
        return min(own or self.shape.longest_text, self.shape.longest_text)


_ALWAYS = "use Sentence Transformers, or `megatron-embed serve`"
_STOCK = "use --format onnx (ONNX Runtime), or Sentence Transformers"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One thing that an engine cannot do."""

    concerns: Callable[[ServedModel], bool]
    cannot: str
    """Continues the engine's name."""
    source: str
    """Place in the engine's source or documentation that says so, with its version."""
    instead: str = _STOCK


NAMES: Mapping[EngineName, str] = {
    "sentence-transformers": "Sentence Transformers", "transformers": "Transformers", "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO", "vllm": "vLLM", "llama.cpp": "llama.cpp", "tei": "Text Embeddings Inference",
    "sglang": "SGLang", "infinity": "Infinity"}


def _pools_by_weighted_mean(model: ServedModel) -> bool:
    return model.pooling == "weightedmean"


def _concatenates(model: ServedModel) -> bool:
    return model.pooling == "cls+mean"


def _has_dense(model: ServedModel) -> bool:
    return model.reranker is None and bool(model.saved.dense)


def _uses_chat(model: ServedModel) -> bool:
    return model.reranker is None and model.saved.chat is not None


def _is_decoder_reranker(model: ServedModel) -> bool:
    return model.reranker is not None and not is_encoder(model.shape)


def _asks_in_another_way(model: ServedModel) -> bool:
    """Whether a reranker's prompt is not the one that llama.cpp writes into every Qwen3 reranker."""
    asked = model.reranker
    return asked is not None and asked.head == "yes_no" and (
        asked.template, asked.instruction, asked.true_token, asked.false_token) != (
        QWEN3_RERANKER_TEMPLATE, QWEN3_RERANKER_INSTRUCTION, "yes", "no")


def _normalizes_between(model: ServedModel) -> bool:
    return _has_dense(model) and any(module.normalize_input for module in model.saved.dense)


_ABSOLUTE_ENCODERS = ("bert", "roberta", "xlm-roberta")
_GELU = ("gelu", "gelu_tanh")
_LLAMA_CPP = (
    Limit(concerns=_pools_by_weighted_mean, cannot="has no weighted mean pooling",
          source="include/llama.h, llama_pooling_type: none, mean, cls, last, rank"),
    Limit(concerns=_concatenates, cannot="has no cls+mean pooling",
          source="include/llama.h, llama_pooling_type: none, mean, cls, last, rank"),
    Limit(concerns=_has_dense, cannot="leaves Dense modules out for most families",
          source="its converter, conversion/base.py"),
    Limit(concerns=_uses_chat, cannot="does not put texts to embed into a chat template",
          source="tools/server/server-context.cpp"),
    Limit(concerns=lambda model: model.reranker is not None and model.shape.family == "bert",
          cannot="leaves out BERT's pooler, which a score goes through, and gives every token the type 0",
          source="conversion/bert.py, filter_tensors and set_vocab"),
    Limit(concerns=lambda model: _is_decoder_reranker(model) and not (
          model.shape.family == "qwen3" and model.reranker is not None and model.reranker.head == "yes_no"),
          cannot="has no reranker of a decoder but Qwen3's with a yes/no head", source="conversion/qwen.py",
          instead="use --format onnx, or serve the cross-encoder with vLLM"),
    Limit(concerns=_asks_in_another_way, cannot="asks every Qwen3 reranker by Qwen3-Reranker's own prompt and words",
          source="conversion/qwen.py, set_gguf_parameters",
          instead="use --format onnx, or serve the cross-encoder with vLLM"),
    Limit(concerns=lambda model: model.reranker is not None and is_encoder(model.shape),
          cannot="takes GELU, in its tanh approximation, from a table of half precision, which moves an encoder's "
          "scores by up to 1e-2", source="ggml/src/ggml-cpu/vec.h, GGML_GELU_FP16; src/models/bert.cpp, LLM_FFN_GELU"),
    Limit(concerns=lambda model: model.shape.family in _ABSOLUTE_ENCODERS and model.shape.activation not in _GELU,
          cannot="computes GELU in every encoder of the family, whatever hidden_act says",
          source="src/models/bert.cpp, LLM_FFN_GELU"),
    Limit(concerns=lambda model: model.architecture == "Qwen3MoeModel",
          cannot="reads a Qwen3-MoE as Qwen3MoeForCausalLM alone", source="conversion/qwen.py"),
    Limit(concerns=lambda model: model.shape.relative_positions is not None,
          cannot="gives other vectors for the encoder of T5: cosine 0.57 to 0.89 for a small one",
          source="xllamacpp 2026.10.11549, src/models/t5.cpp, graph<true>"),
    Limit(concerns=lambda model: model.shape.family == "nomic_bert",
          cannot="reads a NomicBERT by the keys of the release with code of its own, such as n_positions",
          source="conversion/bert.py, NomicBertModel"),
    Limit(concerns=lambda model: model.shape.family in ("mistral", "mixtral", "phi3")
          and model.shape.sliding_window is not None and model.shape.sliding_window < model.max_length,
          cannot="does not apply the sliding window of this family, and the texts are longer than that",
          source="conversion/llama.py, set_gguf_parameters; src/models/phi3.cpp, LLAMA_SWA_TYPE_NONE",
          instead="use --format onnx, serve it with vLLM, or give it a --max-length within the window"))

_TRANSFORMERS = (
    Limit(concerns=_has_dense, cannot="loads no module behind the pooling, and the model has Dense modules",
          source="Transformers 5.23, AutoModel.from_pretrained"),)

_VLLM = (
    Limit(concerns=_pools_by_weighted_mean, cannot="has no weighted mean pooling",
          source="vllm 0.32, vllm/config/pooler.py, SEQ_POOLING_TYPES"),
    Limit(concerns=_concatenates, cannot="has no cls+mean pooling",
          source="vllm 0.32, vllm/config/pooler.py, SEQ_POOLING_TYPES"),
    Limit(concerns=_uses_chat, cannot="puts texts to embed into a chat template for requests with `messages` alone",
          source="vllm 0.32, vllm/entrypoints/pooling/embed"),
    Limit(concerns=_normalizes_between, cannot="applies Dense modules alone, and a Normalize module stands before one",
          source="vllm 0.32, vllm/transformers_utils/config.py, try_get_dense_modules"),
    Limit(concerns=lambda model: model.shape.family in ("t5", "t5-gated"), cannot="has no T5",
          source="vllm 0.32, vllm/model_executor/models/registry.py"),
    Limit(concerns=lambda model: model.shape.family == "nomic_bert",
          cannot="reads a NomicBERT by the keys of the release with code of its own, such as n_inner",
          source="vllm 0.32, vllm/model_executor/models/config.py, NomicBertModelConfig"))

_TEI_FAMILIES = ("bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "qwen2", "qwen3", "llama", "mistral",
                 "gemma3_text")
_TEI_ACTIVATIONS = ("identity", "tanh")
_TEI = (
    Limit(concerns=lambda model: model.shape.family not in _TEI_FAMILIES, cannot="does not know the family",
          source="TEI 1.9.3, backends/candle/src/lib.rs, Config", instead="serve it with vLLM"),
    Limit(concerns=_pools_by_weighted_mean, cannot="has no weighted mean pooling",
          source="TEI 1.9.3, router/src/lib.rs, PoolConfig"),
    Limit(concerns=_concatenates, cannot="reads one pooling of several", source="TEI 1.9.3, router/src/lib.rs, Pool"),
    Limit(concerns=lambda model: model.pooling == "lasttoken" and is_encoder(model.shape),
          cannot="has no last-token pooling of an encoder", source="TEI 1.9.3, backends/candle/src/models/bert.rs"),
    Limit(concerns=_is_decoder_reranker, cannot="has no classifier of a decoder",
          source="TEI 1.9.3, backends/candle/src/models/qwen3.rs: `classifier` model type is not supported",
          instead="serve the cross-encoder with vLLM or `megatron-embed serve`"),
    Limit(concerns=lambda model: bool(model.shape.rope_scalings),
          cannot="does not read `rope_parameters` that scale",
          source="TEI 1.9.3, backends/candle/src/layers/rotary.rs, RopeParameters",
          instead="serve it with vLLM"),
    Limit(concerns=_uses_chat, cannot="puts no text into a chat template",
          source="TEI 1.9.3, core/src/tokenization.rs"),
    Limit(concerns=lambda model: model.saved.lower_case, cannot="does not read do_lower_case",
          source="TEI 1.9.3, router/src/lib.rs, STConfig"),
    Limit(concerns=_normalizes_between, cannot="applies Dense modules alone, and a Normalize module stands before one",
          source="TEI 1.9.3, backends/candle/src/lib.rs, dense_layers", instead=_STOCK),
    Limit(concerns=lambda model: _has_dense(model) and any(
          module.activation not in _TEI_ACTIVATIONS for module in model.saved.dense),
          cannot="knows Tanh and Identity alone as activations of a Dense module",
          source="TEI 1.9.3, backends/candle/src/models/dense.rs, DenseActivation", instead="serve it with vLLM"),
    Limit(concerns=lambda model: model.shape.family == "gemma3_text" and model.pooling == "cls",
          cannot="pools a Gemma 3 by mean or last token alone",
          source="TEI 1.9.3, backends/candle/src/models/gemma3.rs", instead=_STOCK),
    Limit(concerns=lambda model: model.shape.family == "nomic_bert",
          cannot="reads a NomicBERT by keys and tensors of the release with code of its own, such as n_embd",
          source="TEI 1.9.3, backends/candle/src/models/nomic.rs, NomicConfig", instead=_STOCK),
    Limit(concerns=lambda model: model.shape.family == "modernbert" and model.shape.norm_bias,
          cannot="leaves the biases of ModernBERT's norms out",
          source="TEI 1.9.3, backends/candle/src/models/modernbert.rs, LayerNormNoBias", instead=_STOCK))

_SGLANG_POOLING: Mapping[str, Pooling] = {"bert": "cls", "xlm-roberta": "cls"}
_SGLANG_CLASSES = ("BertModel", "XLMRobertaModel", "MistralModel", "LlamaForCausalLM", "MistralForCausalLM",
                   "Qwen2ForCausalLM", "Qwen3ForCausalLM", "BertForSequenceClassification",
                   "XLMRobertaForSequenceClassification", "Qwen3ForSequenceClassification")
_SGLANG = (
    Limit(concerns=lambda model: model.architecture not in _SGLANG_CLASSES,
          cannot="has no class of its own for it, and what its fallback on Transformers gives was not checked",
          source="SGLang, python/sglang/srt/models, EntryClass; model_loader/utils.py, resolve_transformers_arch",
          instead="serve it with vLLM"),
    Limit(concerns=lambda model: model.reranker is None
          and model.pooling != _SGLANG_POOLING.get(model.shape.family, "lasttoken"),
          cannot="does not read 1_Pooling: it pools this family otherwise",
          source="SGLang, python/sglang/srt/models/{bert,roberta,qwen3,llama_embedding}.py, Pooler",
          instead="serve it with vLLM"),
    Limit(concerns=_has_dense, cannot="leaves Dense modules out", source="SGLang, python/sglang/srt/models, Pooler",
          instead="serve it with vLLM"),
    Limit(concerns=lambda model: model.reranker is None and model.saved.normalize is False,
          cannot="always gives vectors unit length", source="SGLang, Pooler(normalize=True)",
          instead="serve it with vLLM"),
    Limit(concerns=lambda model: model.is_bidirectional_decoder, cannot="does not read is_causal: its decoders are "
          "causal", source="SGLang, python/sglang/srt/models/qwen3.py, RadixAttention", instead="serve it with vLLM"),
    Limit(concerns=lambda model: model.reranker is not None and model.reranker.template is not None,
          cannot="does not put a pair into the template of a classifier", source="SGLang, docs, Rerank models",
          instead="serve the cross-encoder with vLLM or `megatron-embed serve`"))

_INFINITY = (
    Limit(concerns=lambda model: model.shape.family == "nomic_bert", cannot="has a Transformers before 5 (by "
          "sentence-transformers < 4), which has no NomicBERT", source="infinity-emb 0.0.78, Requires-Dist",
          instead=_STOCK),
    Limit(concerns=lambda model: model.is_bidirectional_decoder, cannot="has a Transformers before 5.2 (by "
          "sentence-transformers < 4), which does not read is_causal", source="infinity-emb 0.0.78, Requires-Dist",
          instead="serve it with vLLM"),
    Limit(concerns=lambda model: model.reranker is not None and model.reranker.template is not None,
          cannot="puts no pair into a template",
          source="infinity-emb 0.0.78, transformer/crossencoder/torch.py, encode_pre",
          instead="serve the cross-encoder with vLLM or `megatron-embed serve`"),
    Limit(concerns=_uses_chat, cannot="puts no text into a chat template",
          source="infinity-emb 0.0.78, transformer/embedder/sentence_transformer.py, encode_pre"),
    Limit(concerns=lambda model: model.reranker is None and model.saved.normalize is False,
          cannot="always gives vectors unit length",
          source="infinity-emb 0.0.78, transformer/embedder/sentence_transformer.py, encode_post"))

_OWN_CODE = Limit(
    concerns=lambda model: model.shape.family in OWN_CODE,
    cannot="has no graph of a model whose code is in its directory, since that is not run",
    source="Transformers 5.23, models/auto/configuration_auto.py", instead="use --format hf or sentence-transformers")
_GRAPH = (
    _OWN_CODE,
    Limit(concerns=lambda model: model.shape.num_experts > 0,
          cannot="has no graph of a mixture of experts, which torch.onnx does not translate",
          source="torch 2.13, torch.onnx.export: Failed to convert the exported program to an ONNX model",
          instead="serve it with vLLM, or use --format gguf"),)

LIMITS: Mapping[EngineName, Sequence[Limit]] = {
    "transformers": _TRANSFORMERS, "onnxruntime": _GRAPH, "openvino": _GRAPH, "llama.cpp": _LLAMA_CPP, "vllm": _VLLM,
    "tei": _TEI, "sglang": _SGLANG, "infinity": _INFINITY}


def check_limits(engines: Sequence[EngineName], source: str | Path) -> None:
    """Refuse engines that cannot serve the model of a run, checkpoint or directory. Nothing is computed.

    Raises:
        CheckpointError: naming the engine, what it cannot do, where that is said, and an engine that can.
    """
    model = ServedModel.of(find_model(str(source), "SRC"))
    for engine in engines:
        for limit in LIMITS.get(engine, ()):
            if limit.concerns(model):
                raise CheckpointError(f"{source}: {NAMES[engine]} {limit.cannot} ({limit.source}); "
                                      f"{_remedy(limit, model)}")


def _remedy(limit: Limit, model: ServedModel) -> str:
    """`limit.instead`, or what serves every model if the engine that it names cannot serve this one either."""
    named: tuple[EngineName, ...] = tuple(engine for engine, words in (("vllm", "vLLM"), ("onnxruntime", "onnx"))
                                          if words in limit.instead)
    able = [engine for engine in named if not any(other.concerns(model) for other in LIMITS[engine])]
    return limit.instead if able == list(named) else _ALWAYS
