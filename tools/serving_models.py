"""Small models with random weights and real tokenizers, one directory each, for serving_matrix.py."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_embed.convert.dense_tensors import write_dense
from megatron_embed.data.pair_tokenizer import QWEN3_RERANKER_INSTRUCTION, QWEN3_RERANKER_TEMPLATE, PairTemplate
from megatron_embed.export.cross_encoder import chat_template
from megatron_embed.export.sentence_transformers import export_sentence_transformers
from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.saved_settings import SavedSettings
from megatron_embed.names import HeadKind, Pooling
from tests.helpers.toys import MINILM, REPOSITORY, copy_tokenizer

ENCODER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192,
           "max_position_embeddings": 300, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 192, "max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1.0e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LENGTH = 256
QUERY_PROMPT = "Instruct: find passages that answer the question\nQuery: "
PIECES = 4000
"""Tokens of the sentencepiece vocabularies, trained on the texts of examples/data."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family of the table."""

    prefix: str
    """First part of the names of Transformers' classes, such as `Bert`."""
    settings: dict[str, Any]
    tokenizer: Callable[[Path, Path], dict[str, Any]]
    """Writes the tokenizer, from the folder of given ones, into a directory; settings of config.json that follow."""
    poolings: tuple[Pooling, ...]
    bidirectional: bool = False
    """A decoder whose tokens attend to the whole text."""
    model: str = "Model"
    """End of the class's name."""
    dense: tuple[int, ...] = ()
    """Outputs of Dense modules behind the pooling."""
    heads: tuple[HeadKind, ...] = ()
    """Rerankers of the family in the table."""


def _wordpiece(given: Path, directory: Path) -> dict[str, Any]:
    copy_tokenizer(directory)
    return {"vocab_size": 30522}


def _qwen(given: Path, directory: Path) -> dict[str, Any]:
    for file in (given / "qwen3").iterdir():
        shutil.copy(file, directory)
    return {"vocab_size": 151936, "pad_token_id": 151643, "eos_token_id": 151645}


def _roberta(given: Path, directory: Path) -> dict[str, Any]:
    """GPT-2's byte-level BPE with RoBERTa's special tokens around a text; the ids are not those of RoBERTa."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = json.loads((given / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
    ids = {token: index for index, token in enumerate([*special, *sorted(vocabulary, key=vocabulary.__getitem__)])}
    ids["<mask>"] = len(ids)
    lines = (given / "gpt2" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [tuple(line.split(" ")) for line in lines if line]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>").save_pretrained(directory)
    return {"vocab_size": len(ids), "pad_token_id": 1, "type_vocab_size": 1}


def _texts() -> list[str]:
    files = (REPOSITORY / "examples" / "data").glob("mini_*/train.jsonl")
    rows = [json.loads(line) for file in sorted(files) for line in file.read_text(encoding="utf-8").splitlines()]
    return [text for row in rows for text in (row["query"], *row["positive"])]


def _sentencepiece(kind: str, **settings: Any) -> bytes:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts()), model_writer=trained, vocab_size=PIECES, model_type=kind,
        byte_fallback=kind == "bpe", character_coverage=0.98, minloglevel=2, num_threads=1,
        **({"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if kind == "bpe" else {}),
        **settings)
    return trained.getvalue()


def _unigram(given: Path, directory: Path) -> dict[str, Any]:
    """XLM-R's kind: sentencepiece unigrams between <s> and </s>."""
    (directory / "sentencepiece.bpe.model").write_bytes(_sentencepiece("unigram"))
    tokenizer = transformers.XLMRobertaTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"vocab_size": PIECES + 2, "pad_token_id": 1, "type_vocab_size": 1}


def _llama(given: Path, directory: Path) -> dict[str, Any]:
    """Llama 2's and Mistral's kind: sentencepiece BPE that falls back to bytes, <s> before a text."""
    (directory / "tokenizer.model").write_bytes(_sentencepiece("bpe"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "model_max_length": 512, "legacy": False}), encoding="utf-8")
    # As tokenizer.json too: what AutoTokenizer makes of the vocabulary alone depends on the family.
    transformers.LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    return {"vocab_size": PIECES, "bos_token_id": 1, "eos_token_id": 2}


