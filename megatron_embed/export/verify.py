"""Is an export the model that was trained? The stock library answers, on real text.

Here: the report, what every comparison shares, and embedding models. Rerankers: verify_reranker.py; adapters:
verify_peft.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_embed.config.json_file import read_json_object
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.export.equal_llama import stock_directory, stock_library
from megatron_embed.models.families import model_shape
from megatron_embed.names import Similarity


@dataclass(frozen=True, kw_only=True)
class Report:
    """How close a library's results are to ours; `str()` is the line for the user."""

    library: str
    results: Literal["vectors", "scores"]
    count: int
    """Texts, or pairs that are scored."""
    max_difference: float
    """Largest absolute difference of one component of a vector, or of a score relative to max(1, |score|)."""
    minimum_cosine: float | None = None
    """Smallest cosine of a text's two vectors; None: no cosine is compared."""
    mean_cosine: float = 1.0

    def __str__(self) -> str:
        cosine = "" if self.minimum_cosine is None else (
            f"cosine >= {self.minimum_cosine:.6f} (mean {self.mean_cosine:.6f}), ")
        items = "texts" if self.results == "vectors" else "pairs"
        return (f"{self.library} gives the same {self.results} for {self.count} {items}: {cosine}largest difference "
                f"{self.max_difference:.1e}")


@dataclass(frozen=True, kw_only=True)
class ExpectedSettings:
    """What Sentence Transformers must say of an export once it has loaded it."""

    prompts: Mapping[str, str]
    """By role, as they stand before a text."""
    max_seq_length: int
    similarity: Similarity | Literal["maxsim"]
    dtype: str
    """Dtype of the weights: float32, bfloat16, ..."""
    matryoshka_dims: tuple[int, ...] | None = None
    """In any order; None: not compared."""


def compare_with_sentence_transformers(directory: str | Path, texts: Sequence[str], our_vectors: Tensor, *,
                                       minimum_cosine: float, prompt_name: str | None = None, dtype: str = "auto",
                                       expected: ExpectedSettings | None = None,
                                       cut: Sequence[tuple[str, Sequence[int]]] = ()) -> Report:
    """Encode `texts` with `SentenceTransformer(directory)` on the CPU and compare with our vectors.

    Args:
        directory: the export.
        texts: real texts, without prompt.
        our_vectors: [texts, embedding_dim], any float dtype, of the trained model.
        minimum_cosine: of every single text; 0.9999 in float32, 0.999 in bfloat16.
        prompt_name: the export's prompt that our vectors were computed with: "query", "document" or None.
        dtype: that the library loads the model in; auto: the directory's own.
        expected: what the library must say of the model; None: nothing is asked.
        cut: texts and the ids of their tokens, prompt, special tokens and the cut to the maximum length included.
    Raises:
        CheckpointError: the library cannot load the directory, says something else of it or cuts a text elsewhere, or a
            text's cosine is lower (NaN included), or its vector has another length.
    """
    directory = Path(directory)
    with library_errors(directory, "Sentence Transformers"):
        model = _load_sentence_transformer(directory, dtype)
        ids = [stock_ids(model, text, prompt_name) for text, _ in cut]
        encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[prompt_name]
        vectors: Tensor = encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float()
    if expected is not None:
        require_settings(directory, model, expected, in_its_dtype=dtype == "auto")
    require_stock_ids(directory, cut, ids)
    return compare_vectors(directory, stock_library(directory, "Sentence Transformers"), texts, vectors, our_vectors,
                           minimum_cosine)


def stock_ids(model: Any, text: str, role: str | None) -> list[int]:
    """Token ids of a text as the library makes them: with the role's prompt, cut, and in the chat template if any."""
    prompt = "" if role is None else (model.prompts or {}).get(role) or ""
    if int(version("sentence-transformers").partition(".")[0]) < 6:
        ids: list[int] = model.tokenizer(prompt + text, truncation=True, max_length=model.max_seq_length).input_ids
        return ids
    features = model.preprocess([text], prompt=prompt or None, task=role)
    return [int(token) for token in features["input_ids"][0]]


