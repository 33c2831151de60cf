"""Gradients of one step under a layout against one process: Transformers' own model in float64, plain autograd.

The reference embeds one text at a time, without bins, ranks or passes; it builds micro-batches and masks from the texts
of the rows. Its gradients are saved as a model directory and compared by gradient_errors.py.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch, split_to_count
from megatron_embed.data.records import Record
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.names import Pooling
from tests.helpers.adapter_reference import save_adapter_gradients, with_adapter, write_adapter
from tests.helpers.dense_directories import SHAPES, add_modules, load_steps, save_gradients_of, through
from tests.helpers.embedding_reference_ranks import RankResult, run_cases, tokenizer_of
from tests.helpers.exactness_cases import (
    BOUND,
    JOINT_LOSS_WEIGHTS,
    JOINT_SCORE_WEIGHTS,
    JOINT_TEMPERATURE,
    LOSS_BOUND,
    MULTI_VECTOR_TEMPERATURE,
    NUM_NEGATIVES,
    POOLINGS,
    ROWS,
    SPARSE_TEMPERATURE,
    SPARSE_WEIGHTS,
    Case,
    Kind,
    Rows,
)
from tests.helpers.families import DEBERTA, SMALL_IDS
from tests.helpers.gradient_errors import largest_error, save_gradients
from tests.helpers.internlm import as_internlm2, stock_of
from tests.helpers.joint_reference import (
    JointHeads,
    add_joint_heads,
    joint_loss,
    load_joint_heads,
    save_joint_gradients,
    scores_of_texts,
)
from tests.helpers.multi_vector_reference import TokenReference, add_token_modules, load_projection
from tests.helpers.other_models import (
    COMPATIBLE_WEIGHT,
    distance_to_teacher,
    guided_pairs,
    loss_with_index,
    old_documents,
)
from tests.helpers.pretend_ranks import run_on_pretend_ranks
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sparse_reference import SparseReference, regularizer, save_sparse_model
from tests.helpers.stored_reference import stored_similarities, sum_of_weights
from tests.helpers.toys import MINI_EN, copy_tokenizer

VOCABULARY = 30522
_DECODER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 2048}
_MODELS: dict[Kind, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3Model", _DECODER),
    "bert": ("BertConfig", "BertModel", {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 48,
        "max_position_embeddings": 2048, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeModel", {
        **_DECODER, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 48,
        "max_position_embeddings": 258, "type_vocab_size": 1, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}),
    "qwen2": ("Qwen2Config", "Qwen2Model", {key: value for key, value in _DECODER.items() if key != "head_dim"}),
    "llama": ("LlamaConfig", "LlamaModel", {
        **_DECODER, "num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1.0e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", "MistralModel", {**_DECODER, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", "MixtralModel", {
        **_DECODER, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {
        "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 8, "intermediate_size": 48,
        "max_position_embeddings": 2048, "local_attention": 10, **SMALL_IDS}),
    "t5": ("T5Config", "T5EncoderModel", {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 8, "num_layers": 4, "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 12, "relative_attention_max_distance": 30, "dropout_rate": 0.0}),
    "gemma2": ("Gemma2Config", "Gemma2Model", {**_DECODER, "sliding_window": 8, "query_pre_attn_scalar": 12,
                                               "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3TextModel", {
        **_DECODER, "sliding_window": 12, "sliding_window_pattern": 2, "use_bidirectional_attention": True}),
    "phi3": ("Phi3Config", "Phi3Model", {
        **{key: value for key, value in _DECODER.items() if key != "head_dim"}, **SMALL_IDS, "sliding_window": 8}),
    "glm4": ("Glm4Config", "Glm4Model", {**_DECODER, **SMALL_IDS}),
    "nomic_bert": ("NomicBertConfig", "NomicBertModel", {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 48,
        "max_position_embeddings": 2048}),
    "gte-qwen2": ("Qwen2Config", "Qwen2Model", {
        **{key: value for key, value in _DECODER.items() if key != "head_dim"}, "is_causal": False}),
    "internlm2": ("LlamaConfig", "LlamaModel", {key: value for key, value in _DECODER.items() if key != "head_dim"}),
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", {
        **DEBERTA, "num_attention_heads": 8, "max_position_embeddings": 2048})}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Loss and gradients of one process."""

    loss: float
    candidates: int
    norm: float
    """L2 norm of all gradients together."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a case."""

    error: float
    """Largest over the repeats."""
    worst: str
    """The parameter with that error."""
    wrong_steps: int
    """Repeats whose error is above the bound."""
    loss: float
    loss_error: float
    norm_error: float
    """Relative, of the gradient norm that the optimizer computes for clipping and the log."""
    tokens: int
    """Real tokens of the largest micro-batch."""
    bins: tuple[int, ...]
    """Micro-batches of each rank before the ranks agreed on their number."""
    shared: int
    """Rows of all ranks that share the vector of another row's text."""
    reference: Reference

    @property
    def exact(self) -> bool:
        return (self.error <= BOUND and self.wrong_steps == 0 and self.loss_error <= LOSS_BOUND
                and self.norm_error <= BOUND)


