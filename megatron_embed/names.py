"""Every closed set of names that several packages share, in the spelling of configurations and exports."""

from typing import Literal

Pooling = Literal["lasttoken", "mean", "cls", "weightedmean"]
"""How token states become one vector, in the spelling that Sentence Transformers writes."""
POOLINGS: tuple[Pooling, ...] = ("lasttoken", "mean", "cls", "weightedmean")

Role = Literal["query", "document"]
"""What a text is in a search."""
HeadKind = Literal["yes_no", "score"]
"""A reranker's head: the difference of two language-model logits, or a linear layer of one output."""
Activation = Literal["sigmoid", "identity"]
"""What a reranker's score goes through."""
Similarity = Literal["cosine", "dot"]
ModelDtype = Literal["float32", "bfloat16"]

Direction = Literal["query_to_document", "query_to_query", "document_to_document", "document_to_query"]
"""What InfoNCE compares: the anchors, then the columns."""
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model",
                    "spiece.model", "tekken.json", "tiktoken.model")
"""Files of a model directory that hold its tokenizer's vocabulary, any one of them."""
MERGES_FILE = "merges.txt"
"""Belongs to vocab.json."""

Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
"""The negative documents that InfoNCE weights by their similarity."""
