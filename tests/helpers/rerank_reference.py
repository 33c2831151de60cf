"""Gradients of a reranker's step under a layout against one process: Transformers' own classes in float64.

The reference scores one pair at a time. Its gradients are saved as a model directory; gradient_errors.py compares.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megatron_embed.batch import RerankBatch
from megatron_embed.config.schema import (
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RerankerConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_embed.data.packing import PackingSpec
from megatron_embed.data.pair_batches import build_rerank_batch, pairs_of
from megatron_embed.data.pair_tokenizer import PairTokenizer
from megatron_embed.data.records import RerankRecord
from megatron_embed.losses.rerank import pad_groups
from tests.helpers.adapter_reference import save_adapter_gradients, with_adapter, write_adapter
from tests.helpers.families import DEBERTA, MODERNBERT, SMALL_IDS
from tests.helpers.gradient_errors import (
    SquaredErrors,
    gather_shards,
    largest_error,
    save_gradients,
    squared_error,
    squared_errors,
    squared_errors_of_adapters,
)
from tests.helpers.internlm import as_internlm2, stock_of
from tests.helpers.toys import MINI_EN, copy_tokenizer

SIZES = (1, 16, 2, 5, 3, 1, 7, 4)
"""Documents of each query."""
MAX_LENGTH = 44
TEMPLATE = "[CLS] is it so ? {instruction} : {query} [SEP] {document} [SEP] answer :"
_DECODER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 256}
_BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "untied": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "tie_word_embeddings": False}),
    "score": ("Qwen3Config", "Qwen3ForSequenceClassification", {**_DECODER, "num_labels": 1, "pad_token_id": 0}),
    "encoder": ("BertConfig", "BertForSequenceClassification", {**_BERT, "num_labels": 1}),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", {
        **MODERNBERT, "max_position_embeddings": 256, "num_labels": 1, "classifier_pooling": "mean",
        "norm_bias": True}),
    "experts": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_DECODER, **_EXPERTS, "tie_word_embeddings": True}),
    "deberta": ("DebertaV2Config", "DebertaV2ForSequenceClassification", {
        **DEBERTA, "max_position_embeddings": 256, "num_labels": 1}),
    "nomic_bert": ("NomicBertConfig", "NomicBertForSequenceClassification", {**_BERT, "num_labels": 1}),
    "gemma2": ("Gemma2Config", "Gemma2ForSequenceClassification", {
        **_DECODER, "sliding_window": 8, "attn_logit_softcapping": 2.0, "num_labels": 1, "pad_token_id": 0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        **_DECODER, "sliding_window": 12, "sliding_window_pattern": 2, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {
        **{key: value for key, value in _DECODER.items() if key != "head_dim"}, **SMALL_IDS}),
    "glm4": ("Glm4Config", "Glm4ForSequenceClassification", {**_DECODER, **SMALL_IDS, "num_labels": 1}),
    "internlm2": ("LlamaConfig", "LlamaForCausalLM", {
        **{key: value for key, value in _DECODER.items() if key != "head_dim"}, "tie_word_embeddings": False})}
ENCODERS = {"encoder": "bert.", "modernbert": "model.", "deberta": "deberta.", "nomic_bert": "nomic_bert."}
"""Models that read a pair of texts -> the prefix of their backbones' names."""
YES, NO = "yes", "no"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    model: str
    loss: str
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: int = 1
    micro_batch_size: int = 8
    tokens: int | None = None
    distributed: bool = True
    sabotage: str | None = None
    adapters: bool = False
    """The model has LoRA adapters, and besides them a classifier alone is trained."""

    def __str__(self) -> str:
        sizes = [f"{key.removesuffix('_parallel_size')}={size}" for key, size in self.parallel.items()
                 if size not in (None, 1)]
        name = f"{self.model}-adapters" if self.adapters else self.model
        words = [name, self.loss, *sizes, f"ranks={self.ranks}", f"micro={self.tokens or self.micro_batch_size}"]
        return "-".join([*words, self.sabotage] if self.sabotage else words)

    @property
    def head(self) -> str:
        return "score" if "Classification" in MODELS[self.model][1] else "yes_no"

    @property
    def directory(self) -> str:
        return f"{self.model}-lora" if self.adapters else self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Loss and gradients of one process."""

    loss: float
    norm: float
    gradients: str


def save_model(folder: Path, name: str) -> Path:
    """A model with random weights, norms and biases, and a real WordPiece tokenizer."""
    config, kind, settings = MODELS[name]
    torch.manual_seed(5)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings | {"vocab_size": 30522}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Word embeddings outweigh the rest, so that pairs of different words have different scores.
            large = len(parameter) == 30522 or "gate.weight" in key or "score" in key or "classifier" in key
            # An encoder's first token must hear enough of the others.
            small = 0.1 if name not in ENCODERS or parameter.dim() == 1 else 0.15 if name == "nomic_bert" else 0.3
            parameter.add_(torch.randn_like(parameter) * (0.5 if large else small))
    path = folder / name
    path.mkdir()
    copy_tokenizer(path)
    model.save_pretrained(path)
    if name == "internlm2":
        as_internlm2(path)
    return path


def records(loss: str) -> list[RerankRecord]:
    """Lists of 1 to 16 documents with graded labels (probabilities for pointwise) and a teacher's scores."""
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()]
    texts = [row["positive"][0].split(". ")[0] for row in rows]
    generator = torch.Generator().manual_seed(2)
    lists, used = [], 0
    for index, size in enumerate(SIZES):
        labels = torch.randint(0, 4, (size,), generator=generator).double()
        labels[0] = 3.0
        if loss == "pointwise":
            labels = labels / 3
        lists.append(RerankRecord(
            query=rows[index]["query"], documents=(texts[index], *texts[100 + used : 99 + used + size]),
            labels=tuple(labels.tolist()), instruction="find the answer" if index % 2 else None,
            source=f"rows:{index + 1}", teacher_scores=tuple(torch.randn(size, generator=generator).tolist())))
        used += size
    assert sum(len(record.documents) for record in lists) == sum(SIZES)
    return lists


