"""Memory of a rank of a layout, in bytes.

Parameters, gradients and optimizer state are exact: the sizes of Megatron's buffers
(tests/planning/test_memory.py compares). Activations are an estimate, compared with what a step allocates on CPU ranks
(tests/planning/test_activations.py); not measured on a GPU.
"""

import math
from dataclasses import dataclass

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.models.vocabulary_shape import padded_vocabulary
from megatron_embed.names import LOGIT_TILE_ELEMENTS, LOSS_TILE_ELEMENTS, MAXSIM_TILE_ELEMENTS, ROLES, SHORT_SEQUENCE
from megatron_embed.planning.parameters import (
    AdaptedLinears,
    Held,
    Parameters,
    dense_rows,
    gives_sparse_vectors,
    gives_token_vectors,
    held_parameters,
    stage_layers,
    vector_width,
)
from megatron_embed.planning.quantized import bytes_saved, layer_linears, restored_bytes

GIB = 2**30
RESERVE_BYTES = 3 * GIB
"""CUDA context and NCCL's buffers of half a dozen process groups."""
FRAGMENTATION = 0.06
"""Share of everything else that the allocator loses to fragmentation, with expandable segments."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}
"""Bytes of a parameter; `auto` as on the GPUs that plans are for."""


EIGHT_BIT_BLOCK = 256
"""Elements of a moment in 8 bits that share a float32 scale; of small tensors, which stay in float32, none."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of a layout that follow from its ranks."""

    gpus: int
    dp: int
    """Data-parallel ranks."""
    dense_copies: int
    """Ranks over which optimizer state of dense parameters is sharded: data- and context-parallel."""
    expert_copies: int
    num_microbatches: int
    """Per data-parallel rank and step."""
    micro_batch_tokens: int
    """Tokens of one micro-batch over its context-parallel ranks; the maximum that the settings allow."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """Embeddings of the step, the documents gathered from all ranks with their gradient, and one tile."""
    reserve: int
    host: int = 0
    """Host memory, not GPU memory: the optimizer's share if it is offloaded."""
    save: int = 0
    """Host memory while a checkpoint is saved: what the rank writes of it."""

    @property
    def total(self) -> int:
        """Total on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss + self.reserve


def grid_of(config: RunConfig, gpus: int) -> Grid:
    """The grid of a layout that is possible on `gpus` ranks."""
    sizes, training = config.parallel, config.training
    pp, cp = sizes.pipeline_model_parallel_size, sizes.context_parallel_size
    dp = gpus // (sizes.tensor_model_parallel_size * pp * cp)
    expert_copies = gpus // (sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size * pp)
    tokens = config.workload.tokens_per_query
    if training.micro_batch_tokens is not None:
        micro = training.micro_batch_tokens
        count = max(1, math.ceil(training.global_batch_size // dp * tokens / micro))
    else:
        micro = training.micro_batch_size * tokens
        count = training.global_batch_size // (training.micro_batch_size * dp)
    return Grid(gpus=gpus, dp=dp, dense_copies=dp * cp, expert_copies=expert_copies, num_microbatches=max(1, count),
                micro_batch_tokens=micro)


def optimizer_share(config: RunConfig, parameters: Parameters, grid: Grid) -> int:
    """Parameters that a rank updates: the copies divide them if the optimizer is distributed."""
    if not config.optimizer.distributed:
        return parameters.total
    return parameters.dense // grid.dense_copies + parameters.expert // grid.expert_copies


def optimizer_bytes(config: RunConfig, parameters: Parameters, grid: Grid) -> int:
    """Optimizer bytes on the GPU: two moments, and float32 main parameters if the model's are not."""
    if config.optimizer.cpu_offload:
        return 0
    main = 0 if config.model.dtype == "float32" else 4
    if config.optimizer.name == "adamw_8bit":
        moments = 2 + 8 / EIGHT_BIT_BLOCK
    else:
        moments = 6 if config.optimizer.precision_aware else 8
    return int((main + moments) * optimizer_share(config, parameters, grid))


def muon_matrices(config: RunConfig, shape: ModelShape, stage: int) -> Parameters:
    """Elements of a rank's matrices for which Muon has one number, where AdamW has two: those of the layers."""
    if config.optimizer.name != "muon":
        return Parameters()
    attention, mlp = (sum(linear.weights for linear in linears) for linears in (
        layer_linears(config, shape)[:2], layer_linears(config, shape)[2:]))
    of_layer = Parameters(dense=attention, expert=mlp) if shape.num_experts else Parameters(dense=attention + mlp)
    return of_layer * stage_layers(shape, config.parallel, stage)