class EmbeddingReference:
    """Models, rows and references in a folder; made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, rows in ROWS.items():
            _write_rows(folder / f"{name}.jsonl", rows)
        self._references: dict[str, Reference] = {}

    def make_model(self, kind: Kind) -> None:
        """Write FOLDER/kind, once."""
        if not (self.folder / kind).exists():
            save_model(self.folder / kind, kind, self.folder / "short.jsonl")

    def reference(self, case: Case) -> Reference:
        """Loss and norm of the reference; its gradients lie in FOLDER/gradients-NAME."""
        if case.sparse and not (self.folder / case.model).exists():
            config, _, settings = _MODELS[case.kind]
            save_sparse_model(self.folder / case.model, config, settings, tied=case.sparse == "tied",
                              taught=True, seed=12 if case.sparse == "tied" else 11)
        if not case.sparse:
            self.make_model(case.kind)
        if case.rows == "long" and not (self.folder / case.model).exists():
            _save_long_model(self.folder, case.kind)
        if case.dense and not (self.folder / case.model).exists():
            shutil.copytree(self.folder / case.kind, self.folder / case.model)
            add_modules(self.folder / case.model, SHAPES[case.dense], POOLINGS[case.kind])
        if case.multi and not (self.folder / case.model).exists():
            shutil.copytree(self.folder / case.kind, self.folder / case.model)
            add_token_modules(self.folder / case.model, case.multi)
        if case.joint and not (self.folder / case.model).exists():
            shutil.copytree(self.folder / case.kind, self.folder / case.model)
            add_joint_heads(self.folder / case.model)
        if case.adapters and not (self.folder / f"{case.model}-lora").exists():
            write_adapter(self.folder / f"{case.model}-lora", self.folder / case.model)
        if case.reference not in self._references:
            self._references[case.reference] = _compute_reference(case, self.folder)
        return self._references[case.reference]

    def run(self, cases: Sequence[Case], timeout_seconds: float = 600.0) -> list[Outcome]:
        """Outcomes of cases that share layout and kernel, in one world."""
        assert len({case.layout for case in cases}) == 1
        references = [self.reference(case) for case in cases]
        assert len({case.kernel for case in cases}) == 1
        run = run_on_pretend_ranks if cases[0].kernel == "flash" else run_on_ranks
        per_rank = run(run_cases, cases[0].layout.ranks, cases, str(self.folder), timeout_seconds=timeout_seconds)
        return [_outcome([results[index] for results in per_rank], reference)
                for index, reference in enumerate(references)]


def save_model(path: Path, kind: Kind, rows: Path | None = None, **changes: Any) -> Path:
    """A model with random weights, norms and biases, and a real WordPiece tokenizer; taught to tell `rows` apart.

    Untrained models give all texts nearly the same embedding, so that gradients are differences of nearly equal
    numbers: float32 itself is then off by more than the bound.

    `changes`: other settings of the model's configuration.
    """
    config_name, model_name, settings = _MODELS[kind]
    torch.manual_seed(3)
    config = getattr(transformers, config_name)(**{**settings, "vocab_size": VOCABULARY, **changes})
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Strong routers, so that no expert is chosen by a rounding error.
            scale = 1.0 if len(parameter) == VOCABULARY or "gate.weight" in name else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    path.mkdir()
    copy_tokenizer(path)
    model.config.save_pretrained(path)
    if rows is not None:
        records = _records(rows, "short")
        tokenizer = tokenizer_of(path, ROWS["short"])
        _teach(model, lambda: _embed_padded(model, POOLINGS[kind], records, tokenizer), ROWS["short"].temperature, 1.5)
    model.save_pretrained(path)
    if kind == "internlm2":
        as_internlm2(path)
    return path


def _save_long_model(folder: Path, kind: Kind) -> None:
    """The model of `kind` taught to tell the long rows apart, too."""
    path = folder / f"{kind}-long"
    shutil.copytree(folder / kind, path)
    model = transformers.AutoModel.from_pretrained(path)
    records, tokenizer = _records(folder / "long.jsonl", "long"), tokenizer_of(path, ROWS["long"])
    _teach(model, lambda: _embed_rows(model, None, records, tokenizer, POOLINGS[kind]), ROWS["long"].temperature, 1.8)
    model.save_pretrained(path)


def _records(path: Path, rows: str) -> list[Record]:
    records = open_records((TrainFile(path=str(path)),))
    return [records[row] for row in range(ROWS[rows].count)]


Embeddings = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""([queries, dim], [documents, dim], [queries] the positive's document)."""


