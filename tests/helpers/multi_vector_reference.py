"""Multi-vector models as Sentence Transformers' own modules write them, and MaxSim of one process by autograd.

The tokens that give vectors, and the queries' expansion, are decided here from the ids of the plain tokenizer; nothing
of the trainer's is used. The largest and the second dot product of every maximum must be apart, or rounding could
choose another one.
"""

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from transformers import AutoTokenizer

LEAST_GAP = 1e-6
"""Between the largest and the second dot product of a maximum; float32 rounds those of unit vectors by less."""


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """Which tokens of a reference model give vectors."""

    skiplist: tuple[str, ...] = tuple(string.punctuation)
    expansion: dict[str, Any] | None = None
    bias: bool = False
    dim: int = 12
    seed: int = 53


FORMATS = {
    "plain": TokenFormat(skiplist=()),
    "colbert": TokenFormat(expansion={"strategy": "min", "attend": False, "token": None, "length": 14}),
    "attended": TokenFormat(expansion={"strategy": "min", "attend": True, "token": None, "length": 12}, bias=True)}
"""By name: every token's vector; ColBERT's, with mask tokens that attention does not see; mask tokens that it does."""


def add_token_modules(path: Path, name: str, hidden: int = 32) -> Path:
    """Write the modules of a MultiVectorEncoder, with random weights, into a directory; the directory."""
    chosen = FORMATS[name]
    torch.manual_seed(chosen.seed)
    dense = Dense(hidden, chosen.dim, bias=chosen.bias, activation_function=torch.nn.Identity(),
                  module_input_name="token_embeddings")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn_like(parameter) * (1.5 * hidden**-0.5))
    modules = [("1_Dense", dense), ("2_MultiVectorMask", MultiVectorMask(skiplist_words=list(chosen.skiplist))),
               ("3_Normalize", Normalize(module_input_name="token_embeddings"))]
    entries = [("", "sentence_transformers.base.modules.transformer.Transformer"),
               *((folder, f"{type(module).__module__}.{type(module).__qualname__}") for folder, module in modules)]
    (path / "modules.json").write_text(json.dumps([
        {"idx": index, "name": str(index), "path": folder, "type": kind}
        for index, (folder, kind) in enumerate(entries)]), encoding="utf-8")
    for folder, module in modules:
        (path / folder).mkdir(exist_ok=True)
        module.save(str(path / folder))
    (path / "sentence_bert_config.json").write_text(json.dumps({
        "max_seq_length": 128, "query_expansion": chosen.expansion}), encoding="utf-8")
    (path / "config_sentence_transformers.json").write_text(json.dumps({
        "model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim",
        "prompts": {"query": "", "document": ""}}), encoding="utf-8")
    return path


def load_projection(path: Path) -> list[tuple[str, Any]]:
    """The directory's Dense module in float64, as `save_gradients_of` takes it."""
    return [("1_Dense", Dense.load(str(path), subfolder="1_Dense").double())]


class TokenReference:
    """Vectors of texts and their MaxSim, in float64, one text at a time."""

    def __init__(self, path: Path, name: str, forward: Callable[..., torch.Tensor], projection: Any) -> None:
        """`forward`: (token ids [1, tokens], attention mask [1, tokens]) -> [tokens, hidden]."""
        self._format, self._forward, self._projection = FORMATS[name], forward, projection
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._skipped = {self._tokenizer.convert_tokens_to_ids(word) for word in self._format.skiplist}
        self.smallest_gap = float("inf")

    def vectors(self, ids: Sequence[int], *, is_query: bool) -> torch.Tensor:
        """[vectors, dim] of a text, given the ids of its own tokens."""
        tokens, mask, expansion = list(ids), [1] * len(ids), self._format.expansion
        kept = [is_query or token not in self._skipped for token in tokens]
        if is_query and expansion is not None:
            missing = max(0, expansion["length"] - len(tokens))
            if expansion["strategy"] == "fixed":
                assert len(tokens) <= expansion["length"], "a query that is cut"
            tokens += [self._tokenizer.mask_token_id] * missing
            mask += [int(expansion["attend"])] * missing
            kept += [True] * missing
        states = self._forward(torch.tensor([tokens]), torch.tensor([mask]))
        features = self._projection({"token_embeddings": states})
        return torch.nn.functional.normalize(features["token_embeddings"], dim=1)[torch.tensor(kept)]

    def maxsim(self, query: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        """Scalar."""
        products = query @ document.T
        if products.shape[1] > 1:
            best = products.detach().topk(2, dim=1).values
            self.smallest_gap = min(self.smallest_gap, float((best[:, 0] - best[:, 1]).min()))
        return products.max(dim=1).values.sum()

    def scores(self, queries: Sequence[torch.Tensor], documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """[queries, documents]."""
        rows = [torch.stack([self.maxsim(query, document) for document in documents]) for query in queries]
        assert self.smallest_gap > LEAST_GAP, f"maxima {self.smallest_gap} apart: choose another case"
        return torch.stack(rows)