def _gemma(given: Path, directory: Path) -> dict[str, Any]:
    """Gemma's kind: sentencepiece BPE that falls back to bytes and puts no space before a text, <bos> before it."""
    (directory / "tokenizer.model").write_bytes(_sentencepiece(
        "bpe", add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>",
        "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 512}), encoding="utf-8")
    transformers.GemmaTokenizer.from_pretrained(directory).save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("vocab_file", None)  # a path of this machine
    file.write_text(json.dumps(values), encoding="utf-8")
    return {"vocab_size": PIECES, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def _t5(given: Path, directory: Path) -> dict[str, Any]:
    """T5's kind: sentencepiece unigrams, </s> behind a text."""
    (directory / "spiece.model").write_bytes(_sentencepiece("unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                                                            pad_piece="<pad>"))
    transformers.T5Tokenizer.from_pretrained(directory, extra_ids=0).save_pretrained(directory)
    return {"vocab_size": PIECES}


def _modern_bert(given: Path, directory: Path) -> dict[str, Any]:
    """A byte-level BPE as ModernBERT's, with its special tokens in config.json."""
    size = _roberta(given, directory)["vocab_size"]
    return {"vocab_size": size, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
            "sep_token_id": 2}


_ENCODER_POOLINGS: tuple[Pooling, ...] = ("mean", "cls")
# Qwen's vocabulary of 151,936 tokens makes a wide model large.
_QWEN = DECODER | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
_QWEN_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
_MODERN_BERT = {key: value for key, value in ENCODER.items() if "dropout" not in key} | {"local_attention": 64}
_GEMMA = DECODER | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
_T5 = {"d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 3, "d_ff": 192, "dropout_rate": 0.0}
_GTE_CODE = {"AutoModel": "modeling_qwen.Qwen2Model"}
FAMILIES: dict[str, Family] = {
    "BERT": Family(prefix="Bert", settings=ENCODER, tokenizer=_wordpiece, poolings=(*_ENCODER_POOLINGS, "lasttoken"),
                   heads=("score",)),
    "RoBERTa": Family(prefix="Roberta", settings=ENCODER, tokenizer=_roberta, poolings=_ENCODER_POOLINGS,
                      heads=("score",)),
    "XLM-RoBERTa": Family(prefix="XLMRoberta", settings=ENCODER, tokenizer=_unigram, poolings=_ENCODER_POOLINGS,
                          heads=("score",)),
    "Qwen2": Family(prefix="Qwen2", settings=_QWEN, tokenizer=_qwen, poolings=("lasttoken", "mean")),
    "Qwen3": Family(prefix="Qwen3", settings=_QWEN | {"head_dim": 32}, tokenizer=_qwen,
                    poolings=("lasttoken", "mean"), heads=("score", "yes_no")),
    "Qwen3, bidirectional": Family(prefix="Qwen3", settings=_QWEN | {"head_dim": 32}, tokenizer=_qwen,
                                   poolings=("mean", "lasttoken", "cls"), bidirectional=True),
    "Qwen3-MoE": Family(prefix="Qwen3Moe", settings=_QWEN | _QWEN_MOE | {"head_dim": 32}, tokenizer=_qwen,
                        poolings=("lasttoken",), model="ForCausalLM"),
    "Llama 2": Family(prefix="Llama", settings=DECODER, tokenizer=_llama, poolings=("lasttoken", "mean"),
                      heads=("score",)),
    "Llama, rope of 3.x": Family(prefix="Llama", settings=DECODER | {"rope_parameters": LLAMA3}, tokenizer=_llama,
                                 poolings=("lasttoken",)),
    "Llama 2, bidirectional": Family(prefix="Llama", settings=DECODER, tokenizer=_llama, poolings=("mean",),
                                     bidirectional=True),
    "Mistral": Family(prefix="Mistral", settings=DECODER | {"sliding_window": None}, tokenizer=_llama,
                      poolings=("lasttoken", "mean")),
    "Mistral, bidirectional": Family(prefix="Mistral", settings=DECODER | {"sliding_window": None}, tokenizer=_llama,
                                     poolings=("mean",), bidirectional=True),
    "Mistral, window of 64": Family(prefix="Mistral", settings=DECODER | {"sliding_window": 64}, tokenizer=_llama,
                                    poolings=("lasttoken",)),
    "Mixtral": Family(prefix="Mixtral", settings=DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2,
                                                            "sliding_window": None}, tokenizer=_llama,
                      poolings=("lasttoken",), model="ForCausalLM"),
    "ModernBERT": Family(prefix="ModernBert", settings=_MODERN_BERT, tokenizer=_modern_bert, poolings=_ENCODER_POOLINGS,
                         heads=("score",)),
    "NomicBERT": Family(prefix="NomicBert", settings=ENCODER, tokenizer=_wordpiece, poolings=("mean",)),
    "T5": Family(prefix="T5", settings=_T5, tokenizer=_t5, poolings=("mean",), model="EncoderModel"),
    "gte-Qwen2": Family(prefix="Qwen2", settings=_QWEN | {"auto_map": _GTE_CODE}, tokenizer=_qwen,
                        poolings=("lasttoken",), bidirectional=True),
    "Gemma 2": Family(prefix="Gemma2", settings=_GEMMA, tokenizer=_gemma, poolings=("lasttoken", "mean"),
                      model="ForCausalLM"),
    "Gemma 3": Family(prefix="Gemma3Text", settings=_GEMMA | {"num_hidden_layers": 7}, tokenizer=_gemma,
                      poolings=("lasttoken",)),
    "EmbeddingGemma": Family(prefix="Gemma3Text", settings=_GEMMA | {"use_bidirectional_attention": True,
                                                                     "num_hidden_layers": 7}, tokenizer=_gemma,
                             poolings=("mean",), dense=(256, 128)),
    "Phi-3": Family(prefix="Phi3", settings=DECODER | {"sliding_window": None, "pad_token_id": 0}, tokenizer=_llama,
                    poolings=("lasttoken",), model="ForCausalLM"),
    "GLM-4": Family(prefix="Glm", settings=_QWEN | {"head_dim": 32}, tokenizer=_qwen, poolings=("lasttoken",),
                    model="ForCausalLM"),
    "GLM-4-0414": Family(prefix="Glm4", settings=_QWEN | {"head_dim": 32}, tokenizer=_qwen, poolings=("lasttoken",),
                         model="ForCausalLM"),
}


def save(given: Path, name: str, directory: Path, pooling: Pooling) -> None:
    """An embedding model in Sentence Transformers' layout, with a prompt for queries alone."""
    family = FAMILIES[name]
    _save_weights(given, family, directory, family.model)
    width = family.settings.get("hidden_size") or family.settings["d_model"]
    saved = SavedSettings(dense=_save_dense(directory, width, family.dense), truncation_side="right")
    export_sentence_transformers(directory, pooling=pooling, normalize=True, query_prompt=QUERY_PROMPT,
                                 document_prompt="", max_seq_length=LENGTH, embedding_dimension=width, saved=saved)


def _save_dense(directory: Path, width: int, outputs: tuple[int, ...]) -> tuple[DenseSettings, ...]:
    """Write Dense modules as EmbeddingGemma's, without bias and activation; return their settings."""
    modules = []
    for index, size in enumerate(outputs, 2):
        settings = DenseSettings(in_features=width, out_features=size, bias=False, activation="identity",
                                 path=f"{index}_Dense")
        (directory / settings.path).mkdir()
        write_dense(directory / settings.path, {"weight": torch.randn(size, width) * width**-0.5})
        modules.append(settings)
        width = size
    return tuple(modules)


def save_minilm(directory: Path) -> None:
    """The released all-MiniLM-L6-v2."""
    shutil.copytree(MINILM, directory)


def save_reranker(given: Path, name: str, directory: Path, head: HeadKind) -> None:
    """A reranker as a stock class: a classifier of one output, or a language model that answers yes or no."""
    family = FAMILIES[name]
    _save_weights(given, family, directory, "ForSequenceClassification" if head == "score" else "ForCausalLM",
                  **({"num_labels": 1} if head == "score" else {}))
    if head == "yes_no":
        pieces = PairTemplate(text=QWEN3_RERANKER_TEMPLATE).pieces()
        (directory / "chat_template.jinja").write_text(chat_template(pieces, QWEN3_RERANKER_INSTRUCTION),
                                                       encoding="utf-8")


def _save_weights(given: Path, family: Family, directory: Path, end: str, **settings: Any) -> None:
    directory.mkdir(parents=True)
    torch.manual_seed(5)
    causal = {"is_causal": False} if family.bidirectional else {}
    config = getattr(transformers, f"{family.prefix}Config")(
        **family.settings | family.tokenizer(given, directory) | settings | causal)
    model = getattr(transformers, f"{family.prefix}{end}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Strong routers, so that no expert is chosen by a rounding error.
            scale = 1.0 if len(parameter) in (config.vocab_size, 1) or name.endswith("gate.weight") else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
            if name == "lm_head.weight":
                parameter.mul_(0.1)  # the probability of yes is then none that rounds to 1
    model.save_pretrained(directory)