def host_bytes(config: RunConfig, parameters: Parameters, grid: Grid) -> int:
    """Bytes in host memory: main parameters, gradients and two moments, all in float32, if they are offloaded."""
    return 16 * optimizer_share(config, parameters, grid) if config.optimizer.cpu_offload else 0


def save_bytes(config: RunConfig, held: Held, matrices: Parameters, grid: Grid) -> int:
    """Bytes that a rank writes of a checkpoint, which it first copies to host memory: ranks that hold the same
    parameters divide them, and the optimizer's state, whether it is distributed or not. `matrices`: see
    `muon_matrices`."""
    def share(parameters: Parameters) -> int:
        return parameters.dense // grid.dense_copies + parameters.expert // grid.expert_copies

    element = DTYPE_BYTES[config.model.dtype]
    state = saved_state_bytes(config) * share(held.trained) - 4 * share(matrices)
    return element * share(held.saved_by(config)) + state


def saved_state_bytes(config: RunConfig) -> int:
    """Bytes of a trained parameter's optimizer state in a checkpoint: two moments in float32, one of `muon_matrices`,
    and the main parameter in float32 if the model's own is not, or if the optimizer is distributed, which always saves
    it."""
    return 12 if DTYPE_BYTES[config.model.dtype] == 2 or config.optimizer.distributed else 8


def layer_activation_bytes(config: RunConfig, shape: ModelShape, adapted: AdaptedLinears | None = None) -> float:
    """Bytes that autograd keeps of one layer per token of a micro-batch, on one tensor-parallel rank.

    Adapters keep the input of their linear layer, as its weight would, and the product between their two matrices.
    """
    element, tp = DTYPE_BYTES[config.model.dtype], config.parallel.tensor_model_parallel_size
    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key = shape.num_query_groups * shape.head_dim
    # A norm keeps its input, and the linear layer its result.
    norm = 2 * element
    # The projection (which the values keep alive), attention's result, and rotated copies of queries and keys.
    attention = element * (query + 2 * key) + element * query
    if shape.rotary_base is not None:
        attention += element * (query + key)
    if shape.has_position_bias:
        # With a bias that is trained, SDPA keeps a query's weights of all keys of its text, in float32.
        attention += 4 * shape.num_attention_heads * max(config.data.max_length(role) for role in ROLES)
    if config.parallel.cp_comm_type == "a2a" and config.parallel.context_parallel_size > 1:
        attention += element * (2 * query + 2 * key)  # the same again, of the rank's heads
    if shape.qk_layernorm:
        attention += 4 * (query + key) / shape.head_dim  # a number per head, in float32
    widths = 3 if shape.gated else 2
    if shape.num_experts:
        # Tokens are copied to each of their experts (and kept as they are sent). The router's scores are float32.
        chosen = shape.experts_per_token * tp / config.parallel.expert_tensor_parallel_size
        copies = 2 if config.parallel.expert_model_parallel_size > 1 else 1
        # The first matrix's results, and the second's inputs. A gated unit is weighted without keeping more.
        mlp = chosen * element * (3 * shape.ffn_hidden_size + copies * hidden) + 12 * shape.num_experts
    else:
        mlp = element * widths * shape.ffn_hidden_size
    # Norms after attention and MLP keep their inputs; nothing keeps their results.
    norms = 2 * norm + (2 * element if shape.sublayer_norms else 0)
    kept = (norms * hidden + attention + mlp) / tp
    for name, modules in (adapted or {}).items():
        copies = shape.experts_per_token / config.parallel.expert_tensor_parallel_size if ".experts." in name else 1
        kept += copies * element * config.lora.rank * len({module for module in modules if module is not None})
    return kept


def activation_bytes(config: RunConfig, shape: ModelShape, grid: Grid, stage: int,
                     adapted: AdaptedLinears | None = None) -> int:
    """Activation bytes of all micro-batches in flight on a stage, and of the largest temporary tensors."""
    sizes = config.parallel
    pp, virtual = sizes.pipeline_model_parallel_size, sizes.virtual_pipeline_model_parallel_size or 1
    tokens = grid.micro_batch_tokens / sizes.context_parallel_size
    element = DTYPE_BYTES[config.model.dtype]
    # 1F1B: a stage has as many in flight as there are stages from it to the end; interleaving adds a share.
    in_flight = min(pp - stage, grid.num_microbatches) + (0 if virtual == 1 else (pp - 1) / virtual)
    layers = stage_layers(shape, sizes, stage)
    layer = layer_activation_bytes(config, shape, adapted) * tokens
    boundary = tokens * shape.hidden_size * element / sizes.tensor_model_parallel_size
    if config.training.recompute == "full":
        kept = in_flight * layers * boundary + layer
    else:
        kept = in_flight * layers * layer
    return int(kept + in_flight * boundary + tokens * temporary_bytes(config, shape)
               + restored_bytes(config, shape, element))