def _teach(model: torch.nn.Module, embed: Callable[[], Embeddings], temperature: float, goal: float) -> None:
    """AdamW until the loss has come down to a middling value."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        query, document, positive = embed()
        loss = torch.nn.functional.cross_entropy(query @ document.T / temperature, positive)
        if loss < goal:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the model did not learn: loss {float(loss)}")


def _embed_padded(model: torch.nn.Module, pooling: Pooling, records: Sequence[Record],
                  tokenizer: RoleTokenizer) -> Embeddings:
    """All texts at once, which is fast for short ones."""
    documents = [[record.positive[0], *record.negatives[:NUM_NEGATIVES]] for record in records]
    ids = [*tokenizer.tokenize([record.query for record in records], "query").token_ids,
           *tokenizer.tokenize([text for texts in documents for text in texts], "document").token_ids]
    lengths = torch.tensor([len(tokens) for tokens in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in ids], batch_first=True)
    positions = torch.arange(padded.shape[1])
    mask = positions < lengths[:, None]
    first, last = (positions == 0).expand_as(mask), positions == lengths[:, None] - 1
    weights = {"lasttoken": last, "cls": first, "mean": mask}[pooling]
    states = model(padded, attention_mask=mask).last_hidden_state
    rows = torch.nn.functional.normalize((states * weights[:, :, None]).sum(dim=1), dim=1)
    positive = torch.tensor([sum(map(len, documents[:row])) for row in range(len(records))])
    return rows[:len(records)], rows[len(records):], positive


def _write_rows(path: Path, rows: Rows) -> None:
    """Rows of the English sample whose groups of documents differ in size."""
    source = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()]
    paragraphs = [row["positive"][0] if rows.joined > 1 else row["positive"][0].split(". ")[0] for row in source]
    written = []
    for row in range(rows.count):
        others = paragraphs[200 + 40 * row:]
        documents = [" ".join([text, *others[(rows.joined - 1) * index:][:rows.joined - 1]])
                     for index, text in enumerate([paragraphs[row], *others[:3]])]
        most = rows.most_negatives[2 * row // rows.count]
        written.append({"query": source[row]["query"], "positive": documents[:1],
                        "negatives": documents[1:1 + min(row % 4, most)]})
    if rows.masked:
        _repeat_texts(written)
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


def _repeat_texts(rows: list[dict[str, Any]]) -> None:
    """Makes rows far from each other (so: of different ranks) share texts, in every way that a mask must see."""
    half = len(rows) // 2
    for index in range(half):
        row, other = rows[index], rows[index + half]
        if index % 4 == 0:
            other["positive"] = row["positive"]
        if index % 4 == 1:
            other["query"] = row["query"]
        if index % 4 == 2:
            other["positive"] = other["positive"] + [row["negatives"][0]]
        if index % 4 == 3:
            row["negatives"][0], row["negatives"][1] = other["positive"][0], row["positive"][0]


def _compute_reference(case: Case, folder: Path) -> Reference:
    """One process, float64, one text at a time, InfoNCE by autograd, over all rows or each pool of negatives."""
    rows = ROWS[case.rows]
    records, tokenizer = _records(folder / f"{case.rows}.jsonl", case.rows), tokenizer_of(folder / case.model, rows)
    auto = transformers.AutoModelForTextEncoding if case.kind == "t5" else transformers.AutoModel
    if case.sparse:
        auto = transformers.AutoModelForMaskedLM if case.kind == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(stock_of(folder / case.model), dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"  # the default's grouped product has no float64
    if case.adapters:
        model = with_adapter(model, folder / f"{case.model}-lora")
    routers = _RouterLogits()
    routers.watch(model)
    micro_batches = micro_batches_of(case, records, tokenizer)
    regularizers = torch.zeros((), dtype=torch.float64)
    if case.sparse:
        steps, reference = [], SparseReference(model, lambda: routers.texts.append([]))
        queries, documents, positive = _texts_of(records, tokenizer, reference.vector)
        logits = queries @ documents.T / SPARSE_TEMPERATURE
        regularizers = sum(weight * regularizer(case.sparse, vectors) for weight, vectors in zip(
            SPARSE_WEIGHTS[case.sparse], (queries, documents), strict=True))
        reference.check()
    elif case.joint:
        steps, joint_heads = [], load_joint_heads(folder / case.model)
        three, positive = _joint_rows(case, model, routers, joint_heads, records, tokenizer)
        logits = three[0]
    elif case.multi:
        steps = load_projection(folder / case.model)
        similarity, positive = _maxsim_rows(case, folder, model, routers, steps[0][1], records)
        logits = similarity / MULTI_VECTOR_TEMPERATURE
    else:
        steps = load_steps(folder / case.model) if case.dense else []
        query, document, positive = _embed_rows(model, routers, records, tokenizer, POOLINGS[case.kind], steps)
        logits = query @ document.T / rows.temperature
        if case.others == "query side":
            logits = query @ old_documents(records, query.shape[1]).T / rows.temperature
    excluded = excluded_pairs(records) if rows.masked else torch.zeros_like(logits, dtype=torch.bool)
    assert not rows.masked or 0.01 < float(excluded.double().mean()) < 0.5
    if case.others == "guided":
        excluded = excluded | guided_pairs(records, positive)
    pools = pools_of(case, micro_batches, records)

    def loss_of(chosen: torch.Tensor, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        masked = chosen.masked_fill(excluded[queries][:, documents], -math.inf)
        return torch.nn.functional.cross_entropy(masked, torch.searchsorted(documents, positive[queries]),
                                                 reduction="sum")

    if case.joint:
        losses = [joint_loss([score[queries][:, documents].masked_fill(excluded[queries][:, documents], -math.inf)
                              / JOINT_TEMPERATURE for score in three],
                             torch.searchsorted(documents, positive[queries]), JOINT_SCORE_WEIGHTS, JOINT_LOSS_WEIGHTS,
                             distils=case.joint == "distilled").sum() for queries, documents in pools]
    elif case.stored:
        losses = [weight * loss_of(similarity / rows.temperature, *pool) for pool in pools
                  for similarity, weight in stored_similarities(query[pool[0]], document[pool[1]], case.stored)]
    else:
        losses = [loss_of(logits[queries][:, documents], queries, documents) for queries, documents in pools]
    loss = torch.stack(losses).sum() / len(records)
    loss = loss + regularizers
    if case.others == "compatible":
        loss = loss + COMPATIBLE_WEIGHT * loss_with_index(case, query, positive, pools, records)
    if case.others == "distilled":
        loss = distance_to_teacher(query, document, records)
    total = loss
    if case.aux:
        total = loss + case.aux * _auxiliary_loss(routers, [part for rank in micro_batches for part in rank],
                                                  model.config)
    total.backward()
    highest = sum(len(queries) * math.log(len(documents)) for queries, documents in pools) / len(records)
    highest *= sum_of_weights(case.stored) if case.stored else 1.0
    highest *= 1.3 if case.joint else 1.0  # its heads are random, and the texts' vectors alone were taught
    highest *= 1 + COMPATIBLE_WEIGHT if case.others == "compatible" else 2.0 if case.others == "query side" else 1.0
    assert 0.3 < float((loss - regularizers).detach()) < highest, f"{case.reference}: loss {float(loss.detach())}"
    gradients = folder / f"gradients-{case.reference}"
    norm = (save_adapter_gradients(model, folder / f"{case.model}-lora", gradients) if case.adapters else
            save_gradients(model, gradients, unused=("pooler",)))
    if case.kind == "internlm2":
        as_internlm2(gradients)
    norm = math.hypot(norm, math.sqrt(save_gradients_of(steps, gradients)))
    if case.joint:
        norm = math.hypot(norm, save_joint_gradients(joint_heads, gradients))
    return Reference(loss=float(loss.detach()), candidates=max(len(documents) for _, documents in pools), norm=norm)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One micro-batch of one data-parallel rank."""

    texts: tuple[int, ...]
    """Indices of its texts; all texts are counted row by row: a query, then its documents."""
    repeated: bool
    """It only repeats a micro-batch, so that all ranks have as many."""


