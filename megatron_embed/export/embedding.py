"""From a run's last checkpoint to a directory that the stock libraries load, compared before it gets its name."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.config.json_file import read_json_file
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import open_checkpoint
from megatron_embed.convert.convert import megatron_to_hf
from megatron_embed.convert.dense_tensors import take_dense
from megatron_embed.convert.vocabulary_tensors import vocabulary_class
from megatron_embed.data.tokenizer import RoleTokenizer, fill_template
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.sparse_vectors import sparse_vectors
from megatron_embed.evaluation.stored_vectors import Ranges, ranges_text
from megatron_embed.export.sentence_transformers import export_sentence_transformers
from megatron_embed.export.verified_write import WantedExport, export, export_on_rank_0
from megatron_embed.export.verify import ExpectedSettings, compare_with_sentence_transformers
from megatron_embed.export.verify_joint import JointProbe, compare_joint_heads
from megatron_embed.export.verify_multi_vector import compare_with_multi_vector_encoder
from megatron_embed.export.verify_sparse import compare_with_sparse_encoder
from megatron_embed.loading.model_directory import ModelDirectory
from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.families import ModelShape, model_shape
from megatron_embed.models.joint_files import JointHeads, remove_joint_heads, write_settings_file
from megatron_embed.models.saved_settings import default_pooling
from megatron_embed.names import RANGES_FILE, Role
from megatron_embed.platform.bf16_support import processor_has_bf16

if TYPE_CHECKING:
    from megatron_embed.export.engines.files import EngineFiles

MINIMUM_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
"""Between the exported model in the stock library and ours in memory, for every text."""

PROBES = {
    "en": ("What is the capital of France?", "A short text.",
           "Gradient checkpointing trades computation for memory: activations are dropped in the forward pass and "
           "computed again when the backward pass needs them, so that longer sequences or larger batches fit on the "
           "same device."),
    "zh": ("深度学习是什么？", "向量检索把文本变成向量，再按相似度排序。"),
    "code": ("def mean(values):\n    return sum(values) / len(values)",
             "SELECT name FROM users WHERE age > 30 ORDER BY name;"),
}
"""Texts of several scripts and lengths on which an exported checkpoint is compared."""
PROBE_TEXTS = [text for texts in PROBES.values() for text in texts]

LONGEST_COMPUTED = 1024
"""Tokens up to which texts of the maximum length are put through the models, here and in the stock library, which
computes on the CPU. Of longer ones the ids alone are compared: what models make of equal ids is known by then."""

_LAST_TOKENS = (" a", ".", " the", " 1", "的", " x y", " to be", ", or", " a b c")
"""One of them after a text gives it the number of tokens that is missing."""


@dataclass(frozen=True, kw_only=True)
class LengthProbes:
    """Texts at the border of a maximum length."""

    fitting: tuple[str, ...]
    """Texts of exactly that many tokens, prompt and special tokens included; empty: none was found."""
    too_long: tuple[str, ...]
    """A text of one token more, if one was found, and one of about twice as many."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them."""
        return self.fitting + self.too_long


def length_probes(count: Callable[[str], int], limit: int) -> LengthProbes:
    """Texts of `limit` tokens, of one more and of about twice as many, by `count`, which tells tokens of a text."""
    words = " ".join(PROBE_TEXTS).split()

    def first_words(size: int) -> str:
        return " ".join(words[index % len(words)] for index in range(size))

    low, high = 0, 1
    while count(first_words(high)) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(first_words(middle)) <= limit else (low, middle)
    ends = ("", *_LAST_TOKENS, *(first + last for first in _LAST_TOKENS for last in _LAST_TOKENS))
    by_tokens = dict[int, str]()
    for text in (first_words(size) + end for size in range(low, max(low - 4, 0), -1) for end in ends):
        if not {limit, limit + 1} <= by_tokens.keys():
            by_tokens.setdefault(count(text), text)
    one_more = [by_tokens[limit + 1]] if limit + 1 in by_tokens else []
    return LengthProbes(fitting=(by_tokens[limit],) if limit in by_tokens else (),
                        too_long=(*one_more, first_words(2 * high)))


def border_texts(tokenizer: RoleTokenizer, role: Role, longest: int) -> LengthProbes:
    """Texts at the border of a role's maximum length, with its prompt; none of those that are cut where the export,
    which knows one length for all, cuts at `longest`."""
    limit = tokenizer.max_length(role)
    probes = length_probes(lambda text: tokenizer.count_tokens([text], role)[0], limit)
    return probes if limit == longest else LengthProbes(fitting=probes.fitting, too_long=())


