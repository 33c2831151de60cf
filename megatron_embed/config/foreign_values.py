"""Values of other trainers' settings in the words of this program."""

import re

_LOSSES = {
    "infonce": "info_nce", "multiplenegativesranking": "info_nce", "mnrl": "info_nce", "mnr": "info_nce",
    "cachedmultiplenegativesranking": "info_nce", "cachedmnrl": "info_nce", "ntxent": "info_nce", "nce": "info_nce",
    "multiplenegativessymmetricranking": "info_nce", "cachedmultiplenegativessymmetricranking": "info_nce",
    "gistembed": "info_nce", "cachedgistembed": "info_nce", "inbatchnegatives": "info_nce", "pair": "info_nce",
    "qa": "info_nce", "pairscore": "cosent", "siglip": "sigmoid",
    "cosine": "cosine_similarity", "cosinesimilarity": "cosine_similarity", "mse": "cosine_similarity",
    "contrastive": "contrastive", "onlinecontrastive": "online_contrastive", "cosent": "cosent", "angle": "angle",
    "triplet": "triplet", "marginmse": "margin_mse", "distillkldiv": "kl_distillation", "kldiv": "kl_distillation",
    "embeddistill": "embedding_distillation",
    "kl": "kl_distillation", "distillation": "kl_distillation", "m3kd": "kl_distillation",
    "bce": "pointwise", "binarycrossentropy": "pointwise", "bcewithlogits": "pointwise", "pointwise": "pointwise",
    "reranker": "pointwise", "pointwisereranker": "pointwise", "generativereranker": "pointwise",
    "pointwisegenerativereranker": "pointwise", "listwise": "listwise", "listwisereranker": "listwise",
    "listwisegenerativereranker": "listwise", "listnet": "listwise", "softmaxcrossentropy": "listwise",
    "plistmle": "listwise", "listmle": "listwise", "ranknet": "ranknet", "lambda": "lambda_loss",
    "lambdarank": "lambda_loss", "marginranking": "margin_ranking", "hinge": "margin_ranking",
    "pairwisehinge": "margin_ranking"}

VALUES: dict[str, dict[str, str]] = {
    "objective.loss": _LOSSES,
    "embedding.pooling": {"eos": "lasttoken", "last": "lasttoken", "lasttoken": "lasttoken", "eostoken": "lasttoken",
                          "avg": "mean", "average": "mean", "mean": "mean", "meanpooling": "mean", "cls": "cls",
                          "clstoken": "cls", "first": "cls", "weightedmean": "weightedmean"},
    "model.dtype": {"bf16": "bfloat16", "bfloat16": "bfloat16", "torchbfloat16": "bfloat16", "fp32": "float32",
                    "bf16mixed": "bfloat16", "bf16true": "bfloat16", "32": "float32", "32true": "float32",
                    "float": "float32", "float32": "float32", "torchfloat32": "float32", "no": "float32",
                    "auto": "auto"},
    "model.attention": {"flashattention2": "flash", "flashattn": "flash", "flashattention3": "flash", "fa2": "flash",
                        "flashattention": "flash", "flash": "flash", "eager": "sdpa", "sdpa": "sdpa",
                        "fused": "te", "auto": "auto"},
    "training.lr_decay_style": {
        "constant": "constant", "constantwithwarmup": "constant", "linear": "linear", "cosine": "cosine",
        "warmuplinear": "linear", "warmupcosine": "cosine", "warmupconstant": "constant", "constantlr": "constant",
        "cosinewithminlr": "cosine", "cosinewarmupwithminlr": "cosine", "polynomial": "linear", "warmuplr": "constant",
        "warmupdecaylr": "linear", "warmupcosinelr": "cosine", "inversesqrt": "inverse-square-root",
        "inversesquareroot": "inverse-square-root", "warmupstabledecay": "wsd", "wsd": "wsd"},
    "training.recompute": {"true": "full", "false": "none", "full": "full", "selective": "selective", "none": "none"},
    "task": {"embedding": "embedding", "reranker": "reranker", "generativereranker": "reranker", "rerank": "reranker",
             "retrieval": "embedding", "crossencoder": "reranker", "retriever": "embedding"},
    "reranker.activation": {"true": "sigmoid", "false": "identity", "sigmoid": "sigmoid", "identity": "identity"},
}
"""Key -> value of another trainer, as `plain` writes it -> value here."""

_CROSS_ENTROPY = ("it is pointwise for a reranker with a yes or no for each document, listwise over the documents of a "
                  "query, and info_nce for an embedding model")
_FLOAT16 = "float16 is not supported; write bfloat16, which needs no loss scaling"

REASONS: dict[str, dict[str, str]] = {
    "objective.loss": {"crossentropy": _CROSS_ENTROPY, "ce": _CROSS_ENTROPY, "softmax": _CROSS_ENTROPY,
                       "causallm": "text generation is not trained here",
                       "seqcls": "classification is not trained here; a reranker is `task: reranker`",
                       "matryoshka": "set embedding.matryoshka_dims beside the loss",
                       "adaptivelayer": "layers are not left out; set embedding.matryoshka_dims for short vectors"},
    "model.dtype": {"fp16": _FLOAT16, "float16": _FLOAT16, "half": _FLOAT16, "16": _FLOAT16,
                    "16mixed": _FLOAT16,
                    "fp8": "products in FP8 are model.fp8; write bfloat16"},
    "training.lr_decay_style": {
        "cosinewithrestarts": "there are no restarts; write cosine, which is one cycle",
        "reducelronplateau": "the schedule does not depend on the loss; write cosine, and evaluation.patience"},
}
"""Key -> value of another trainer that has no counterpart -> what to do instead."""


def plain(value: object) -> str:
    """A value as the tables spell it: `MultipleNegativesRankingLoss` is multiplenegativesranking."""
    text = re.sub(r"[-_ .]", "", str(value).strip().lower())
    return text.removesuffix("loss") or text


def our_value(key: str, value: object) -> str | None:
    """The value here of another trainer's value; None: not known, or there is none."""
    return VALUES.get(key, {}).get(plain(value))


def reason(key: str, value: object) -> str | None:
    """Advice for a value that has no counterpart; None if the tables do not know it."""
    return REASONS.get(key, {}).get(plain(value))
