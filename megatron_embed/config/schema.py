"""RunConfig and the sections of its settings: type, unit, range and default. The sections data, evaluation, checkpoint,
model, objective, optimizer and logging are in the files of these names beside this one (logging: run_logs); no
default stands anywhere else."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_embed.config.data import DataConfig
from megatron_embed.config.data import TrainFile as TrainFile
from megatron_embed.config.evaluation import CheckpointConfig, EvaluationConfig
from megatron_embed.config.model import ModelConfig
from megatron_embed.config.objective import EMBEDDING_LOSSES, RERANK_LOSSES, ObjectiveConfig
from megatron_embed.config.optimizer import OptimizerConfig
from megatron_embed.config.require import require
from megatron_embed.config.run_checks import (
    check_dims_and_precisions,
    check_evaluated,
    check_first_pass,
    check_head,
    check_kept_activations,
    check_other_models,
    check_quantization,
    check_repeated_texts,
    check_reranker_run,
    check_transformer_engine,
)
from megatron_embed.config.run_logs import LoggingConfig as LoggingConfig
from megatron_embed.config.workload import WORKLOADS, Workload
from megatron_embed.names import Activation, ContextMethod, EmbeddingHead, HeadKind, Pooling, Precision

MOST_TIMEOUT_SECONDS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    head: EmbeddingHead | None = None
    """dense: one vector for a text. multi_vector: a vector for every token of it, compared by MaxSim, the sum over the
    query's vectors of each one's largest dot product with a vector of the document (late interaction, ColBERT).
    sparse: a weight for every token of the vocabulary (SPLADE). joint: one vector for a text, and for each of its
    tokens a weight and a vector, compared by each of the three and by their sum (BGE-M3). null: as the model directory
    says, otherwise dense; a directory with BGE-M3's heads is dense unless joint is set."""
    pooling: Pooling | None = None
    """null: the setting in the model directory's Sentence Transformers files, otherwise mean for an encoder and
    lasttoken for a decoder."""
    normalize: bool | None = None
    """Scale embeddings to unit length, in float32. False: the objective takes plain dot products. null: true, unless
    the model directory compares vectors by dot product and does not scale them."""
    embedding_dim: int | None = None
    """Dimensions of an embedding, by a new linear layer without bias over the pooled vector, or over every token's,
    trained with the model and exported as Sentence Transformers' module Dense. null: the model's own Dense modules, if
    any, otherwise the width of the pooled vector, or 128 of a multi-vector model. Of a joint model: dimensions of the
    tokens' vectors; null: as the directory's own, otherwise the width of the pooled vector, as in BGE-M3."""
    skiplist_words: tuple[str, ...] | None = None
    """Tokens of documents, by their text in the vocabulary, that give no vector in a multi-vector model. null: the
    model's own, otherwise ASCII punctuation, as in ColBERT; []: none."""
    query_expansion: int | None = None
    """Tokens that every query of a multi-vector model is brought to by mask tokens, whose vectors count too (ColBERT:
    32); longer queries are cut. null: the model's own, otherwise 0; 0: off."""
    attend_to_expansion: bool | None = None
    """Whether attention sees those mask tokens. False, as in ColBERT: they attend to the query, and nothing to them.
    null: the model's own, otherwise false."""
    matryoshka_dims: tuple[int, ...] = ()
    """Dimensions that the loss is also taken at, largest first: embeddings are truncated to each and, with `normalize`,
    scaled to unit length again. Empty: the full dimension only."""
    precision: tuple[Precision, ...] = ("float32",)
    """Precisions that the loss is taken at, and evaluation sets are searched at; at every one of matryoshka_dims. int8:
    documents are rounded to 256 values of each component. binary: queries and documents to signs, 32 times smaller than
    float32. rescore: documents to signs, and queries as they are. Gradients pass straight through. With objective.loss
    info_nce or sigmoid."""
    instruction: str | None = None
    """Replaces `{instruction}` in the query prompt for rows, files and evaluation sets without an instruction of their
    own; checkpoints and exports contain the prompt with it filled in. null: all of them must have their own."""

    @property
    def unit_length(self) -> bool:
        """`normalize`; True if it is None."""
        return self.normalize is not False

    @property
    def hides_expansion(self) -> bool:
        """Whether queries get mask tokens that attention does not see."""
        return self.head == "multi_vector" and bool(self.query_expansion) and not self.attend_to_expansion

    def __post_init__(self) -> None:
        dims, width = self.matryoshka_dims, self.embedding_dim
        length = self.query_expansion
        require(length is None or length >= 0, "embedding.query_expansion", length, "must be >= 0 tokens, or null")
        require(width is None or 1 <= width <= 2**20, "embedding.embedding_dim", width,
                "must be >= 1 and <= 1048576, or null")
        require(all(dim >= 1 for dim in dims) and list(dims) == sorted(set(dims), reverse=True),
                "embedding.matryoshka_dims", list(dims), "must be different dimensions >= 1, largest first")


