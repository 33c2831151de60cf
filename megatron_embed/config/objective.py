"""Section `objective`: the settings of the loss, and which of them each loss takes."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_embed.config.require import require
from megatron_embed.names import JOINT_SCORES, Direction, Hardness, Regularizer, TeacherDistance

Loss = Literal["info_nce", "sigmoid", "cosine_similarity", "contrastive", "online_contrastive", "cosent", "angle",
               "triplet", "margin_mse", "kl_distillation", "embedding_distillation", "pointwise", "listwise",
               "margin_ranking", "ranknet", "lambda_loss"]

CONTRASTIVE = ("info_nce", "sigmoid")
"""Losses of queries against all documents."""
LABELLED_PAIRS = ("cosine_similarity", "contrastive", "online_contrastive", "cosent", "angle")
"""Losses of pairs with a score."""
DISTILLED_VECTORS = "embedding_distillation"
"""The loss whose target are a teacher's vectors."""
WITH_HARD_NEGATIVES = ("triplet", "margin_mse", "kl_distillation")
"""Losses of a query with its own positive and hard negatives."""
MULTI_VECTOR_LOSSES = ("info_nce", "margin_mse", "kl_distillation")
"""Those that take MaxSim as similarity, or dot products of sparse vectors."""
REGULARIZERS = ("query_regularizer", "query_regularizer_weight", "document_regularizer", "document_regularizer_weight",
                "regularizer_warmup_steps", "regularizer_schedule")
