"""Sentence Transformers and Transformers as engines: on the CPU, in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.config.json_file import read_json_object
from megatron_embed.errors import CheckpointError
from megatron_embed.export.engines.base import BATCH_SIZE, Engine, PairScores
from megatron_embed.export.engines.graph import pooled
from megatron_embed.export.verify import library_errors, score_of_pair
from megatron_embed.loading.model_directory import find_model
from megatron_embed.loading.reranker import saved_settings
from megatron_embed.models.families import model_shape
from megatron_embed.models.reranker_settings import RerankerSettings
from megatron_embed.models.saved_settings import default_pooling, read_saved_settings
from megatron_embed.names import Role


class SentenceTransformers(Engine):
    """The library that the directory's layout is of."""

    name = "Sentence Transformers"

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        from sentence_transformers import SentenceTransformer

        with library_errors(directory, self.name):
            model = SentenceTransformer(str(directory), device="cpu", local_files_only=True,
                                        model_kwargs={"dtype": "float32"})
            encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[role]
            plain = {"prompt": ""} if role is None else {}  # without it, a default prompt would be put there
            return torch.as_tensor(encode(list(texts), batch_size=BATCH_SIZE, show_progress_bar=False,
                                          convert_to_tensor=True, **plain)).float()

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        from sentence_transformers import CrossEncoder

        with library_errors(directory, self.name):
            model = CrossEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
            final, raw = (torch.as_tensor(model.predict(list(pairs), batch_size=BATCH_SIZE, show_progress_bar=False,
                                                        convert_to_tensor=True, **activation)).float()
                          for activation in ({}, {"activation_fn": torch.nn.Identity()}))
        return PairScores(raw=raw, final=final)


class Transformers(Engine):
    """The Auto classes alone; pooling and normalization, which they do not have, as the directory's modules say."""

    name = "Transformers"

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

        saved = read_saved_settings(directory)
        if saved.chat is not None:
            raise CheckpointError(f"{directory}: its texts go through a chat template, which Transformers' tokenizer "
                                  "does not apply by itself; use sentence-transformers")
        shape = model_shape(directory)
        pooling = saved.pooling or default_pooling(shape)
        auto: Any = AutoModel if shape.relative_positions is None else AutoModelForTextEncoding  # T5: the encoder
        prompt = "" if role is None else saved.prompts.get(role, "")
        rows = []
        with library_errors(directory, self.name), torch.inference_mode():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = auto.from_pretrained(directory, local_files_only=True, dtype="float32").eval()
            for start in range(0, len(texts), BATCH_SIZE):
                batch = [prompt + text for text in texts[start : start + BATCH_SIZE]]
                features = tokenizer([text.lower() for text in batch] if saved.lower_case else batch, padding=True,
                                     truncation=True, max_length=saved.max_length, return_tensors="pt")
                rows.append(pooled(model(**features).last_hidden_state, features["attention_mask"], pooling))
        vectors = torch.cat(rows).float()
        return functional.normalize(vectors, dim=1) if saved.normalize is not False else vectors

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        settings = saved_settings(find_model(str(directory)))
        classifier = settings.head == "score"
        auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        with library_errors(directory, self.name), torch.inference_mode():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = auto.from_pretrained(directory, local_files_only=True, dtype="float32").eval()
            answers = None if classifier else _answers(directory)
            rows = [_pair_features(settings, tokenizer, *pair) for pair in pairs]
            scores = [score_of_pair(model, row["input_ids"], row.get("token_type_ids"), answers) for row in rows]
        return PairScores(raw=torch.stack(scores).float(), final=None)


def _pair_features(settings: RerankerSettings, tokenizer: Any, query: str, document: str) -> Any:
    """Token ids of a pair: in the tokenizer's template for pairs, if it has one, else as a pair of texts."""
    if settings.template is None:
        return tokenizer(settings.prompt + query, document, truncation="longest_first", max_length=settings.max_length)
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)


def _answers(directory: Path) -> tuple[int, int]:
    """Ids of yes and no, as CrossEncoder's LogitScore has them."""
    values = read_json_object(directory / "1_LogitScore" / "config.json")
    return int(values["true_token_id"]), int(values["false_token_id"])
