"""The cases of the exactness matrix: which model, under which layout, in how many micro-batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_embed.config.schema import (
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainFile,
    TrainingConfig,
)
from megatron_embed.names import Pooling, Precision

BOUND = 1e-5
LOSS_BOUND = 2e-6
NUM_NEGATIVES = 3
AUX_COEFFICIENT = 0.1
Kind = Literal["qwen3", "bert", "qwen3_moe", "xlm-roberta", "qwen2", "llama", "mistral", "mixtral", "modernbert",
               "t5", "gemma2", "gemma3_text", "phi3", "glm4", "nomic_bert", "gte-qwen2", "internlm2", "deberta-v2"]
KINDS: tuple[Kind, ...] = ("qwen3", "bert", "qwen3_moe")
"""Models of the matrix."""
OTHER_KINDS: tuple[Kind, ...] = ("xlm-roberta", "qwen2", "llama", "mistral", "mixtral")
"""Models with other features: positions behind the padding id, biases, rope scaling, an attention window."""
SLOW_KINDS: tuple[Kind, ...] = ("modernbert", "t5", "gemma2", "gemma3_text", "phi3", "glm4", "nomic_bert",
                                 "gte-qwen2", "internlm2", "deberta-v2")
"""Models whose gradients the slow tests compare under most layouts."""
RECOMPUTE: tuple[Literal["selective", "full"], ...] = ("selective", "full")
POOLINGS: dict[Kind, Pooling] = {
    "qwen3": "lasttoken", "bert": "cls", "qwen3_moe": "mean", "xlm-roberta": "mean", "qwen2": "mean",
    "llama": "lasttoken", "mistral": "lasttoken", "mixtral": "mean", "modernbert": "mean", "t5": "mean",
    "gemma2": "lasttoken", "gemma3_text": "mean", "phi3": "lasttoken", "glm4": "lasttoken", "nomic_bert": "mean",
    "gte-qwen2": "lasttoken", "internlm2": "mean", "deberta-v2": "cls"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a step."""

    count: int
    """Queries of the global batch; row r has r % 4 hard negatives, or as many as there may be."""
    max_length: int
    """Tokens of a text."""
    joined: int
    """Paragraphs that make up a document."""
    temperature: float
    most_negatives: tuple[int, int] = (3, 3)
    """Most hard negatives of a row in the first and the second half of the rows."""
    masked: bool = False
    """Queries, positives and documents repeat, and `objective.mask_duplicates` is on."""