"""Settings of the terms that keep the vectors of a sparse model sparse."""
OF_JOINT = ("score_weights", "score_loss_weights", "self_distillation")
"""Settings of the loss of a joint model."""
SCORE_WEIGHTS = (1.0, 0.3, 1.0)
"""Weights of a joint model's scores in their sum, those of BGE-M3."""
QUERY_REGULARIZER_WEIGHT, DOCUMENT_REGULARIZER_WEIGHT = 5e-5, 3e-5
"""Those of Sentence Transformers' examples."""
EMBEDDING_LOSSES = (*CONTRASTIVE, *LABELLED_PAIRS, *WITH_HARD_NEGATIVES, DISTILLED_VECTORS)
"""Values of `objective.loss` for `task: embedding`."""
RERANK_LOSSES = ("pointwise", "listwise", "margin_ranking", "ranknet", "lambda_loss", "kl_distillation")
"""Values of `objective.loss` for `task: reranker`, over the documents of each query."""
SMALLEST_LEARNED = 0.01
"""Lower bound of the learned temperature of info_nce, as in CLIP, whose logits are at most 100 similarities."""
_TAKEN_BY = {
    "temperature": ("info_nce", "sigmoid", "cosent", "angle", "kl_distillation"),
    "negatives": CONTRASTIVE, "hard_negatives": CONTRASTIVE, "mask_duplicates": CONTRASTIVE,
    "mask_margin": CONTRASTIVE, "mask_margin_type": CONTRASTIVE, "directions": ("info_nce",),
    "partition": ("info_nce",), "hardness": ("info_nce",), "hardness_strength": ("info_nce",), "bias": ("sigmoid",),
    "learnable_temperature": CONTRASTIVE, "temperature_learning_rate": CONTRASTIVE,
    "margin": ("contrastive", "online_contrastive", "triplet"), "teacher_temperature": ("kl_distillation",),
    "compatible_with": CONTRASTIVE, "compatible_weight": CONTRASTIVE, "compatible_texts": CONTRASTIVE,
    "guide_model": CONTRASTIVE, "teacher_model": (DISTILLED_VECTORS,), "teacher_distance": (DISTILLED_VECTORS,),
    "teacher_projection": (DISTILLED_VECTORS,)}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    loss: Loss = "info_nce"
    """Loss function; formulas, papers and when to use which: docs/objectives.md."""
    temperature: float = 0.02
    """Divides the similarity; no unit, > 0. Larger is softer."""
    learnable_temperature: bool = False
    """True: train log(1 / temperature), and the bias of the sigmoid loss, starting from the values given here; the
    temperature of info_nce stays >= 0.01, as in CLIP. Checkpoints contain them, exported models do not."""
    temperature_learning_rate: float | None = None
    """Learning rate of what learnable_temperature trains, about its change per step, > 0; null: training.learning_rate.
    It follows the same schedule."""
    negatives: Literal["global_batch", "micro_batch"] = "global_batch"
    """global_batch: every document of the optimizer step, in any parallel layout (two passes if a step has several
    micro-batches). micro_batch: the documents of one micro-batch over the data-parallel ranks (one pass)."""
    hard_negatives: Literal["shared", "private"] = "shared"
    """shared: a query's hard negatives are negatives of all queries. private: of that query only."""
    directions: tuple[Direction, ...] = ("query_to_document",)
    """Similarities in the softmax: query to documents, and optionally query to other queries (query_to_query), its
    positive to other queries' documents (document_to_document), and its positive to all queries (document_to_query)."""
    partition: Literal["joint", "per_direction"] = "joint"
    """joint: one softmax over all directions. per_direction: one softmax each for query_to_document and
    document_to_query, and the mean of their losses."""
    mask_duplicates: bool = False
    """True: a document is not a negative of a query if any row with the same query text has the same document text as a
    positive, anywhere in the global batch (with negatives: micro_batch, in the micro-batches that are computed
    together). The same applies to queries that share a positive, in the directions to queries."""
    mask_margin: float | None = None
    """Candidates that are more similar than the positive by more than this are not negatives; null: off, or 0 with a
    guide_model. Qwen3-Embedding: 0.1. Negative values also exclude candidates that are slightly less similar."""
    mask_margin_type: Literal["absolute", "relative"] = "absolute"
    """absolute: similarity > positive + mask_margin. relative: similarity > positive + mask_margin * |positive|."""
    guide_model: str | None = None
    """Model directory whose vectors' similarities decide what mask_margin excludes, in place of those of the model in
    training (GISTEmbed, Solatorio 2024, arXiv:2402.16829). It embeds the rows' texts once, before the first step.
    null: none."""
    hardness: Hardness | None = None
    """Negatives that are weighted by their similarity: hardness_strength * similarity, without gradient, is added to
    their logits. in_batch_negatives: documents of other queries. hard_negatives: a query's own. null: none."""
    hardness_strength: float = 0.0
    """Factor of the similarity for `hardness`; no unit, >= 0; 9 in Lan et al. 2025 (in-batch negatives), 5 in
    EmbeddingGemma (hard negatives)."""
    bias: float = -10.0
    """Bias of the sigmoid loss, added to similarity / temperature; no unit. About -log(documents per query's batch)."""
    margin: float | None = None
    """contrastive, online_contrastive: cosine distance that negatives should have (null: 0.5). triplet: how much
    farther the negative should be than the positive, Euclidean (null: 5; unit vectors are at most 2 apart)."""
    teacher_temperature: float | None = None
    """Divides the teacher's scores in kl_distillation, > 0; null: same as temperature."""
    query_regularizer: Regularizer = "flops"
    """What is added to the loss of a sparse model for its queries. flops: the sum over the vocabulary of the squared
    mean weight over the global batch's queries (Paria et al. 2020, arXiv:2004.05665). l1: the mean over these queries
    of the sum of their weights."""
    query_regularizer_weight: float | None = None
    """Factor of that term, >= 0; null: 5e-5 of a sparse model. 0: none."""
    document_regularizer: Regularizer = "flops"
    """The same for documents, hard negatives included."""
    document_regularizer_weight: float | None = None
    """Factor of that term, >= 0; null: 3e-5 of a sparse model. 0: none."""
    regularizer_warmup_steps: int = 0
    """Optimizer steps over which both factors rise from 0, >= 0; a third of all steps in Sentence Transformers."""
    regularizer_schedule: Literal["quadratic", "linear"] = "quadratic"
    """How they rise: with the square of the share of these steps, or with the share."""
    score_weights: tuple[float, ...] = SCORE_WEIGHTS
    """Weights of a joint model's dense, sparse and multi-vector score in their sum, >= 0, the sum by which `evaluate`
    ranks too; the default is BGE-M3's."""
    score_loss_weights: tuple[float, ...] = (1.0, 0.1, 1.0)
    """Weights of the losses of these scores, >= 0, beside that of their sum, which has 1; the default is BGE-M3's."""
    self_distillation: bool = True
    """Whether each score of a joint model also learns from the softmax of their sum (Chen et al. 2024,
    arXiv:2402.03216)."""
    matryoshka_weights: tuple[float, ...] = ()
    """Weights of the loss at each of embedding.matryoshka_dims, in their order; empty: 1 each."""
    precision_weights: tuple[float, ...] = ()
    """Weights of the loss at each of embedding.precision, in their order, times that of the dimension; empty: 1
    each."""
    teacher_model: str | None = None
    """Model directory whose vectors embedding_distillation brings the model's vectors close to. It embeds the rows'
    texts once, before the first step."""
    teacher_distance: TeacherDistance = "cosine"
    """Distance of a text's vector to the teacher's in embedding_distillation. cosine: 1 - cosine. mse: mean over the
    components of the squared difference. l2: Euclidean."""
    teacher_projection: bool = False
    """True: a linear layer with bias, from the model's vectors to the teacher's width, is trained with the model and
    stands between the two; exports do not contain it."""
    compatible_with: str | None = None
    """Model directory or vectors of the index that is to be kept: the loss of the queries against these documents'
    vectors, which stay as they are, is added to that against the documents as the model in training embeds them
    (backward-compatible training, Shen et al. 2020, arXiv:2003.11942). A model embeds the rows' documents once, before
    the first step; vectors are a directory or .npy file that `encode` has written. Both have the model's width. null:
    off."""
    compatible_weight: float = 1.0
    """Weight of that loss, > 0."""
    compatible_texts: str | None = None
    """File of texts that the vectors of compatible_with are of, in its order. null: the one that their vectors.json
    names."""
    vector_cache: str | None = None
    """Directory of the vectors that other models give the rows' texts, which later runs with the same texts and weights
    read; all ranks must see it. null: megatron_embed/vectors in the user's cache directory (XDG_CACHE_HOME,
    ~/.cache)."""

    @property
    def rows(self) -> Literal["contrastive", "pairs"]:
        """Kind of training rows: a query with its documents, or a pair with a score."""
        return "pairs" if self.loss in LABELLED_PAIRS else "contrastive"

    def takes(self, key: str) -> bool:
        """Whether a setting of this section has an effect with the loss."""
        return self.loss in _TAKEN_BY.get(key, (self.loss,))

    @property
    def needs_teacher_scores(self) -> bool:
        """Whether each row must have a teacher's scores."""
        return self.loss in ("margin_mse", "kl_distillation")

    @property
    def needs_own_negatives(self) -> bool:
        """Whether each row must have a hard negative of its own."""
        return self.loss in WITH_HARD_NEGATIVES

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of a row depends on rows of other micro-batches of the step.

        If not, a step is one pass, and a row is in the micro-batch of the rows that it is compared with.
        """
        if self.loss in CONTRASTIVE:
            return self.negatives == "global_batch"
        return self.loss in ("online_contrastive", "cosent", "angle")

    def regularizer_weights(self, step: int) -> tuple[float, float]:
        """The factors of the regularizers of queries and documents at an optimizer step, from 0, of a sparse model."""
        query, document = self.query_regularizer_weight, self.document_regularizer_weight
        query = QUERY_REGULARIZER_WEIGHT if query is None else query
        document = DOCUMENT_REGULARIZER_WEIGHT if document is None else document
        share = min(1.0, step / self.regularizer_warmup_steps) if self.regularizer_warmup_steps else 1.0
        factor = share if self.regularizer_schedule == "linear" else share * share
        return query * factor, document * factor

    def __post_init__(self) -> None:
        values = vars(self)
        for field in dataclasses.fields(self):
            losses, value = _TAKEN_BY.get(field.name, ()), values[field.name]
            require(self.takes(field.name) or value == field.default, f"objective.{field.name}", value,
                    f"has no effect with loss = {self.loss!r}, only with {', '.join(losses)}; remove it")
        for key in ("temperature", "teacher_temperature"):
            value = getattr(self, key)
            require(value is None or value > 0, f"objective.{key}", value, "must be > 0; usual: 0.01 to 0.1")
        self._check_learned()
        self._check_contrast()
        for key in ("query_regularizer_weight", "document_regularizer_weight", "regularizer_warmup_steps"):
            value = values[key]
            require(value is None or value >= 0, f"objective.{key}", value, "must be >= 0")
        for key in OF_JOINT[:2]:
            require(len(values[key]) == len(JOINT_SCORES) and all(weight >= 0 for weight in values[key])
                    and any(values[key]), f"objective.{key}", list(values[key]),
                    f"must be one weight >= 0 each for {', '.join(JOINT_SCORES)}, not all 0")
        self._check_compatible()
        require((self.loss == DISTILLED_VECTORS) == (self.teacher_model is not None), "objective.teacher_model",
                self.teacher_model, f"must name the teacher's directory with loss = {DISTILLED_VECTORS!r}")
        require(self.margin is None or self.margin >= 0, "objective.margin", self.margin, "must be >= 0 or null")
        for key in ("matryoshka_weights", "precision_weights"):
            require(all(weight > 0 for weight in values[key]), f"objective.{key}", list(values[key]),
                    "must be > 0 each")

    def _check_learned(self) -> None:
        rate = self.temperature_learning_rate
        require(rate is None or rate > 0, "objective.temperature_learning_rate", rate, "must be > 0 or null")
        require(rate is None or self.learnable_temperature, "objective.temperature_learning_rate", rate,
                "has no effect without objective.learnable_temperature: true; set that, or remove it")
        require(not self.learnable_temperature or self.loss == "sigmoid" or self.temperature >= SMALLEST_LEARNED,
                "objective.temperature", self.temperature, f"must be >= {SMALLEST_LEARNED} if it is learned, "
                "the lower bound of learning (as in CLIP)")

    def _check_compatible(self) -> None:
        old, weight, texts = self.compatible_with, self.compatible_weight, self.compatible_texts
        require(weight > 0, "objective.compatible_weight", weight, "must be > 0")
        for key, value, default in (("compatible_weight", weight, 1.0), ("compatible_texts", texts, None)):
            require(old is not None or value == default, f"objective.{key}", value,
                    "has no effect without objective.compatible_with; set that, or remove it")

    def _check_contrast(self) -> None:
        directions = self.directions
        require("query_to_document" in directions and len(set(directions)) == len(directions), "objective.directions",
                list(directions), "must contain query_to_document, and nothing twice")
        require(self.partition == "joint" or set(directions) == {"query_to_document", "document_to_query"},
                "objective.partition", self.partition, "needs objective.directions = [query_to_document, "
                "document_to_query]; the other directions have no positive")
        require(self.mask_margin_type == "absolute" or self.mask_margin is not None, "objective.mask_margin_type",
                self.mask_margin_type, "has no effect without objective.mask_margin; set that, or remove it")
        require(self.hardness_strength >= 0, "objective.hardness_strength", self.hardness_strength, "must be >= 0")
        require((self.hardness is None) == (self.hardness_strength == 0), "objective.hardness_strength",
                self.hardness_strength, f"is not compatible with objective.hardness = {self.hardness!r}; set both or "
                "neither")

    def check_against(self, *, num_positives: int, num_negatives: int, in_batch: bool) -> None:
        """Raises ConfigError if the section `data` is not compatible with the loss.

        Args:
            num_positives, num_negatives: documents per query.
            in_batch: whether `in_batch_negatives` is true in every entry of `data.train` and `data.validation`.
        """
        if self.loss not in CONTRASTIVE:
            require(num_positives == 1, "data.num_positives", num_positives,
                    f"objective.loss = {self.loss!r} takes one positive per query; set it to 1")
            require(in_batch, "data.train.in_batch_negatives", False,
                    f"objective.loss = {self.loss!r} has no in-batch negatives; remove it")
        require(in_batch or num_negatives > 0, "data.num_negatives", num_negatives,
                "without in-batch negatives (data.train.in_batch_negatives = False) a query needs hard ones; set it to "
                "1 or more")
        require(self.loss not in WITH_HARD_NEGATIVES or num_negatives > 0, "data.num_negatives", num_negatives,
                f"objective.loss = {self.loss!r} compares a query's positive with its own hard negatives; set it to 1 "
                "or more")
        require(self.loss not in LABELLED_PAIRS or num_negatives == 0, "data.num_negatives", num_negatives,
                f"objective.loss = {self.loss!r} takes pairs, which have no negatives; set it to 0")