def stock_runs_causally(shape: ModelShape, bidirectional: bool = False) -> bool:
    """Whether the installed Transformers would run the model as another one: up to 5.1 it does not read `is_causal` of
    config.json, by which decoders attend to the whole text; encoders and EmbeddingGemma do so by themselves."""
    old = tuple(map(int, version("transformers").split(".")[:2])) < (5, 2)
    by_itself = shape.bidirectional and (shape.classifier is not None or shape.relative_positions is not None
                                         or shape.family == "gemma3_text")
    return old and (shape.bidirectional or bidirectional) and not by_itself


def write_settings(hf: Path, config: RunConfig, model: ModelDirectory) -> None:
    """Sentence Transformers files beside a checkpoint's configuration, as this run pools, normalizes and prompts: with
    `embedding.instruction` in its place, since that library takes a prompt as it stands."""
    unit_length, saved = config.embedding.unit_length, model.saved
    pooling = config.embedding.pooling or saved.pooling or default_pooling(model.shape)
    roles: tuple[Role, ...] = ("query", "document")
    lengths = {role: config.data.max_length(role) for role in roles}
    take_dense(hf, saved.dense)  # the trained weights are among the checkpoint's tensors
    (hf / RANGES_FILE).unlink(missing_ok=True)  # of the vectors before training
    export_sentence_transformers(
        hf, pooling=pooling, normalize=unit_length, needs_eos=pooling == "lasttoken" and saved.chat is None and (
            not saved.sparse),
        query_prompt=fill_template(config.data.prompt("query"), config.embedding.instruction),
        document_prompt=config.data.prompt("document"), max_seq_length=max(lengths.values()),
        embedding_dimension=model.shape.hidden_size, saved=dataclasses.replace(
            saved, truncation_side="right",
            dense=() if model.joint is not None else _without_folders(model.dense(config.embedding)),
            similarity=saved.similarity if unit_length else "dot",
            role_lengths=dict(lengths) if saved.role_lengths or saved.vectors is not None else {}))
    remove_joint_heads(hf)  # the trained ones, if there are any, are among the checkpoint's tensors
    if model.joint is not None:
        write_settings_file(hf, JointHeads(dim=model.joint.token_dim, score_weights=model.joint.score_weights))
    facts: dict[str, object] = {}
    if config.model.bidirectional and not model.shape.bidirectional:
        facts["is_causal"] = False
    if saved.sparse:
        facts["architectures"] = [vocabulary_class(model.shape.family)]
    if config.embedding.matryoshka_dims:
        facts["matryoshka_dimensions"] = sorted(config.embedding.matryoshka_dims)  # what vLLM lets a request ask for
    if facts:
        file = hf / "config.json"
        values = {**read_json_file(file), **facts}
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _without_folders(dense: Sequence[DenseSettings]) -> tuple[DenseSettings, ...]:
    """The modules before they have folders."""
    return tuple(dataclasses.replace(settings, path="") for settings in dense)


@dataclass(frozen=True, kw_only=True)
class RoleProbe:
    """Texts of a role, with their vectors and tokens in the trained model."""

    role: Role
    texts: list[str]
    vectors: Tensor | TextVectors
    """[texts, dim], or those of a multi-vector model."""
    cut: list[tuple[str, list[int]]]
    """Texts at the border of the maximum length, and the ids of their tokens."""
    sparse: bool = False
    """The model is a sparse one."""
    joint: JointProbe | None = None
    """A joint model, whose `vectors` are the texts' own ones; None: another one."""

    @property
    def one_each(self) -> Tensor:
        """The vectors, one of each text."""
        assert isinstance(self.vectors, Tensor) and not self.sparse, "no other engine's files hold such a model"
        return self.vectors

    def compare(self, directory: Path, settings: ExpectedSettings, minimum_cosine: float) -> str:
        """Asks Sentence Transformers; the report. Raises CheckpointError for another model."""
        # The library runs on this processor, where bfloat16 without instructions for it takes 25 times as long.
        slow = settings.dtype == "bfloat16" and not processor_has_bf16()
        dtype = "float32" if slow else "auto"
        if isinstance(self.vectors, TextVectors):
            report = compare_with_multi_vector_encoder(
                directory, self.texts, self.vectors, role=self.role, minimum_cosine=minimum_cosine, expected=settings,
                cut=self.cut, dtype=dtype)
        elif self.sparse:
            report = compare_with_sparse_encoder(
                directory, self.texts, self.vectors, role=self.role, minimum_cosine=minimum_cosine, expected=settings,
                cut=self.cut, dtype=dtype)
        else:
            report = compare_with_sentence_transformers(
                directory, self.texts, self.vectors, prompt_name=self.role, minimum_cosine=minimum_cosine,
                expected=settings, cut=self.cut, dtype=dtype)
        joint = "" if self.joint is None else "; " + str(compare_joint_heads(
            directory, self.texts, self.joint, minimum_cosine=minimum_cosine,
            bidirectional=stock_runs_causally(model_shape(directory))))
        lengths = sorted({len(ids) for _, ids in self.cut})
        return f"{report}{joint}; the same tokens of {len(self.cut)} texts at the maximum length, {lengths[-1]} tokens"