ROWS = {"short": Rows(count=16, max_length=48, joined=1, temperature=0.1),
        "masked": Rows(count=16, max_length=48, joined=1, temperature=0.1, most_negatives=(3, 1), masked=True),
        "lopsided": Rows(count=8, max_length=48, joined=1, temperature=0.1, most_negatives=(3, 0), masked=True),
        "long": Rows(count=4, max_length=1500, joined=16, temperature=0.1)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a process grid; `dp` is what the others leave of the ranks."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = True
    a2a: bool = False
    """Context-parallel ranks share heads in attention."""

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    def __str__(self) -> str:
        sizes = {"EP": self.ep, "ETP": self.etp, "TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp,
                 "DP": self.dp}
        name = "x".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "1 rank"
        name += " by heads" if self.a2a else ""
        return name if self.sequence_parallel or self.tp == 1 else f"{name} without SP"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Widths and precisions of a loss, with their weights."""

    dims: tuple[int, ...]
    precisions: tuple[Precision, ...]
    weights: tuple[float, ...]
    """One weight for each precision."""


STORED = {"int8": Stored(dims=(30,), precisions=("float32", "int8"), weights=(1.0, 0.5)),
          "binary": Stored(dims=(), precisions=("float32", "binary"), weights=(1.0, 0.5)),
          "all-widths": Stored(dims=(18, 11), precisions=("float32", "int8", "binary"), weights=(1.0, 0.5, 0.7)),
          "rescore": Stored(dims=(), precisions=("float32", "binary", "rescore"), weights=(1.0, 0.5, 0.7))}
"""By name; at these widths no component of the rows lies close to the end of its step."""

Sabotage = Literal["factor", "group", "order", "mask"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    kind: Kind
    layout: Layout
    micro_batches: int = 0
    """Per step and data-parallel rank; 1 is the one-pass step. 0: as many as the token budget makes."""
    tokens: int | None = None
    """`training.micro_batch_tokens`."""
    negatives: Literal["global_batch", "micro_batch"] = "global_batch"
    distributed: bool = False
    aux: float = 0.0
    rows: str = "short"
    repeats: int = 1
    """Steps; their gradients must all be right."""
    recompute: Literal["none", "selective", "full"] = "none"
    sabotage: Sabotage | None = None
    adapters: bool = False
    """The model has LoRA adapters, and nothing else is trained."""
    overlap: bool = False
    """Gradients are reduced and parameters gathered behind the computation, in small buckets."""
    first_pass: int = 1
    """`training.first_pass_micro_batches`."""
    kernel: Literal["sdpa", "flash"] = "sdpa"
    """flash: on the pretend device, whose kernels then compute in float32 as well."""
    keep: int = 0
    """`training.keep_activations`."""
    dense: str = ""
    """Dense modules behind the pooling, by their name in dense_directories.SHAPES; empty: none."""
    multi: str = ""
    """A multi-vector model, by the name of its format in multi_vector_reference.FORMATS; empty: one vector per text."""
    loss: Literal["info_nce", "margin_mse", "kl_distillation"] = "info_nce"
    """The loss of a multi-vector model."""
    sparse: str = ""
    """A sparse model, by its name in sparse_reference.SPARSE; empty: it is none."""
    joint: str = ""
    """A joint model: distilled, or plain, which is without self-distillation; empty: it is none."""
    stored: str = ""
    """Precisions of the loss, by their name in STORED; empty: float32 alone."""
    others: Literal["", "compatible", "query side", "guided", "distilled"] = ""
    """What vectors by another model are for; empty: there is none."""

    @property
    def encode_once(self) -> bool:
        """Whether repeated texts share a vector, as `training.encode_repeated_texts: auto` decides."""
        return self.negatives == "global_batch" and not self.aux

    @property
    def model(self) -> str:
        """Name of the model's directory."""
        if self.sparse:
            return f"{self.kind}-sparse{'-tied' if self.sparse == 'tied' else ''}"
        if self.joint:
            return f"{self.kind}-joint"
        kind = f"{self.kind}-{self.dense or self.multi}" if self.dense or self.multi else self.kind
        return f"{kind}-long" if self.rows == "long" else kind

    @property
    def reference(self) -> str:
        """Name of the reference; only the auxiliary loss and negatives of a micro-batch depend on the micro-batches."""
        name = f"{self.kind}-{self.rows}{'-lora' if self.adapters else ''}{self.dense and '-'}{self.dense}"
        name += f"-{self.stored}" if self.stored else ""
        if self.multi:
            name += f"-{self.multi}-{self.loss}"
        name += f"-sparse-{self.sparse}" if self.sparse else ""
        name += f"-joint-{self.joint}" if self.joint else ""
        name += self.others and f"-{self.others.replace(' ', '-')}"
        if self.aux or self.negatives == "micro_batch":
            rounds = f"-by{self.layout.pp}" if self.layout.vpp > 1 else ""
            name += f"-{self.aux:g}-{self.negatives}-{self.layout.dp}x{self.micro_batches}-{self.tokens}{rounds}"
        return name

    def __str__(self) -> str:
        words = [self.kind, str(self.layout), f"{self.tokens} tokens" if self.tokens else f"M{self.micro_batches}"]
        words += [f"first pass x{self.first_pass}"] if self.first_pass > 1 else []
        words += [f"{self.keep} kept"] if self.keep else []
        words += ["micro-batch negatives"] if self.negatives == "micro_batch" else []
        words += ["distributed"] if self.distributed else []
        words += ["adapters"] if self.adapters else []
        words += [self.dense] if self.dense else []
        words += [f"vectors {self.multi}"] if self.multi else []
        words += [f"sparse {self.sparse}"] if self.sparse else []
        words += [f"joint {self.joint}"] if self.joint else []
        words += [self.loss] if self.loss != "info_nce" else []
        words += [f"stored as {self.stored}"] if self.stored else []
        words += [self.others] if self.others else []
        words += ["overlapped"] if self.overlap else []
        words += ["flash"] if self.kernel == "flash" else []
        words += [f"aux {self.aux:g}"] if self.aux else []
        words += [self.rows] if self.rows != "short" else []
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return ", ".join([*words, self.sabotage] if self.sabotage else words)


def _kinds(layout: Layout) -> tuple[Kind, ...]:
    """Models that a layout can hold."""
    if layout.ep > 1 or layout.etp > 1:
        return ("qwen3_moe",)
    return KINDS if layout.sequence_parallel or layout.tp == 1 else ("qwen3", "bert")


SINGLE = (
    Layout(), Layout(dp=2), Layout(dp=4), Layout(dp=8), Layout(tp=2), Layout(tp=2, sequence_parallel=False),
    Layout(tp=4), Layout(pp=2), Layout(pp=4), Layout(pp=2, vpp=2), Layout(cp=2), Layout(cp=4), Layout(dp=2, ep=2),
    Layout(dp=4, ep=4))
"""One way of splitting the model at a time (experts need ranks to lie on)."""
COMBINED = (
    Layout(tp=2, pp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(tp=2, cp=2), Layout(pp=2, cp=2),
    Layout(cp=2, dp=2), Layout(pp=2, vpp=2, dp=2), Layout(pp=2, vpp=2, tp=2), Layout(pp=2, vpp=2, cp=2),
    Layout(tp=2, ep=2), Layout(cp=2, ep=2), Layout(tp=2, etp=2), Layout(pp=2, dp=2, ep=2), Layout(tp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=4), Layout(dp=4, ep=2), Layout(cp=2, dp=2, ep=2), Layout(pp=2, vpp=2, dp=2, ep=2),
    Layout(tp=2, pp=2, dp=2), Layout(tp=2, cp=2, dp=2), Layout(pp=2, cp=2, dp=2), Layout(tp=2, pp=2, cp=2),
    Layout(tp=4, dp=2), Layout(pp=4, tp=2), Layout(cp=4, tp=2), Layout(tp=2, pp=2, dp=2, ep=2),
    Layout(tp=2, pp=2, dp=2, ep=2, etp=2), Layout(pp=2, vpp=2, tp=2, dp=2))


def all_cases() -> list[Case]:
    """The matrix, cases of one layout together."""
    cases = []
    for index, layout in enumerate((*SINGLE, *COMBINED)):
        smallest = layout.pp if layout.vpp > 1 else 1
        counts = [count for count in (1, 2, 4) if count >= smallest and layout.dp * count <= ROWS["short"].count]
        for kind_index, kind in enumerate(_kinds(layout)):
            chosen = counts if layout in SINGLE else [counts[(index + kind_index) % len(counts)]]
            if layout not in SINGLE and len(_kinds(layout)) == 1:
                chosen = counts[:1] + counts[-1:]
            cases += [Case(kind=kind, layout=layout, micro_batches=count,
                           distributed=(index + kind_index + turn) % 2 == 0,
                           rows="masked" if (index + turn) % 2 else "short")
                      for turn, count in enumerate(chosen)]
        if "qwen3_moe" in _kinds(layout):
            cases.append(Case(kind="qwen3_moe", layout=layout, micro_batches=counts[-1], aux=AUX_COEFFICIENT,
                              distributed=index % 2 == 1, rows="short" if index % 2 else "masked"))
    cases += [Case(kind=kind, layout=Layout(pp=2, vpp=2), micro_batches=4, repeats=50) for kind in KINDS]
    cases += [Case(kind=kind, layout=Layout(cp=2), micro_batches=1, rows="long") for kind in KINDS]
    cases += [Case(kind=kind, layout=Layout(tp=2, pp=2), micro_batches=2, recompute=recompute)
              for kind in KINDS for recompute in RECOMPUTE]
    cases += token_cases() + micro_batch_cases() + kept_cases()
    return sorted(cases, key=lambda case: (*SINGLE, *COMBINED).index(case.layout))


TOKEN_LAYOUTS = (Layout(dp=2), Layout(dp=4), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(pp=2, vpp=2, dp=2),
                 Layout(cp=2, dp=2))


def token_cases() -> list[Case]:
    """Bins filled by tokens, of which ranks have different numbers."""
    cases = [Case(kind=kind, layout=layout, tokens=tokens, rows=rows, distributed=(index + turn) % 2 == 0)
             for index, layout in enumerate(TOKEN_LAYOUTS) for turn, kind in enumerate(KINDS)
             for tokens, rows in [((144, "masked"), (176, "short"), (128, "masked"))[(index + turn) % 3]]]
    expert_layouts = (Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=2), Layout(pp=2, vpp=2, dp=2, ep=2))
    cases += [Case(kind="qwen3_moe", layout=layout, tokens=tokens, rows=rows, aux=aux) for layout in expert_layouts
              for tokens, rows, aux in ((128, "masked", 0.0), (176, "short", AUX_COEFFICIENT))]
    # One rank has too few rows to fill as many bins as the other: it runs some again.
    cases += [Case(kind=kind, layout=layout, tokens=48, rows="lopsided")
              for layout in (Layout(dp=2), Layout(pp=2, vpp=2, dp=2)) for kind in KINDS]
    cases.append(Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), tokens=48, rows="lopsided", aux=AUX_COEFFICIENT))
    return cases