def require_settings(directory: Path, model: Any, expected: ExpectedSettings, *, in_its_dtype: bool) -> None:
    """Raises CheckpointError where a loaded model differs from `expected`."""
    wanted: dict[str, object] = {
        **{f"the prompt {role!r}": text for role, text in expected.prompts.items()},
        "max_seq_length": expected.max_seq_length, "similarity_fn_name": expected.similarity}
    read: dict[str, object] = {
        **{f"the prompt {role!r}": (model.prompts or {}).get(role) for role in expected.prompts},
        "max_seq_length": model.max_seq_length, "similarity_fn_name": model.similarity_fn_name}
    if expected.matryoshka_dims is not None:
        wanted["matryoshka_dimensions"] = sorted(expected.matryoshka_dims)
        read["matryoshka_dimensions"] = model[0].auto_model.config.to_dict().get("matryoshka_dimensions")
    if in_its_dtype:
        wanted["dtype"] = expected.dtype
        read["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    for key, value in wanted.items():
        if read[key] != value:
            raise CheckpointError(f"{directory}: Sentence Transformers reads {key} = {read[key]!r}, the trained model "
                                  f"has {value!r}; the export must not be used")


def compare_with_transformers(directory: Path, rows: Sequence[Sequence[int]], texts: Sequence[str],
                              our_vectors: Tensor, *, minimum_cosine: float,
                              bidirectional: bool = False) -> Report:
    """Load `directory` with Transformers' Auto class for its architecture and compare mean token vectors with ours.

    Args:
        directory: the export.
        rows: token ids of each text.
        texts: what they stand for, for messages.
        our_vectors: [texts, hidden_size], mean of the last layer's tokens, of the trained model.
        minimum_cosine: of every single text.
        bidirectional: a decoder whose tokens attend to the whole text.
    Raises:
        CheckpointError: the library cannot load the directory or misses one of its tensors, or a cosine is lower.
    """
    with library_errors(directory, "Transformers"):
        model = load_transformers(directory)
        vectors = torch.stack([mean_of_tokens(model, ids, bidirectional) for ids in rows])
    return compare_vectors(directory, stock_library(directory, "Transformers"), texts, vectors, our_vectors,
                           minimum_cosine)


def require_stock_ids(directory: Path, cut: Sequence[tuple[str, Sequence[int]]],
                      theirs_of: Sequence[Sequence[int]]) -> None:
    """Raises CheckpointError if Sentence Transformers makes other token ids of a text that is cut.

    Args:
        cut: texts at the maximum length, with the trained model's ids.
    """
    for (text, ids), theirs in zip(cut, theirs_of, strict=True):
        if list(ids) != list(theirs):
            raise CheckpointError(f"{directory}: Sentence Transformers makes {len(theirs)} tokens of {text[:40]!r}..., "
                                  f"{len(text)} characters, and the trained model {len(ids)}, or others; the export "
                                  "must not be used")


def compare_vectors(directory: str | Path, library: str, texts: Sequence[str], theirs: Tensor, ours: Tensor,
                    minimum_cosine: float, *, num_texts: int | None = None) -> Report:
    """The report on two [texts, dim] tensors, or a CheckpointError.

    `num_texts`: different texts, where some have several vectors; None: each has one.
    """
    theirs, ours = theirs.double(), ours.detach().cpu().double()
    if theirs.shape != ours.shape:
        raise CheckpointError(f"{directory}: {library} gives vectors of shape {list(theirs.shape)}, "
                              f"the trained model {list(ours.shape)}; the export must not be used")
    owner = f"{library}'" if library.endswith("s") else f"{library}'s"
    cosine = torch.nn.functional.cosine_similarity(theirs, ours, dim=1)
    worst = int(torch.nan_to_num(cosine, nan=-2.0).argmin())
    if not cosine[worst] >= minimum_cosine:
        raise CheckpointError(f"{directory}: {owner} vector of text {worst} ({texts[worst][:40]!r}) has "
                              f"cosine {cosine[worst]:.6f} to the trained model's, below {minimum_cosine}; "
                              "the export must not be used")
    # The cosine does not see lengths: vectors that were not normalized, or that were and should not be.
    lengths = theirs.norm(dim=1) / ours.norm(dim=1)
    odd = int((lengths - 1).abs().argmax())
    if not abs(lengths[odd] - 1) <= math.sqrt(2 - 2 * minimum_cosine):
        raise CheckpointError(f"{directory}: {owner} vector of text {odd} ({texts[odd][:40]!r}) is "
                              f"{lengths[odd]:.6f} times as long as the trained model's; the export must not be used")
    count = len(texts) if num_texts is None else num_texts
    return Report(library=library, results="vectors", count=count, minimum_cosine=float(cosine.min()),
                  mean_cosine=float(cosine.mean()), max_difference=float((theirs - ours).abs().max()))


def relative_errors(directory: Path, library: str, theirs: Tensor, ours: Tensor) -> Tensor:
    """Differences of two tensors of scores or unit vectors, relative to max(1, |ours|), infinite for NaN; float64."""
    theirs, ours = theirs.double(), ours.detach().cpu().double()
    if theirs.shape != ours.shape:
        raise CheckpointError(f"{directory}: {library} gives values of shape {list(theirs.shape)}, the trained model "
                              f"{list(ours.shape)}; the export must not be used")
    return torch.nan_to_num((theirs - ours).abs() / ours.abs().clamp(min=1), nan=torch.inf)


def load_transformers(directory: Path) -> Any:
    """The export in Transformers, in its own dtype; every tensor of the backbone must have come from its files."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
        AutoModelForTextEncoding,
    )

    classes = {"ForCausalLM": AutoModelForCausalLM, "ForMaskedLM": AutoModelForMaskedLM,
               "ForPreTraining": AutoModelForPreTraining, "T5EncoderModel": AutoModelForTextEncoding,
               "T5ForConditionalGeneration": AutoModelForTextEncoding,
               "ForSequenceClassification": AutoModelForSequenceClassification}
    architecture = (read_json_object(directory / "config.json").get("architectures") or [""])[0]
    auto = next((cls for end, cls in classes.items() if architecture.endswith(end)), AutoModel)
    with stock_directory(directory) as stock:
        model, info = auto.from_pretrained(str(stock), local_files_only=True, dtype="auto", output_loading_info=True)
        family = rules_for(model_shape(stock).family)
    names = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    wrong = [name for name in sorted(names)
             if not family.is_passthrough(family.full_name(name, prefixed=name.startswith(family.prefix)))]
    if wrong:
        raise CheckpointError(f"{directory}: Transformers' {auto.__name__} does not find, or does not know, {wrong[0]} "
                              f"({len(wrong)} such); the export must not be used")
    return model.eval()


def mean_of_tokens(model: Any, ids: Sequence[int], bidirectional: bool) -> Tensor:
    """[hidden_size] float32: the mean over the tokens of one text, computed alone."""
    return token_states(model, ids, bidirectional).mean(0)


def token_states(model: Any, ids: Sequence[int], bidirectional: bool) -> Tensor:
    """[tokens, hidden_size] float32 of one text, computed alone."""
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    if bidirectional:
        # A mask of four dimensions is taken as it is, zero where a token may look: no option turns off causality.
        mask = torch.zeros(1, 1, len(ids), len(ids), dtype=model.dtype)
    with torch.inference_mode():
        hidden = model.base_model(input_ids=torch.tensor([list(ids)]), attention_mask=mask).last_hidden_state
    return torch.as_tensor(hidden[0].float())


def score_of_pair(model: Any, ids: Sequence[int], token_types: Sequence[int] | None,
                  answers: tuple[int, int] | None) -> Tensor:
    """A reranker's score of one pair, computed alone, before the activation.

    Args:
        token_types: of each token; None: the model takes none.
        answers: ids of yes and no, of a causal language model; None: a classifier.
    """
    inputs = {"input_ids": torch.tensor([list(ids)])}
    if token_types is not None:
        inputs["token_type_ids"] = torch.tensor([list(token_types)])
    logits = model(**inputs).logits[0]
    return torch.as_tensor(logits[0] if answers is None else logits[-1, answers[0]] - logits[-1, answers[1]])


def weight_bytes(directory: Path) -> int:
    """Size of the safetensors files of a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def available_memory() -> int:
    """Bytes of memory that a process could take now without swapping."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _load_sentence_transformer(directory: Path, dtype: str) -> Any:
    """The export in the stock library, on the CPU."""
    from sentence_transformers import SentenceTransformer

    with stock_directory(directory) as stock:
        return SentenceTransformer(str(stock), device="cpu", local_files_only=True, model_kwargs={"dtype": dtype})


@contextmanager
def library_errors(directory: Path, library: str, base: Path | None = None) -> Iterator[None]:
    """Without Transformers' progress bars; whatever a library raises about the directory is a CheckpointError.

    `base`: the model that an adapter is loaded on.
    """
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        on_base = "" if base is None else f" on {base}"
        raise CheckpointError(f"{directory}: {library} cannot use it{on_base} ({first_line(error)}); the export must "
                              "not be used") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def load_stock_encoder(directory: Path, name: str, since: str, dtype: str) -> Any:
    """The export in a class of Sentence Transformers besides `SentenceTransformer`, on the CPU.

    Args:
        name: `SparseEncoder` or `MultiVectorEncoder`.
        since: the library's version that brought the class.
    Raises:
        CheckpointError: an older version is installed.
    """
    import sentence_transformers

    if not hasattr(sentence_transformers, name):
        raise CheckpointError(f"{directory}: such a model is read by {name} of Sentence Transformers from version "
                              f"{since} on, and an older one is installed; upgrade it, or leave out the comparison")
    return getattr(sentence_transformers, name)(str(directory), device="cpu", local_files_only=True,
                                                model_kwargs={"dtype": dtype})