def documents_of(record: Record) -> list[str]:
    return [record.positive[0], *record.negatives[:NUM_NEGATIVES]]


def micro_batches_of(case: Case, records: Sequence[Record], tokenizer: RoleTokenizer) -> list[list[Part]]:
    """Micro-batches of each data-parallel rank. Under a token budget `data` packs them; nothing else of it is used."""
    texts = list(itertools.accumulate((1 + len(documents_of(record)) for record in records), initial=0))
    share = len(records) // case.layout.dp
    rows = [range(rank * share, (rank + 1) * share) for rank in range(case.layout.dp)]
    if case.tokens is None:
        size = share // case.micro_batches
        return [[Part(texts=tuple(range(texts[first], texts[first + size])), repeated=False)
                 for first in mine[::size]] for mine in rows]
    keep_groups_together = case.negatives == "micro_batch"
    batches = [build_embed_batch([records[row] for row in mine], tokenizer,
                                 PackingSpec(micro_batch_tokens=case.tokens, keep_groups_together=keep_groups_together),
                                 DocumentsPerQuery(negatives=NUM_NEGATIVES)) for mine in rows]
    count = max(len(batch.micro_batches) for batch in batches)
    count += -count % (case.layout.pp if case.layout.vpp > 1 else 1)
    parts = []
    for mine, batch in zip(rows, batches, strict=True):
        numbers = [texts[row] for row in mine]
        numbers += [text for row in mine for text in range(texts[row] + 1, texts[row + 1])]
        filled = split_to_count(batch, count, batch.micro_capacity, keep_groups_together=keep_groups_together)
        parts.append([Part(texts=tuple(numbers[row] for row in micro.rows.tolist()), repeated=micro.repeated)
                      for micro in filled.micro_batches])
    return parts