@dataclass(frozen=True, kw_only=True)
class RerankerConfig:
    head: HeadKind | None = None
    """yes_no: difference of the logits of two words at the last token. score: a linear layer with one output; encoders,
    which have no other head, have a dense layer with tanh before it. null: the head of the model directory if it is a
    reranker, otherwise yes_no for decoders and score for encoders."""
    template: str | None = None
    """Prompt around a pair, with the placeholders {query}, {document} and optionally {instruction}, and every special
    token written out. null: the model's own setting (a cross-encoder's chat template; without one, query and document
    are a pair of texts), otherwise Qwen3-Reranker's; encoders take no template."""
    instruction: str | None = None
    """Instruction of rows and files without one of their own; null: the model's own setting, otherwise
    Qwen3-Reranker's."""
    true_token: str | None = None
    """Word for a relevant document in yes_no: a single token of the tokenizer, including a space before it if there is
    to be one; null: the model's own setting, otherwise yes."""
    false_token: str | None = None
    """Word for a document that is not relevant in yes_no; null: the model's own setting, otherwise no."""
    max_length: int | None = None
    """Maximum number of tokens of a pair, including prompt and special tokens. In a template a longer pair loses the
    end of its document, never query, instruction or the text after the document; in a pair of texts the longer one is
    truncated, as in CrossEncoder. null: data.query_max_length + data.document_max_length if either is set, otherwise a
    reranker's own setting, otherwise that sum; at most the model's positions."""
    temperature: float = 1.0
    """Divides the scores in listwise and kl_distillation; no unit, > 0."""
    margin: float = 1.0
    """Margin of margin_ranking, in units of the score; >= 0."""
    activation: Activation | None = None
    """Activation that exports and scores apply to the head's output; losses and rankings take the output itself. null:
    the model's own setting, otherwise sigmoid."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "reranker.temperature", self.temperature, "must be > 0")
        require(self.margin >= 0, "reranker.margin", self.margin, "must be >= 0")
        require(self.template != "", "reranker.template", self.template, "must be a prompt or null")
        require(self.max_length is None or self.max_length >= 8, "reranker.max_length", self.max_length,
                "must be >= 8 tokens or null")
        for key, word in (("true_token", self.true_token), ("false_token", self.false_token)):
            require(word != "", f"reranker.{key}", word, "must be a word of one token, or null")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's matrices. Ranks beyond this size times the pipeline and context sizes are
    data-parallel."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are divided into, one per rank."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule); null or 1: off."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of every text."""
    cp_comm_type: ContextMethod = "all_gather"
    """How context-parallel ranks attend to each other's tokens, in Megatron's words. all_gather: each gathers all keys
    and values, and computes its own queries. a2a (Ulysses): each exchanges its tokens for its share of the heads of all
    tokens; context_parallel_size then divides the key/value heads of a tensor-parallel rank."""
    expert_model_parallel_size: int = 1
    """Ranks, among the data-, context- and tensor-parallel ones, that share the experts of a mixture of experts."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share every expert's matrices."""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """auto: on exactly when tensor_model_parallel_size > 1."""
    tp_comm_overlap: bool = False
    """Overlap the communication of tensor parallelism with matrix products in the pass with gradients, by Transformer
    Engine's userbuffers: within a node, with sequence parallelism and training.micro_batch_tokens, to which every
    micro-batch is padded."""
    timeout_seconds: int = 600
    """Maximum wait of one collective before the run stops with an error, > 0, at most 1000000 (eleven days)."""

    def __post_init__(self) -> None:
        for key in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
            value = getattr(self, f"{key}_parallel_size")
            require(value >= 1, f"parallel.{key}_parallel_size", value, "must be >= 1")
        virtual = self.virtual_pipeline_model_parallel_size
        require(virtual is None or virtual >= 1, "parallel.virtual_pipeline_model_parallel_size", virtual,
                 "must be >= 1 or null")
        # The libraries below count milliseconds, some in 32 bits.
        require(0 < self.timeout_seconds <= MOST_TIMEOUT_SECONDS, "parallel.timeout_seconds", self.timeout_seconds,
                f"must be > 0 and <= {MOST_TIMEOUT_SECONDS}, which is eleven days")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    global_batch_size: int = 1024
    """Queries per optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Queries per data-parallel rank per micro-batch. Not used if micro_batch_tokens is set."""
    micro_batch_tokens: int | None = None
    """Token budget of a micro-batch, padding included; null: micro_batch_size queries with their documents, of any
    length. If set, a rank's queries and documents are packed into bins of at most this many tokens, in any order (a
    query together with its documents if objective.negatives is micro_batch). Ranks with fewer bins than the busiest
    split their largest ones. A bin is padded to the next eighth of the budget, so that shapes repeat; in a pipeline,
    all to that of the largest. `plan` advises a value."""
    first_pass_micro_batches: int | Literal["auto"] = "auto"
    """Micro-batches that the first pass of a step, which keeps no activations, embeds as one, >= 1; for losses over the
    global batch, without dropout. auto: on GPUs up to 4, as memory and pipeline allow, and 1 with dropout; on CPUs
    1."""
    keep_activations: int | Literal["auto"] = "auto"
    """Micro-batches of a step, its first ones, whose activations the second pass takes from the first pass instead of
    computing them again; same result, more memory. auto: as many as free memory holds by the estimate of `plan`, logged
    at the start; none in a pipeline. 0: none. Another number is kept whether it fits or not; for losses over the
    global batch, without a pipeline."""
    encode_repeated_texts: Literal["auto", "once", "each"] = "auto"
    """How often a text is encoded that several queries, or several documents, of a data-parallel rank have in a step.
    once: its rows share one vector; the same gradient in less time. each: as often as it comes. auto: once where that
    changes nothing but rounding, so not with dropout, for losses within micro-batches, or in a mixture of experts with
    a load-balancing loss, which counts every token. once is refused with the first two."""
    train_steps: int | None = None
    """Optimizer steps; null: from `epochs`, or 1000 if that is null too."""
    epochs: float | None = None
    """Passes over the training rows, > 0, at most 1000000; not together with train_steps."""
    learning_rate: float = 1.0e-5
    """Peak learning rate, after the warmup; > 0."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay; >= 0."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    warmup_ratio: float = 0.0
    """Warmup as a share of all steps, rounded up, in [0, 1); not together with warmup_steps."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "wsd"] = "cosine"
    """Schedule after the warmup, down to min_learning_rate at the last step (inverse-square-root: at least that). wsd:
    constant, then linear over the last `wsd_decay_ratio` of the steps (Hu et al. 2024, arXiv:2404.06395)."""
    wsd_decay_ratio: float = 0.1
    """Share of all steps for the decay of wsd, rounded up, in (0, 1]."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW); not applied to biases and norms."""
    clip_grad: float = 1.0
    """Maximum norm of the whole model's gradient; 0 is off."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients, in [0, 1)."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients, in [0, 1)."""
    adam_eps: float = 1.0e-8
    """Added to the root of AdamW's mean of squared gradients, > 0."""
    hidden_dropout: float = 0.0
    """Dropout of the outputs of attention and MLP, and of embeddings if the family has it, in [0, 1)."""
    attention_dropout: float = 0.0
    """Dropout of attention weights, in [0, 1)."""
    moe_aux_loss_coefficient: float = 1.0e-3
    """Weight of the load-balancing loss of a mixture of experts, per micro-batch; 0 is off."""
    exit_duration_minutes: float | None = None
    """Minutes from its start after which a run saves and ends with exit code 75, to be started again; null: no limit.
    Set it to a batch system's time limit minus the time of a step and a checkpoint."""
    max_skipped_steps: int = 10
    """Number of consecutive steps without a finite loss and gradient that are skipped and counted, leaving the
    parameters unchanged; one more ends the run. 0: the first one does."""
    query_side_only: bool = False
    """True: only queries pass through the model in training, and their documents keep the vectors that model.path (or
    objective.compatible_with) gives them. The trained model is for queries alone, and the index stays as it is."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, selective (core attention), full (every layer)."""
    seed: int = 1234
    """Seed for row order, dropout and newly initialized parameters; 0 to 2^62."""
    deterministic: bool = False
    """On GPUs, use only kernels and sums that repeat bit for bit, which are slower: a run that is stopped and resumed
    in the same layout then equals one that is not, as on CPU ranks without it. On CPUs, measure no `model.cpu_matmul`,
    so that two new runs are equal too."""

    def warmup(self, train_steps: int) -> int:
        """Warmup steps of a run of `train_steps`."""
        return self.warmup_steps or math.ceil(round(self.warmup_ratio * train_steps, 6))

    def final_decay(self, train_steps: int) -> int:
        """Steps of the decay at the end of a run of `train_steps`; 0 without a stable phase before it."""
        return math.ceil(round(self.wsd_decay_ratio * train_steps, 6)) if self.lr_decay_style == "wsd" else 0

    def __post_init__(self) -> None:
        for key in ("global_batch_size", "micro_batch_size"):
            require(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "must be >= 1")
        for key in ("min_learning_rate", "warmup_steps", "weight_decay", "clip_grad", "moe_aux_loss_coefficient",
                    "max_skipped_steps", "seed"):
            require(getattr(self, key) >= 0, f"training.{key}", getattr(self, key), "must be >= 0")
        require(0 <= self.warmup_ratio < 1, "training.warmup_ratio", self.warmup_ratio, "must be in [0, 1)")
        require(not (self.warmup_ratio and self.warmup_steps), "training.warmup_ratio", self.warmup_ratio,
                f"training.warmup_steps = {self.warmup_steps} is set too; keep one of them")
        require(0 < self.wsd_decay_ratio <= 1, "training.wsd_decay_ratio", self.wsd_decay_ratio, "must be in (0, 1]")
        require(self.wsd_decay_ratio == 0.1 or self.lr_decay_style == "wsd", "training.wsd_decay_ratio",
                self.wsd_decay_ratio, "has no effect without lr_decay_style: wsd; set that, or remove it")
        require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "must be > 0")
        require(self.min_learning_rate <= self.learning_rate, "training.min_learning_rate", self.min_learning_rate,
                 f"must be <= learning_rate = {self.learning_rate}")
        for key in ("adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout"):
            require(0 <= getattr(self, key) < 1, f"training.{key}", getattr(self, key), "must be in [0, 1)")
        require(self.adam_eps > 0, "training.adam_eps", self.adam_eps, "must be > 0")
        require(self.micro_batch_tokens is None or self.micro_batch_tokens >= 1, "training.micro_batch_tokens",
                 self.micro_batch_tokens, "must be >= 1 or null")
        merged = self.first_pass_micro_batches
        require(merged == "auto" or merged >= 1, "training.first_pass_micro_batches", merged, "must be >= 1 or auto")
        kept = self.keep_activations
        require(kept == "auto" or kept >= 0, "training.keep_activations", kept, "must be >= 0 or auto")
        require(self.train_steps is None or self.train_steps >= 1, "training.train_steps", self.train_steps,
                 "must be >= 1 or null")
        require(self.exit_duration_minutes is None or self.exit_duration_minutes > 0, "training.exit_duration_minutes",
                self.exit_duration_minutes, "must be > 0 or null")
        require(self.epochs is None or 0 < self.epochs <= 1_000_000, "training.epochs", self.epochs,
                "must be > 0 and <= 1000000, or null")
        # Generators take 64 bits, and offsets for ranks and tensors are added.
        require(self.seed <= 2**62, "training.seed", self.seed, f"must be <= {2**62}")
        require(self.train_steps is None or self.epochs is None, "training.epochs", self.epochs,
                 f"training.train_steps = {self.train_steps} is set too; keep one of them")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on linear layers; all other weights are frozen."""

    rank: int = 0
    """Rank of every adapter. 0: no adapters, or those that model.path contains (a PEFT directory, or a checkpoint of
    such a run)."""
    alpha: float = 32.0
    """An adapter's output is scaled by alpha / rank, > 0."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = 0.0
    """Dropout of the adapters' inputs, in [0, 1)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers that get adapters, by their Hugging Face names or the ends of them, as in PEFT: q_proj,
    attention.self.query, ...; all-linear: every one inside the layers."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "must be >= 0")
        require(self.alpha > 0, "lora.alpha", self.alpha, "must be > 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be in [0, 1)")
        require(bool(self.target_modules), "lora.target_modules", list(self.target_modules),
                 "must name a linear layer, or all-linear")
        for key, value, default in (("alpha", self.alpha, 32.0), ("use_rslora", self.use_rslora, False),
                                    ("target_modules", self.target_modules, ("all-linear",))):
            require(self.rank > 0 or value == default, f"lora.{key}", value,
                     "does nothing while lora.rank is 0; set the rank, or remove this")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `model.path` is the only required setting."""

    task: Literal["embedding", "reranker"] = "embedding"
    model: ModelConfig
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    reranker: RerankerConfig = field(default_factory=RerankerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint stays beside the newest.

        With held-out rows alone only if a setting asks for it: their loss falls at nearly every evaluation, and each
        improvement is a save.
        """
        evaluation = self.evaluation
        asked = (evaluation.best_metric is not None or evaluation.patience is not None
                 or self.checkpoint.export == "best")
        return evaluation.names_sets or (self.data.validates and asked)

    @property
    def log_directory(self) -> str | None:
        """The directory of metrics."""
        return self.logging.directory or self.checkpoint.directory

    @property
    def has_dropout(self) -> bool:
        """Whether anything in the model draws random numbers in a step."""
        return self.training.hidden_dropout > 0 or self.training.attention_dropout > 0 or self.lora.dropout > 0

    @property
    def workload(self) -> Workload:
        """The task's requirements on the run's sizes."""
        return WORKLOADS[self.task](self)

    def __post_init__(self) -> None:
        losses = {"embedding": EMBEDDING_LOSSES, "reranker": RERANK_LOSSES}[self.task]
        require(self.objective.loss in losses, "objective.loss", self.objective.loss,
                f"is not a loss of task: {self.task}; choose one of {', '.join(losses)}")
        if self.task == "reranker":
            check_reranker_run(self)
        has_head = self.workload.has_head or self.embedding.head == "sparse"
        self.optimizer.check_against(has_head=has_head, dtype=self.model.dtype, lora_rank=self.lora.rank)
        require(self.data.document_sampling is None or self.objective.rows != "pairs", "data.document_sampling",
                self.data.document_sampling, f"has no effect with pairs, which objective.loss = {self.objective.loss} "
                "takes; remove it")
        check_evaluated(self)
        check_first_pass(self)
        check_transformer_engine(self)
        check_kept_activations(self)
        check_repeated_texts(self)
        check_quantization(self)
        check_head(self)
        check_dims_and_precisions(self)
        check_other_models(self)
        if self.task == "embedding":
            self.objective.check_against(num_positives=self.data.num_positives, num_negatives=self.data.num_negatives,
                                         in_batch=self.data.all_in_batch)