def temporary_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Bytes of a layer's largest temporary tensors per token that a rank holds, on one tensor-parallel rank: those of
    the MLP, or of attention that gathers the keys and values of all context-parallel ranks, and puts them in order."""
    sizes = config.parallel
    first = shape.ffn_hidden_size * (2 if shape.gated else 1) / sizes.tensor_model_parallel_size
    gathered = 0.0
    if sizes.context_parallel_size > 1 and sizes.cp_comm_type == "all_gather":
        keys = 2 * shape.num_query_groups * shape.head_dim / sizes.tensor_model_parallel_size
        gathered = sizes.context_parallel_size * keys
    return 2 * max(first + shape.hidden_size, gathered) * DTYPE_BYTES[config.model.dtype]


MOST_FIRST_PASS = 4
"""Micro-batches that become one for the first pass at most: larger ones fill a GPU no better."""
PIPELINE_FILL = 16
"""Micro-batches per pipeline stage that `auto` leaves the first pass: with fewer, the pipeline's bubble would be more
than a sixteenth of it."""


def first_pass_bytes(config: RunConfig, shape: ModelShape, grid: Grid, micro_batches: int) -> int:
    """Bytes of the first pass, which keeps no activations, if it embeds `micro_batches` of them as one: the states
    between two layers, and a layer's temporary tensors."""
    sizes, element = config.parallel, DTYPE_BYTES[config.model.dtype]
    tokens = grid.micro_batch_tokens * micro_batches / sizes.context_parallel_size
    states = 2 * shape.hidden_size * element / sizes.tensor_model_parallel_size
    if shape.num_experts:
        # Tokens copied to their experts: sent, received, and the experts' results.
        copies = shape.experts_per_token / sizes.expert_tensor_parallel_size
        states += 3 * copies * shape.hidden_size * element
    return int(tokens * (states + temporary_bytes(config, shape)))


def auto_first_pass(config: RunConfig, shape: ModelShape, grid: Grid) -> int:
    """Micro-batches that the first pass embeds as one on GPUs: as many as need no more memory than the activations of
    the second pass, on every stage."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    least = min(activation_bytes(config, shape, grid, stage) for stage in stages)
    return max((count for count in range(2, MOST_FIRST_PASS + 1)
                if first_pass_bytes(config, shape, grid, count) <= least), default=1)


def first_pass_micro_batches(config: RunConfig, shape: ModelShape, grid: Grid) -> int:
    """Micro-batches that the first pass of a run on GPUs embeds as one."""
    if not config.workload.couples_batch or config.has_dropout or config.model.scales_by_micro_batch:
        return 1
    asked = config.training.first_pass_micro_batches
    return auto_first_pass(config, shape, grid) if asked == "auto" else asked


SHARE_FOR_KEPT = 0.9
"""Share of a GPU's memory that a run may need which keeps activations for the second pass, since they are an
estimate."""


def kept_tokens(config: RunConfig, shape: ModelShape, grid: Grid, spare: float,
                adapted: AdaptedLinears | None = None, *, on_cpu: bool = False) -> int:
    """Tokens of a data-parallel rank whose activations fit into `spare` bytes of each of its ranks, without a
    pipeline; `on_cpu`: with the probabilities that attention keeps there."""
    each = activation_bytes(config, shape, grid, 0, adapted)
    each += probability_bytes(config, shape) * grid.micro_batch_tokens if on_cpu else 0
    return max(0, int(spare / (each * (1 + FRAGMENTATION)) * grid.micro_batch_tokens))


def probability_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of attention's probabilities per token of a rank's layers that CPU ranks keep (sequence_attention.py), at
    most."""
    if config.training.recompute != "none":
        return 0
    longest = min(SHORT_SEQUENCE, max(config.data.max_length("query"), config.data.max_length("document")))
    return 4 * shape.num_layers * shape.num_attention_heads * longest // config.parallel.tensor_model_parallel_size


MAXSIM_TILES = 6
"""Tiles that late interaction's loss holds at once, as tools/bench_multi_vector.py measures them."""


JOINT_TILES = MAXSIM_TILES + 6
"""The same of joint heads' loss: besides, three scores of all documents, their sum and what they are multiplied by."""