def kept_cases() -> list[Case]:
    """Steps whose first micro-batches keep their activations: some of them, or all."""
    layouts = (Layout(), Layout(dp=2), Layout(tp=2), Layout(cp=2), Layout(tp=2, dp=2))
    cases = [Case(kind=kind, layout=layout, micro_batches=4, keep=1 + (index + turn) % 4, distributed=turn % 2 == 0,
                  rows="masked" if (index + turn) % 2 else "short", recompute=("none", "full")[(index + turn) % 3 == 0])
             for index, layout in enumerate(layouts) for turn, kind in enumerate(KINDS[:2])]
    cases += [Case(kind="qwen3_moe", layout=layout, micro_batches=4, keep=keep, aux=AUX_COEFFICIENT)
              for layout, keep in ((Layout(dp=2, ep=2), 2), (Layout(tp=2, etp=2), 3), (Layout(tp=2, ep=2), 4))]
    cases.append(Case(kind="qwen3", layout=Layout(dp=2), tokens=144, rows="masked", keep=1, overlap=True,
                      distributed=True))
    return cases


def micro_batch_cases() -> list[Case]:
    """Negatives of one micro-batch over the data-parallel ranks, in one pass."""
    cases = [Case(kind=kind, layout=layout, micro_batches=2 + 2 * (index % 2), negatives="micro_batch",
                  rows="masked" if (index + turn) % 2 else "short", distributed=turn % 2 == 0)
             for index, layout in enumerate((Layout(), *TOKEN_LAYOUTS, Layout(tp=2), Layout(pp=2), Layout(cp=2)))
             for turn, kind in enumerate(KINDS)]
    cases += [Case(kind=kind, layout=layout, tokens=tokens, negatives="micro_batch", rows=rows)
              for layout in (Layout(dp=2), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(pp=2, vpp=2, dp=2))
              for kind, tokens, rows in (("qwen3", 288, "masked"), ("bert", 240, "lopsided"))]
    return cases