def export_probes(encoder: TextEncoder, texts: Sequence[str], longest: int) -> list[RoleProbe]:
    """The vectors of `texts`, and of texts that are as long as the role allows or longer. Called by all ranks.

    `longest`: tokens at which the export cuts texts of either role.
    """
    roles: tuple[Role, ...] = ("query", "document")
    probes = []
    several = encoder.pooling == "tokens"  # then the export knows a length for each role
    for role in roles:
        border = list(border_texts(encoder.tokenizer, role,
                                   encoder.tokenizer.max_length(role) if several else longest).texts)
        whole = [*texts, *(border if encoder.tokenizer.max_length(role) <= LONGEST_COMPUTED else [])]
        ids = encoder.tokenizer.tokenize(border, role).token_ids
        joint = _joint_probe(encoder, whole, role)
        vectors = _vectors_of_probes(encoder, whole, role) if joint is None else joint.dense
        probes.append(RoleProbe(role=role, texts=whole, vectors=vectors, joint=joint,
                                cut=list(zip(border, ids, strict=True)), sparse=encoder.pooling == "splade"))
    return probes


def _joint_probe(encoder: TextEncoder, texts: list[str], role: Role) -> JointProbe | None:
    """What a joint model gives for a few texts; None of another model."""
    joint = encoder.tokenizer.joint
    return None if joint is None else JointProbe(ids=encoder.tokenizer.tokenize(texts, role).token_ids, format=joint,
                                                 rows=encoder.vectors(texts, role))


def _vectors_of_probes(encoder: TextEncoder, texts: list[str], role: Role) -> Tensor | TextVectors:
    """Vectors of a few texts; those of a sparse model as [texts, vocabulary]."""
    if encoder.pooling == "tokens":
        return encoder.vectors(texts, role)
    if encoder.pooling == "splade":
        return torch.from_numpy(sparse_vectors(encoder, texts, role).toarray())
    return encoder.encode(texts, role)


def export_model(checkpoint: str, wanted: Sequence[WantedExport], encoder: TextEncoder, texts: Sequence[str],
                 dtype: str, settings: ExpectedSettings, ranges: Ranges) -> None:
    """Writes each directory from a checkpoint, of a run from the newest, if Sentence Transformers, and the engine whose
    files it has, give the vectors of the model in memory. Called by all ranks; see `export_on_rank_0`.

    `ranges`: of int8 vectors, for RANGES_FILE; empty: there is none.
    """
    probes = export_probes(encoder, texts, settings.max_seq_length)

    def verify(addition: "EngineFiles | None", directory: Path) -> list[str]:
        lines = [f"{probe.role} vectors: {probe.compare(directory, settings, MINIMUM_COSINE[dtype])}"
                 for probe in probes]
        return lines + ([] if addition is None else [
            f"{probe.role} vectors: "
            f"{addition.compare_vectors(directory, probe.texts, probe.one_each, probe.role, MINIMUM_COSINE[dtype])}"
            for probe in probes])

    def complete(item: WantedExport, directory: Path) -> None:
        if ranges:
            (directory / RANGES_FILE).write_text(ranges_text(ranges), encoding="utf-8")
        item.complete(directory)

    def run_export(item: WantedExport) -> list[str]:
        merge = open_checkpoint(checkpoint).info.adapters is not None
        return export(functools.partial(megatron_to_hf, checkpoint, item.destination, merge_lora=merge),
                      complete=functools.partial(complete, item), verify=functools.partial(verify, item.addition),
                      note=item.finish)

    export_on_rank_0({item.destination: functools.partial(run_export, item) for item in wanted})