def loss_bytes(config: RunConfig, shape: ModelShape, grid: Grid, stage: int) -> int:
    """Loss bytes, on the last stage: this rank's embeddings, all documents and their gradient, one tile; documents that
    are rounded three times more, with what their rounding computes. Of a multi-vector model, this rank's vectors and
    their gradient, and tiles of similarities, scores and documents; of a sparse model see `sparse_loss_bytes`.

    A reranker's scores are negligible.
    """
    queries, documents = config.training.global_batch_size, config.workload.gathered_documents
    if stage != config.parallel.pipeline_model_parallel_size - 1 or not documents:
        return 0
    width = 4 * vector_width(config, shape)
    if gives_sparse_vectors(config):
        return sparse_loss_bytes(config, shape, grid)
    if gives_token_vectors(config):
        before = dense_rows(config, shape)
        vectors = sum(count * (tokens + before) for count, tokens in config.workload.texts_per_query)
        tiles = MAXSIM_TILES if not before else JOINT_TILES
        return vectors * queries // grid.dp * width * 2 + tiles * 4 * MAXSIM_TILE_ELEMENTS
    own = (queries + documents) // grid.dp * width * 2
    copies = 3 if config.embedding.precision == ("float32",) else 6
    return own + copies * documents * width + 8 * min(LOSS_TILE_ELEMENTS, queries // grid.dp * documents)


def sparse_loss_bytes(config: RunConfig, shape: ModelShape, grid: Grid) -> int:
    """Bytes of a sparse model's loss and of its head's tiles, on the last stage.

    This rank's vectors of its share of the vocabulary with their gradient, tiles of documents and scores; a
    micro-batch's winners and slopes, tiles of logits and of their gradient, and the gradient of the head's weight, in a
    pipeline also a copy of it.
    """
    sizes, training = config.parallel, config.training
    share = padded_vocabulary(shape.vocab_size, sizes.tensor_model_parallel_size) // sizes.tensor_model_parallel_size
    texts = sum(count for count, _ in config.workload.texts_per_query)
    own = training.global_batch_size * texts // grid.dp
    micro = -(-own // grid.num_microbatches)
    weight = 4 * share * shape.hidden_size * (
        2 if shape.tie_word_embeddings and sizes.pipeline_model_parallel_size > 1 else 1)
    return (own * share * 4 * 2 + MAXSIM_TILES * 4 * MAXSIM_TILE_ELEMENTS + micro * share * 4 * 4
            + 2 * 4 * LOGIT_TILE_ELEMENTS + weight)


def stage_memory(config: RunConfig, shape: ModelShape, grid: Grid, stage: int,
                 adapted: AdaptedLinears | None = None) -> Memory:
    """Memory of a rank of pipeline stage `stage`. `adapted`: linear layers whose adapters are trained."""
    held, matrices = held_parameters(config, shape, stage, adapted), muon_matrices(config, shape, stage)
    known = {
        "parameters": DTYPE_BYTES[config.model.dtype] * held.total - stage_layers(shape, config.parallel, stage)
        * bytes_saved(config, shape, DTYPE_BYTES[config.model.dtype]),
        "gradients": 4 * held.trained.total,
        "optimizer": optimizer_bytes(config, held.trained, grid) - 4 * matrices.total,
        "activations": _activations_of_both_passes(config, shape, grid, stage, adapted),
        "loss": loss_bytes(config, shape, grid, stage)}
    return Memory(**known, reserve=RESERVE_BYTES + int(FRAGMENTATION * sum(known.values())),
                  host=host_bytes(config, held.trained, grid), save=save_bytes(config, held, matrices, grid))


def _activations_of_both_passes(config: RunConfig, shape: ModelShape, grid: Grid, stage: int,
                                adapted: AdaptedLinears | None) -> int:
    """Most bytes of activations in a step: those of the second pass, or of the first one beside what a set
    `training.keep_activations` keeps. `auto` fills what is left, and is not counted."""
    asked = config.training.keep_activations
    kept = 0 if asked == "auto" else min(asked, grid.num_microbatches)
    each = activation_bytes(config, shape, grid, stage, adapted)
    first = first_pass_bytes(config, shape, grid, first_pass_micro_batches(config, shape, grid))
    return max(each, kept * each + (first if kept < grid.num_microbatches else 0))


def worst_stage(config: RunConfig, shape: ModelShape, grid: Grid,
                adapted: AdaptedLinears | None = None) -> tuple[int, Memory]:
    """(the pipeline stage whose ranks need most memory, that memory)."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    memory = ((stage, stage_memory(config, shape, grid, stage, adapted)) for stage in stages)
    return max(memory, key=lambda item: item[1].total)