DENSE_LAYOUTS = (Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2),
                 Layout(tp=2, dp=2), Layout(tp=2, cp=2), Layout(tp=2, sequence_parallel=False), Layout(tp=4),
                 Layout(tp=2, pp=2, cp=2))


def dense_cases() -> list[Case]:
    """Dense modules behind the pooling: one, two with a divided one, or with activations, biases and Normalize before
    them."""
    shapes = ("sentence-t5", "embeddinggemma", "after-normalize")
    cases = [Case(kind=("bert", "qwen3")[(index + turn) % 2], layout=layout, micro_batches=2 if layout.vpp == 1 else 4,
                  dense=dense, distributed=(index + turn) % 2 == 0, rows="masked" if turn % 2 else "short")
             for index, layout in enumerate(DENSE_LAYOUTS) for turn, dense in enumerate(shapes)]
    cases += [Case(kind="bert", layout=layout, micro_batches=2, dense="embeddinggemma", adapters=True)
              for layout in DENSE_LAYOUTS[:4]]
    cases.append(Case(kind="bert", layout=Layout(dp=2), tokens=128, rows="masked", dense="embeddinggemma", keep=1,
                      overlap=True, distributed=True))
    return sorted(cases, key=lambda case: DENSE_LAYOUTS.index(case.layout))


HEAD_LAYOUTS = (Layout(cp=2, a2a=True), Layout(cp=4, a2a=True), Layout(tp=2, cp=2, a2a=True),
                Layout(pp=2, cp=2, a2a=True))