def pools_of(case: Case, micro_batches: Sequence[Sequence[Part]],
             records: Sequence[Record]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(indices of queries, indices of the documents that they are compared with), each query once, ascending."""
    is_query = [index == 0 for record in records for index in range(1 + len(documents_of(record)))]
    queries = {text: index for index, text in enumerate(text for text, query in enumerate(is_query) if query)}
    documents = {text: index for index, text in enumerate(text for text, query in enumerate(is_query) if not query)}
    together = [set(queries) | set(documents)]
    if case.negatives == "micro_batch":
        together = [{text for part in parts if not part.repeated for text in part.texts}
                    for parts in zip(*micro_batches, strict=True)]
    pools = [tuple(torch.tensor(sorted(numbers[text] for text in texts & numbers.keys()))
                   for numbers in (queries, documents)) for texts in together if texts]
    assert sum(len(pool) for pool, _ in pools) == len(queries)
    return pools


def excluded_pairs(records: Sequence[Record]) -> torch.Tensor:
    """[queries, documents] bool: documents whose text some row with the same query has as a positive, except a row's
    own first positive."""
    documents = [(row, index, text) for row, record in enumerate(records)
                 for index, text in enumerate(documents_of(record))]
    return torch.tensor([[
        any(other.query == record.query and text in other.positive for other in records)
        and (owner, index) != (row, 0) for owner, index, text in documents] for row, record in enumerate(records)])


class _RouterLogits:
    """Router logits of a model by text, in the order of the texts: [texts][layers] of [tokens, experts]."""

    def __init__(self) -> None:
        self.texts: list[list[torch.Tensor]] = []

    def watch(self, model: torch.nn.Module) -> None:
        """Add the logits of every later forward pass to the last text."""
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)

    def _note(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.texts[-1].append(output[0])


def _embed_rows(model: torch.nn.Module, routers: "_RouterLogits | None", records: Sequence[Record],
                tokenizer: RoleTokenizer, pooling: Pooling, steps: Sequence[tuple[str, Any]] = ()) -> Embeddings:
    """Text by text: a query, then its documents."""
    query, document, positive = [], [], []
    for record in records:
        texts = [record.positive[0], *record.negatives[:NUM_NEGATIVES]]
        positive.append(len(document))
        ids = [*tokenizer.tokenize([record.query], "query").token_ids,
               *tokenizer.tokenize(texts, "document").token_ids]
        for index, tokens in enumerate(ids):
            if routers is not None:
                routers.texts.append([])
            states = model(torch.tensor([tokens])).last_hidden_state[0]
            row = {"lasttoken": states[-1], "cls": states[0], "mean": states.mean(dim=0)}[pooling]
            (document if index else query).append(torch.nn.functional.normalize(through(steps, row), dim=0))
    return torch.stack(query), torch.stack(document), torch.tensor(positive)


def _texts_of(records: Sequence[Record], tokenizer: RoleTokenizer,
              vector: Callable[[Sequence[int]], torch.Tensor]) -> Embeddings:
    """Text by text: a query, then its documents."""
    query, document, positive = [], [], []
    for record in records:
        positive.append(len(document))
        query.append(vector(tokenizer.tokenize([record.query], "query").token_ids[0]))
        document += [vector(ids) for ids in tokenizer.tokenize(documents_of(record), "document").token_ids]
    return torch.stack(query), torch.stack(document), torch.tensor(positive)


def _maxsim_rows(case: Case, folder: Path, model: Any, routers: "_RouterLogits", projection: Any,
                 records: Sequence[Record]) -> tuple[torch.Tensor, torch.Tensor]:
    """([queries, documents] MaxSim, [queries] the positive's document), text by text."""
    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        routers.texts.append([])
        states: torch.Tensor = model(ids, attention_mask=mask).last_hidden_state[0]
        return states

    reference = TokenReference(folder / case.model, case.multi, forward, projection)
    plain = tokenizer_of(folder / case.kind, ROWS[case.rows])  # of the directory without modules
    queries, documents, positive = [], [], []
    for record in records:
        positive.append(len(documents))
        (ids,) = plain.tokenize([record.query], "query").token_ids
        queries.append(reference.vectors(ids, is_query=True))
        documents += [reference.vectors(ids, is_query=False)
                      for ids in plain.tokenize(documents_of(record), "document").token_ids]
    return reference.scores(queries, documents), torch.tensor(positive)


def _joint_rows(case: Case, model: Any, routers: "_RouterLogits", heads: JointHeads, records: Sequence[Record],
                tokenizer: RoleTokenizer) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([queries, documents] of each score, [queries] the positive's document), text by text."""
    def text(ids: Sequence[int]) -> tuple[Sequence[int], Any]:
        routers.texts.append([])
        return heads.of(ids, model(torch.tensor([ids])).last_hidden_state[0], POOLINGS[case.kind])

    queries, documents, positive = [], [], []
    for record in records:
        positive.append(len(documents))
        queries.append(text(tokenizer.tokenize([record.query], "query").token_ids[0]))
        documents += [text(ids) for ids in tokenizer.tokenize(documents_of(record), "document").token_ids]
    ids, vectors = ([part[index] for part in (*queries, *documents)] for index in (0, 1))
    count = len(queries)
    heads.check(ids, vectors, count)
    return scores_of_texts(ids[:count], vectors[:count], ids[count:], vectors[count:]), torch.tensor(positive)


def _auxiliary_loss(routers: _RouterLogits, micro_batches: Sequence[Part], config: Any) -> torch.Tensor:
    """Mean over the micro-batches of all replicas of the sum over layers of E * sum_e f_e * P_e (Fedus et al. 2021,
    arXiv:2101.03961): f_e is the share of the choices that fell on expert e, P_e its mean probability."""
    losses = []
    for part in micro_batches:
        for layer in range(config.num_hidden_layers):
            logits = torch.cat([routers.texts[text][layer] for text in part.texts])
            probabilities = torch.softmax(logits, dim=-1)
            chosen = torch.topk(probabilities, config.num_experts_per_tok).indices
            share = torch.nn.functional.one_hot(chosen, config.num_experts).sum(dim=(0, 1)) / chosen.numel()
            losses.append(config.num_experts * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).sum() / len(micro_batches)


def _outcome(results: Sequence[RankResult], reference: Reference) -> Outcome:
    """The outcome of a case from all ranks' results."""
    errors = [largest_error([rank.squared_errors[repeat] for rank in results], reference.norm)
              for repeat in range(len(results[0].squared_errors))]
    losses = [loss for rank in results for loss in rank.losses]
    worst_loss = max(losses, key=lambda loss: abs(loss - reference.loss))
    return Outcome(
        error=max(errors)[0], worst=max(errors)[1], wrong_steps=sum(error > BOUND for error, _ in errors),
        loss=worst_loss, loss_error=abs(worst_loss - reference.loss) / reference.loss,
        norm_error=max(abs(rank.norm - reference.norm) for rank in results) / reference.norm,
        tokens=max(rank.tokens for rank in results), bins=tuple(rank.bins for rank in results),
        shared=sum(rank.shared for rank in results), reference=reference)
