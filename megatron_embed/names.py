"""Names and constants that several packages share; closed sets in the spelling of configurations and exports."""

from typing import Literal, get_args

Pooling = Literal["lasttoken", "mean", "cls", "weightedmean"]
"""How token states become one vector, in the spelling that Sentence Transformers writes."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Role = Literal["query", "document"]
"""Role of a text in retrieval."""
ROLES: tuple[Role, ...] = get_args(Role)

HeadKind = Literal["yes_no", "score"]
"""A reranker's head: the difference of two language-model logits, or a linear layer of one output."""
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

Activation = Literal["sigmoid", "identity"]
"""The function applied to a reranker's score."""
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

Similarity = Literal["cosine", "dot"]
"""How two embeddings are compared."""

ModelDtype = Literal["float32", "bfloat16"]
"""Dtype of weights and activations."""
MODEL_DTYPES: tuple[ModelDtype, ...] = get_args(ModelDtype)

MatmulLibrary = Literal["onednn", "torch"]
"""Library that multiplies float32 matrices on a CPU: oneDNN, or the one that torch chooses (MKL on x86)."""
MATMUL_LIBRARIES: tuple[MatmulLibrary, ...] = get_args(MatmulLibrary)

LayerBackend = Literal["te", "torch"]
"""Whose kernels compute norms, linear layers and activations: Transformer Engine's, or torch's."""

Fp8Passes = Literal["none", "first_pass", "both"]
"""Passes of a training step whose linear layers multiply in FP8."""

Fp8Recipe = Literal["tensorwise", "blockwise"]
"""How FP8 numbers are scaled, in Megatron's words: by one factor per tensor, or one per block of 128."""

TruncationSide = Literal["left", "right"]
"""The end at which a text that is too long loses its tokens."""

MessageFormat = Literal["flat", "structured", "auto"]
"""Content of a chat message: the text itself, or a list of one part that holds it; auto: what the template takes."""
MESSAGE_FORMATS: tuple[MessageFormat, ...] = get_args(MessageFormat)

Direction = Literal["query_to_document", "query_to_query", "document_to_document", "document_to_query"]
"""Texts that InfoNCE compares: the anchors, then the columns."""
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model",
                    "spiece.model", "tekken.json", "tiktoken.model")
"""Files of a model directory that hold its tokenizer's vocabulary, any one of them."""
MERGES_FILE = "merges.txt"
"""Belongs to vocab.json."""

Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
"""The negative documents that InfoNCE weights by their similarity."""

NegativeSampling = Literal["top", "random"]
"""How mining selects negatives from the candidates that pass its filters."""
NEGATIVE_SAMPLINGS: tuple[NegativeSampling, ...] = get_args(NegativeSampling)

MergeMethod = Literal["linear", "slerp", "multi_slerp", "task_arithmetic"]
"""How `merge` computes the weights of one model from those of several."""
MERGE_METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)

ExportFormat = Literal["hf", "sentence-transformers", "cross-encoder", "peft", "onnx", "openvino", "gguf"]
"""Formats that `convert megatron-to-hf` writes."""

EngineName = Literal["sentence-transformers", "transformers", "onnxruntime", "openvino", "vllm", "llama.cpp", "tei",
                     "sglang", "infinity"]
"""Engines that `convert --verify-with` asks for vectors or scores, the last three by the rules of their source."""

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""Types of the weights in a GGUF file: float32, float16, bfloat16, or 8 bits with a scale for every 32 weights."""
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

LOSS_TILE_ELEMENTS = 1 << 24
"""Similarities that a contrastive loss computes at once: 64 MiB of float32, whatever the number of candidates."""