def head_cases() -> list[Case]:
    """Context parallelism by heads, in groups and by the flash kernels; T5 has a bias of each head, DeBERTa one of each
    head and token, Mistral a window."""
    kinds: tuple[Kind, ...] = (*KINDS, "t5", "deberta-v2", "mistral")
    cases = [Case(kind=kind, layout=layout, micro_batches=2, distributed=(index + turn) % 2 == 0,
                  rows="masked" if turn % 2 else "short") for index, layout in enumerate(HEAD_LAYOUTS)
             for turn, kind in enumerate(kinds)]
    cases += [Case(kind=kind, layout=HEAD_LAYOUTS[0], micro_batches=2, recompute=recompute)
              for kind in ("qwen3", "deberta-v2") for recompute in RECOMPUTE]
    return sorted(cases, key=lambda case: HEAD_LAYOUTS.index(case.layout))


def head_flash_cases() -> list[Case]:
    """The same by the flash kernels, on the pretend device."""
    return [Case(kind=kind, layout=HEAD_LAYOUTS[0], micro_batches=2, kernel="flash")
            for kind in (*KINDS[:2], "mistral")]


MULTI_VECTOR_LAYOUTS = (*SINGLE[:12], *COMBINED[:9], Layout(tp=2, pp=2, dp=2), Layout(tp=2, cp=2, dp=2),
                        Layout(pp=2, vpp=2, tp=2, dp=2))
MULTI_VECTOR_EXPERTS = (Layout(dp=2, ep=2), Layout(tp=2, ep=2), Layout(cp=2, ep=2), Layout(tp=2, etp=2),
                        Layout(pp=2, dp=2, ep=2))


def _micro_batches(layout: Layout, turn: int) -> int:
    """1, 2 or 4 in turn, of those that the layout can run."""
    smallest = layout.pp if layout.vpp > 1 else 1
    counts = [count for count in (1, 2, 4) if count >= smallest and layout.dp * count <= 16]
    return counts[turn % len(counts)]


def _with_token_budgets(**head: str) -> list[Case]:
    """Cases with micro-batches by tokens; `head`: what the model gives, as `sparse="flops"`."""
    return [Case(kind=kind, layout=layout, tokens=tokens, rows="masked", first_pass=first_pass, **head)
            for layout, kind, tokens, first_pass in (
                (Layout(dp=2), "bert", 144, 1), (Layout(tp=2, dp=2), "qwen3", 176, 2),
                (Layout(cp=2, dp=2), "bert", 144, 1), (Layout(pp=2, dp=2), "qwen3", 144, 1))]