def tokenizer_of(directory: str | Path, model: str) -> PairTokenizer:
    from megatron_embed.data.pair_tokenizer import PairTemplate

    template = None if model in ENCODERS else PairTemplate(text=TEMPLATE, instruction="judge the document")
    return PairTokenizer(str(directory), template=template, max_length=MAX_LENGTH)


def compute_reference(case: Case, folder: Path) -> Reference:
    """One process, float64, one pair at a time, autograd through the whole stock model."""
    from megatron_embed.objectives.reranking import loss_of

    directory, lists = folder / case.model, records(case.loss)
    if not directory.exists():
        save_model(folder, case.model)
    tokenizer = tokenizer_of(directory, case.model)
    rows = tokenizer.tokenize([pair for record in lists for pair in pairs_of(record)])
    assert 0 < rows.num_truncated < len(rows.token_ids)
    kind = getattr(transformers, MODELS[case.model][1])
    model = kind.from_pretrained(stock_of(directory), dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"  # the default's grouped product has no float64
    if case.adapters:
        model = with_adapter(model, _adapter_of(case, folder))
    yes, no = tokenizer.token_of(YES, "yes"), tokenizer.token_of(NO, "no")
    scores = []
    for index, ids in enumerate(rows.token_ids):
        inputs = {"input_ids": torch.tensor([ids])}
        if rows.token_types is not None:
            inputs["token_type_ids"] = torch.tensor([rows.token_types[index]])
        logits = model(**inputs).logits[0]
        scores.append(logits[0] if case.head == "score" else logits[-1, yes] - logits[-1, no])
    targets = [value for record in lists for value in
               (record.teacher_scores if case.loss == "kl_distillation" else record.labels)]
    padded, valid = pad_groups(torch.stack(scores), SIZES)
    loss = loss_of(case.loss, RerankerConfig())(
        padded, pad_groups(torch.tensor(targets, dtype=torch.float64), SIZES)[0], valid).mean
    loss.backward()
    assert float(torch.stack(scores).detach().std()) > 0.1
    path = folder / f"gradients-{case.directory}-{case.loss}"
    norm = (save_adapter_gradients(model, folder / case.directory, path) if case.adapters else
            save_gradients(model, path))
    if case.model == "internlm2":
        as_internlm2(path)
    return Reference(loss=float(loss.detach()), norm=norm, gradients=str(path))


def _adapter_of(case: Case, folder: Path) -> Path:
    """A PEFT directory for the model of a case, its classifier in it, if it has one; made when first asked for."""
    path = folder / case.directory
    if path.exists():
        return path
    if case.head == "yes_no":
        return write_adapter(path, folder / case.model, "CAUSAL_LM", "model.")
    stored = load_file(folder / case.model / "model.safetensors")
    head = {name: tensor + 0.1 for name, tensor in stored.items()
            if name.startswith(("score", "classifier", "head.")) or ".pooler." in name}
    return write_adapter(path, folder / case.model, "SEQ_CLS", ENCODERS.get(case.model, "model."), head)


def run_config(case: Case, folder: str) -> RunConfig:
    return RunConfig(
        task="reranker", model=ModelConfig(path=str(Path(folder) / case.directory), dtype="float32"),
        reranker=RerankerConfig(head=case.head), objective=ObjectiveConfig(loss=case.loss),
        parallel=ParallelConfig(**case.parallel),
        training=TrainingConfig(global_batch_size=len(SIZES), micro_batch_size=case.micro_batch_size,
                                micro_batch_tokens=case.tokens, moe_aux_loss_coefficient=0.0),
        optimizer=OptimizerConfig(distributed=case.distributed))


def run_case(case: Case, folder: str, gradients: str) -> dict[str, Any]:
    """One real step: squared errors, metrics, gradient norm, number of micro-batches. Called by all ranks."""
    from megatron_embed.loading.model_directory import find_model
    from megatron_embed.loading.reranker import load_reranker_chunks
    from megatron_embed.models.encoder import attention_kernel
    from megatron_embed.models.heads import HeadSpec
    from megatron_embed.objectives.reranking import Reranking
    from megatron_embed.parallel.topology import initialize
    from megatron_embed.training.grad_cache import GradCache
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp
    from megatron_embed.training.step import seed_step

    config = run_config(case, folder)
    topology = initialize(config.parallel)
    model = find_model(config.model.path)
    tokenizer = tokenizer_of(model.hf, case.model)
    spec = HeadSpec(kind="score") if case.head == "score" else HeadSpec(
        kind="yes_no", true_token_id=tokenizer.token_of(YES, "yes"), false_token_id=tokenizer.token_of(NO, "no"))
    chunks = load_reranker_chunks(model, config, topology, spec, new_weights=True)
    wrapped = wrap_in_ddp(chunks, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    step = GradCache(chunks=wrapped, models=chunks, topology=topology,
                     objective=Reranking(config.objective.loss, config.reranker, topology.dp_group),
                     kernel=attention_kernel(config, chunks[0].shape),
                     has_dropout=False)
    batch = _batch_of_rank(case, config, topology, tokenizer)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    seed_step(7, 0, topology)
    if case.sabotage == "context":
        for chunk in chunks:
            if chunk.head is not None:
                chunk.head.cp_size = 1
    metrics = step(batch).metrics()
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    gather_shards(wrapped)
    return {"squared_errors": _squared_errors(chunks, topology, Path(gradients), spec), "metrics": metrics,
            "norm": norm, "micro_batches": len(batch.micro_batches)}


def _batch_of_rank(case: Case, config: RunConfig, topology: Any, tokenizer: PairTokenizer) -> RerankBatch:
    from megatron_embed.parallel.topology import token_alignment
    from megatron_embed.training.bin_sync import agree_on_rerank_bins

    share = len(SIZES) // topology.dp_size
    packing = PackingSpec(micro_batch_size=case.micro_batch_size, alignment=token_alignment(config.parallel),
                          uniform_size=topology.pp_size > 1, micro_batch_tokens=case.tokens)
    batch = build_rerank_batch(
        records(case.loss)[topology.dp_rank * share : (topology.dp_rank + 1) * share], tokenizer, packing)
    if case.tokens is not None:
        batch = agree_on_rerank_bins(batch, topology, budget=case.tokens)
    if case.sabotage == "labels":
        batch = dataclasses.replace(batch, labels=batch.labels.roll(1))
    return batch


def _squared_errors(chunks: Any, topology: Any, gradients: Path, spec: Any) -> SquaredErrors:
    """Errors of this rank's parameters, its head included."""
    from megatron_embed.convert.peft import is_peft_directory

    if is_peft_directory(gradients):
        return squared_errors_of_adapters(chunks, topology, gradients) | _adapted_head_errors(chunks, gradients, spec)
    return squared_errors(chunks, topology, gradients) | _head_errors(chunks, gradients, spec)


def _head_errors(chunks: Any, gradients: Path, spec: Any) -> SquaredErrors:
    from megatron_embed.convert.head_tensors import read_head
    from megatron_embed.convert.hf_directory import HFDirectory

    errors: SquaredErrors = {}
    with HFDirectory(gradients) as source:
        for chunk in chunks:
            if chunk.head is not None and chunk.head.weight is not None:
                expected = read_head(source, source.shape, spec.kind,
                                     spec.token_ids if spec.kind == "yes_no" else None, str(gradients))
                for name, parameter in chunk.head.named_parameters():
                    errors[f"head.{name}", 0] = squared_error(parameter, expected[name])
    return errors


def _adapted_head_errors(chunks: Any, gradients: Path, spec: Any) -> SquaredErrors:
    """Errors of a classifier that is trained beside the adapters."""
    from megatron_embed.convert.head_tensors import score_names
    from megatron_embed.convert.peft import PeftAdapter
    from megatron_embed.convert.tables.lookup import rules_for

    errors: SquaredErrors = {}
    for chunk in chunks:
        trained = {name: parameter for name, parameter in chunk.global_parameters().items()
                   if parameter.requires_grad and name.startswith("head.")}
        assert chunk.head is None or (spec.kind == "score") == bool(trained)
        if chunk.head is not None and spec.kind == "score":
            with PeftAdapter(gradients, rules_for(chunk.shape.family), chunk.shape) as source:
                for name, stored in score_names(chunk.shape.family).items():
                    if f"head.{name}" in trained:
                        errors[f"head.{name}", 0] = squared_error(trained[f"head.{name}"], source.read_head(stored))
    return errors


def error_of(per_rank: list[dict[str, Any]], reference: Reference) -> tuple[float, str]:
    """(largest relative error, its parameter)."""
    return largest_error([rank["squared_errors"] for rank in per_rank], reference.norm, zero_gradients=True)