def multi_vector_cases() -> list[Case]:
    """Models of a vector per token: documents' vectors travel in tiles."""
    formats = ("plain", "colbert", "attended")
    cases = []
    for index, layout in enumerate(MULTI_VECTOR_LAYOUTS):
        for turn, kind in enumerate(("bert", "qwen3")):
            if layout == Layout(tp=2, sequence_parallel=False) and kind not in _kinds(layout):
                continue
            cases.append(Case(kind=kind, layout=layout, micro_batches=_micro_batches(layout, index + turn),
                              multi=formats[(index + turn) % 3], distributed=(index + turn) % 2 == 0,
                              rows="masked" if (index // 2 + turn) % 2 else "short"))
    cases += [Case(kind="qwen3_moe", layout=layout, micro_batches=2, multi=formats[index % 3],
                   aux=AUX_COEFFICIENT if index % 2 else 0.0) for index, layout in enumerate(MULTI_VECTOR_EXPERTS)]
    cases += _with_token_budgets(multi="colbert")
    cases += [Case(kind="bert", layout=layout, micro_batches=2, negatives="micro_batch", multi="plain")
              for layout in (Layout(dp=2), Layout(tp=2), Layout(pp=2))]
    cases += [Case(kind="bert", layout=layout, micro_batches=2, multi="plain", keep=1) for layout in (
        Layout(dp=2), Layout(tp=2, dp=2))]
    cases.append(Case(kind="bert", layout=Layout(dp=2), micro_batches=2, multi="colbert", adapters=True))
    return sorted(cases, key=lambda case: (*SINGLE, *COMBINED).index(case.layout))


SPARSE_LAYOUTS = MULTI_VECTOR_LAYOUTS


def sparse_cases() -> list[Case]:
    """Sparse models: encoders with a tied head, decoders with a tied and an untied one; the vocabulary is divided over
    the tensor-parallel ranks, and padded there."""
    cases = []
    for index, layout in enumerate(SPARSE_LAYOUTS):
        for turn, (kind, sparse) in enumerate((("bert", ("flops", "l1")[index % 2]), ("qwen3", "tied"))):
            cases.append(Case(kind=kind, layout=layout, micro_batches=_micro_batches(layout, index + turn),
                              sparse=sparse, distributed=(index + turn) % 2 == 0,
                              rows="masked" if (index // 2 + turn) % 2 else "short"))
    cases += [Case(kind="qwen3", layout=layout, micro_batches=2, sparse="flops", distributed=index % 2 == 0)
              for index, layout in enumerate((Layout(), Layout(dp=2), Layout(tp=2), Layout(tp=4), Layout(pp=2),
                                              Layout(cp=2), Layout(tp=2, dp=2), Layout(tp=2, cp=2)))]
    cases += [Case(kind="qwen3_moe", layout=layout, micro_batches=2, sparse="flops",
                   aux=AUX_COEFFICIENT if index % 2 else 0.0) for index, layout in enumerate(MULTI_VECTOR_EXPERTS)]
    cases += _with_token_budgets(sparse="flops")
    cases += [Case(kind="bert", layout=layout, micro_batches=2, sparse="l1", keep=1) for layout in (
        Layout(dp=2), Layout(tp=2, dp=2))]
    return sorted(cases, key=lambda case: (*SINGLE, *COMBINED).index(case.layout))


def joint_cases() -> list[Case]:
    """Joint models: three scores of every pair, by outputs of a text and of its tokens."""
    cases = []
    for index, layout in enumerate(MULTI_VECTOR_LAYOUTS):
        for turn, kind in enumerate(("bert", "qwen3")):
            cases.append(Case(kind=kind, layout=layout, micro_batches=_micro_batches(layout, index + turn),
                              joint=("distilled", "plain")[(index // 3 + turn) % 2],
                              distributed=(index + turn) % 2 == 0,
                              rows="masked" if (index // 2 + turn) % 2 else "short"))
    cases += [Case(kind="qwen3_moe", layout=layout, micro_batches=2, joint="distilled",
                   aux=AUX_COEFFICIENT if index % 2 else 0.0) for index, layout in enumerate(MULTI_VECTOR_EXPERTS)]
    cases += _with_token_budgets(joint="distilled")
    cases += [Case(kind="bert", layout=layout, micro_batches=2, negatives="micro_batch", joint="distilled")
              for layout in (Layout(dp=2), Layout(tp=2), Layout(pp=2))]
    cases += [Case(kind="bert", layout=layout, micro_batches=2, joint="plain", keep=1) for layout in (
        Layout(dp=2), Layout(tp=2, dp=2))]
    return sorted(cases, key=lambda case: (*SINGLE, *COMBINED).index(case.layout))


STORED_LAYOUTS = (Layout(), Layout(dp=2), Layout(dp=4), Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2),
                  Layout(tp=2, dp=2), Layout(cp=2, dp=2), Layout(tp=2, pp=2))


def stored_cases() -> list[Case]:
    """Losses of rounded vectors: one pass and two, masks, token budgets, negatives of a micro-batch."""
    names = ("int8", "binary", "all-widths")
    cases = [Case(kind=("bert", "qwen3")[(index + turn) % 2], layout=layout, stored=name,
                  micro_batches=(1, 2, 4)[(index + turn) % 3] if layout.vpp == 1 else 4,
                  distributed=(index + turn) % 2 == 0, rows="masked" if (index // 2 + turn) % 2 else "short")
             for index, layout in enumerate(STORED_LAYOUTS)
             for turn, name in enumerate((names[index % 3], names[(index + 1) % 3]))]
    cases += [Case(kind="bert", layout=Layout(dp=2), tokens=144, rows="masked", stored="all-widths", first_pass=2),
              Case(kind="qwen3", layout=Layout(dp=2), micro_batches=2, negatives="micro_batch", stored="all-widths"),
              Case(kind="qwen3", layout=Layout(tp=2, dp=2), micro_batches=2, stored="binary", keep=1)]
    cases += [Case(kind=("bert", "qwen3")[index % 2], layout=layout, stored="rescore", micro_batches=4,
                   distributed=index % 2 == 0, rows="masked" if index % 3 else "short")
              for index, layout in enumerate(STORED_LAYOUTS)]
    return sorted(cases, key=lambda case: STORED_LAYOUTS.index(case.layout))


OTHER_MODEL_LAYOUTS = (Layout(), Layout(dp=2), Layout(dp=4), Layout(tp=2), Layout(tp=2, sequence_parallel=False),
                       Layout(tp=4), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2), Layout(cp=4), Layout(tp=2, dp=2),
                       Layout(pp=2, dp=2), Layout(tp=2, pp=2), Layout(cp=2, dp=2), Layout(tp=2, cp=2),
                       Layout(tp=2, pp=2, dp=2), Layout(tp=2, cp=2, dp=2))


def other_model_cases() -> list[Case]:
    """Vectors by another model: an index that is kept, beside the documents or in their place; a guide's masks; a
    teacher's vectors as the target."""
    kinds: tuple[Literal["compatible", "query side", "guided", "distilled"], ...] = (
        "compatible", "query side", "guided", "distilled")
    cases = []
    for index, layout in enumerate(OTHER_MODEL_LAYOUTS):
        cases += [Case(kind=("bert", "qwen3")[(index + turn) % 2], layout=layout, others=others,
                       micro_batches=_micro_batches(layout, index + turn), distributed=(index + turn) % 2 == 0,
                       rows="masked" if others != "distilled" and (index + turn) % 3 == 0 else "short")
                  for turn, others in enumerate(kinds)]
    cases += [Case(kind="bert", layout=layout, tokens=48 if others == "query side" else 144, rows="masked",
                   others=others) for layout in (Layout(dp=2), Layout(cp=2, dp=2)) for others in kinds[:3]]
    cases += [Case(kind="bert", layout=Layout(dp=2), micro_batches=4, keep=2, first_pass=2, others=others)
              for others in kinds[:3]]
    cases += [Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), micro_batches=2, others=others) for others in kinds]
    cases += [Case(kind="bert", layout=Layout(dp=2), micro_batches=2, negatives="micro_batch", others=others)
              for others in ("compatible", "guided")]
    cases.append(Case(kind="bert", layout=Layout(dp=2), micro_batches=2, adapters=True, others="query side"))
    return sorted(cases, key=lambda case: (*OTHER_MODEL_LAYOUTS, Layout(dp=2, ep=2)).index(case.layout))


FLASH_LAYOUTS = (Layout(cp=2), Layout(cp=4), Layout(tp=2, cp=2), Layout(pp=2, cp=2), Layout(cp=2, dp=2),
                 Layout(tp=2, pp=2, cp=2), Layout(cp=4, tp=2))


def flash_cases() -> list[Case]:
    """Context parallelism by the flash kernels, on the pretend device; Mistral has an attention window."""
    kinds: tuple[Kind, ...] = (*KINDS, "mistral")
    cases = [Case(kind=kind, layout=layout, micro_batches=1 + (index + turn) % 2, kernel="flash",
                  rows="masked" if (index + turn) % 2 else "short", distributed=turn % 2 == 0)
             for index, layout in enumerate(FLASH_LAYOUTS) for turn, kind in enumerate(kinds)]
    cases += [Case(kind=kind, layout=Layout(cp=2, dp=2), tokens=128, rows="masked", kernel="flash") for kind in kinds]
    cases += [Case(kind=kind, layout=Layout(cp=2), micro_batches=2, recompute=recompute, kernel="flash")
              for kind in ("qwen3", "bert") for recompute in RECOMPUTE]
    cases += [Case(kind="qwen3", layout=Layout(cp=4), micro_batches=1, rows="long", kernel="flash")]
    return sorted(cases, key=lambda case: FLASH_LAYOUTS.index(case.layout))


CURVE_LAYOUTS = (Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(tp=2, pp=2),
                 Layout(tp=2, dp=2))
CURVE_STEPS = 20
CURVE_BOUND = 1e-4


SPARSE_TEMPERATURE = 60.0
"""Divides sums over hundreds of tokens of the vocabulary: dot products of up to 900, which float32 rounds by 6e-5. The
error of a probability is that over the temperature."""
SPARSE_WEIGHTS = {"flops": (0.001, 0.0008), "tied": (0.001, 0.0008), "l1": (0.001, 0.0008)}
"""Weights of the regularizers of queries and documents: terms of about half the size of the loss."""
JOINT_SCORE_WEIGHTS, JOINT_LOSS_WEIGHTS = (1.0, 0.3, 0.8), (0.9, 0.4, 1.0)
"""Weights of a joint model's dense, sparse and multi-vector scores, and of their losses."""
JOINT_TEMPERATURE = 0.3
MULTI_VECTOR_TEMPERATURE = 0.5
"""Divides sums over a dozen vectors."""


def objective_of(case: Case) -> ObjectiveConfig:
    """The loss of a case."""
    rows = ROWS[case.rows]
    if case.loss == "margin_mse":
        return ObjectiveConfig(loss=case.loss)
    if case.sparse:
        kind, (query, document) = "l1" if case.sparse == "l1" else "flops", SPARSE_WEIGHTS[case.sparse]
        return ObjectiveConfig(temperature=SPARSE_TEMPERATURE, mask_duplicates=rows.masked, query_regularizer=kind,
                               document_regularizer=kind, query_regularizer_weight=query,
                               document_regularizer_weight=document)
    temperature = MULTI_VECTOR_TEMPERATURE if case.multi else rows.temperature
    if case.loss == "kl_distillation":
        return ObjectiveConfig(loss=case.loss, temperature=temperature, teacher_temperature=1.0)
    if case.others == "distilled":
        return ObjectiveConfig(loss="embedding_distillation", teacher_model="teacher")
    if case.joint:
        return ObjectiveConfig(temperature=JOINT_TEMPERATURE, negatives=case.negatives, mask_duplicates=rows.masked,
                               score_weights=JOINT_SCORE_WEIGHTS, score_loss_weights=JOINT_LOSS_WEIGHTS,
                               self_distillation=case.joint == "distilled")
    others = {"compatible_with": "old", "compatible_weight": 0.7} if case.others == "compatible" else {}
    others |= {"guide_model": "guide", "mask_margin": 0.1} if case.others == "guided" else {}
    return ObjectiveConfig(temperature=temperature, negatives=case.negatives, mask_duplicates=rows.masked,
                           precision_weights=STORED[case.stored].weights if case.stored else (), **others)


def embedding_of(case: Case) -> EmbeddingConfig:
    """The head of a case, and its pooling, widths and precisions if it has them."""
    if case.sparse:
        return EmbeddingConfig(head="sparse")
    if case.multi:
        return EmbeddingConfig()
    if case.joint:
        return EmbeddingConfig(head="joint", pooling=POOLINGS[case.kind])
    if not case.stored:
        return EmbeddingConfig(pooling=POOLINGS[case.kind])
    stored = STORED[case.stored]
    return EmbeddingConfig(pooling=POOLINGS[case.kind], matryoshka_dims=stored.dims, precision=stored.precisions)


def run_config(case: Case, folder: Path) -> RunConfig:
    """The run of a case on the models and rows in `folder`."""
    rows, layout = ROWS[case.rows], case.layout
    return RunConfig(
        model=ModelConfig(path=str(folder / (f"{case.model}-lora" if case.adapters else case.model)), dtype="float32"),
        embedding=embedding_of(case),
        objective=objective_of(case),
        data=DataConfig(train=(TrainFile(path=str(folder / f"{case.rows}.jsonl")),), shuffle=False,
                        num_negatives=NUM_NEGATIVES, query_max_length=rows.max_length,
                        document_max_length=rows.max_length),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp, context_parallel_size=layout.cp,
            cp_comm_type="a2a" if layout.a2a else "all_gather",
            expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp,
            sequence_parallel="auto" if layout.sequence_parallel else False),
        training=TrainingConfig(
            global_batch_size=rows.count, micro_batch_size=rows.count // (layout.dp * max(1, case.micro_batches)),
            micro_batch_tokens=case.tokens, first_pass_micro_batches=case.first_pass,
            keep_activations=case.keep, query_side_only=case.others == "query side",
            moe_aux_loss_coefficient=case.aux, recompute=case.recompute),
        optimizer=OptimizerConfig(distributed=case.distributed, overlap_grad_reduce=case.overlap,
                                  overlap_param_gather=case.overlap))
