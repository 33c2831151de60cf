"""One training step of a full-size model on fake tensors: memory, launches, bytes, FLOPs, copies and waits.

Shapes, dtypes and devices of every tensor are real, their values do not exist: eight billion parameters take no memory.
The model, its gradient buffers, the optimizer and both passes are the product's, for rank 0 of a layout of any size.
Needs the pretend device: a CPU build of torch alone aborts at the first matrix product with a gradient.
"""

import collections
import contextlib
import dataclasses
import importlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_embed.batch import MicroBatch, StepBatch
from megatron_embed.checkpoint.load import model_state
from megatron_embed.checkpoint.optimizer_slices import PREFIX
from megatron_embed.checkpoint.optimizer_state import optimizer_to_save
from megatron_embed.config.schema import RunConfig
from megatron_embed.kernels.operators import NAMESPACE
from megatron_embed.models.encoder import EmbeddingModel, attention_kernel, build_model, to_device
from megatron_embed.models.families import ModelShape
from megatron_embed.objectives.base import LossGradient, Objective, Sums
from megatron_embed.parallel.device_copy import copy_to_host
from megatron_embed.parallel.topology import Topology, initialize, token_alignment
from megatron_embed.planning.memory import Memory, activation_bytes, grid_of, stage_memory
from megatron_embed.planning.shapes import shape_of
from megatron_embed.platform import compat
from megatron_embed.platform.weight_gradient import products_can_accumulate
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.optimizer import build_optimizer, squared_norms, update, wrap_in_ddp
from tests.helpers import te_regions, te_stand_in
from tests.pretend_cuda.balanced_experts import balanced_experts
from tests.pretend_cuda.waits import Wait, record, recorded

NO_KERNEL = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_",
             "_reshape_alias", "lift_fresh")
"""Operators that start nothing on the GPU, besides views."""
COLLECTIVES = ("c10d", "_c10d_functional")
# An operator of the product's own is one launch: `tests/kernels/test_triton.py` counts its Triton kernel's.


@dataclass(kw_only=True)
class Work:
    """What one part of a step asks of the GPU, and the host of it."""

    products: int = 0
    """Launches of matrix products and attention."""
    others: int = 0
    """Launches of everything else but collectives."""
    collectives: int = 0
    flops: int = 0
    product_bytes: int = 0
    """Bytes of the arguments and results of products, of the others, and those that collectives send from this rank."""
    other_bytes: int = 0
    collective_bytes: int = 0
    peak: int = 0
    """Most bytes of live tensors."""
    by_operator: collections.Counter[str] = field(default_factory=collections.Counter)
    """Bytes of the others."""
    waits: collections.Counter[Wait] = field(default_factory=collections.Counter)


@dataclass(frozen=True, kw_only=True)
class SaveCounts:
    """Host memory of rank 0 during a save, in bytes of tensors."""

    share: int
    """What the rank writes."""
    kept: int
    """Held until it is written."""
    peak: int


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Counts of rank 0. Passes and `to_device` are of one micro-batch, `optimizer` and `data parallel`, the gathering
    of parameters and the reduction of gradients during the passes, of a step."""

    tokens: int
    """Tokens of the micro-batch, over its context-parallel ranks."""
    layers: int
    resident: int
    """Bytes before the first micro-batch: parameters, gradients, optimizer state."""
    planned: Memory
    """What `plan` says of this rank, its activations for this number of tokens."""
    work: dict[str, Work]
    save: "SaveCounts | None" = None

    @property
    def activations(self) -> int:
        """Bytes of the second pass, at most, besides the resident ones."""
        return self.work["pass 2"].peak - self.resident

    @property
    def peak(self) -> int:
        return max(work.peak for work in self.work.values())


class Meter(TorchDispatchMode):
    """Counts every operator under the part of the step that runs, and the bytes of live device tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = collections.defaultdict(Work)
        self.part = "build"
        self.live = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, work = kwargs or {}, self.work[self.part]
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self._wait("read back")
            # Fake tensors have no values: any finite one of its type.
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._track(tensor)
        work.peak = max(work.peak, self.live)
        if te_regions.depth:
            return result
        if func.namespace in COLLECTIVES:
            work.collectives += 1
            # A gather or a scatter has a whole and a share of it, and sends all but the share.
            sizes = sorted(map(_bytes, inputs))
            work.collective_bytes += sizes[-1] - (sizes[0] if len(sizes) > 1 else 0) if sizes else 0
        elif func.namespace in ("aten", NAMESPACE):
            # The dtype of a product's result is none of the formula's arguments.
            shapes = [value for value in args if not isinstance(value, torch.dtype)]
            self._count(func, inputs, outputs, lambda: flop_registry[func._overloadpacket](
                *shapes, **kwargs, out_val=result))
        return result

    def _count(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], flops: Callable[[], int]) -> None:
        work, devices = self.work[self.part], {tensor.device.type for tensor in (*inputs, *outputs)}
        name = func._opname
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self._wait("copy to device" if outputs[0].device.type == "cuda" else "copy to host")
        if "cuda" not in devices or name in NO_KERNEL or func.is_view or _is_view(func, inputs, outputs):
            return
        size = sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in (*inputs, *outputs)}.values())
        if func._overloadpacket in flop_registry:
            work.products += 1
            work.product_bytes += size
            work.flops += flops()
        else:
            work.others += 1
            work.other_bytes += size
            work.by_operator[name] += size

    def count_region(self, name: str, launches: int, tensors: list[Tensor]) -> None:
        """Count the kernels of a stand-in for Transformer Engine."""
        work, size = self.work[self.part], sum(map(_bytes, tensors)) if launches else 0
        work.others += launches
        work.other_bytes += size
        work.by_operator[name] += size

    def _wait(self, kind: str) -> None:
        with recorded() as events:
            record(kind, "")
        self.work[self.part].waits.update(events)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, storage: int) -> None:
        self.live -= self._storages.pop(storage, 0)


class HostBytes(TorchDispatchMode):
    """Bytes of the host's tensors that operators make: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, storage: int) -> None:
        self.live -= self._storages.pop(storage)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.device.type == "cuda" else 0


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether all that an operator returns lies in its inputs' storages and it writes nothing."""
    held = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(inputs and outputs) and not func._schema.is_mutable and all(
        tensor.untyped_storage()._cdata in held for tensor in outputs)


class NoLoss(Objective[Any]):
    """Stands in for a loss: a gradient of ones. Its own work is that of embeddings, small beside a model's."""

    names, couples_batch, learned = ("loss",), True, None

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def total(self, batch: Any) -> float:
        return 1.0

    def split(self, batch: Any) -> Any:
        raise NotImplementedError

    def __call__(self, embeddings: Tensor, batch: Any, *, total: float) -> LossGradient:
        self.meter.part = "pass 2"
        values = torch.ones(1, 2, dtype=torch.float64, device=embeddings.device)
        return LossGradient(sums=Sums(names=self.names, values=values), embeddings=torch.ones_like(embeddings))


def longest_micro_batch(config: RunConfig) -> MicroBatch:
    """A micro-batch of the settings' longest texts, on the host; under a token budget, documents that fill it."""
    budget, longest = config.training.micro_batch_tokens, config.data.document_max_length
    assert longest is not None and config.data.query_max_length is not None
    if budget is None:
        texts = config.training.micro_batch_size
        sizes = [config.data.query_max_length] * texts + [longest] * (texts * (1 + config.data.num_negatives))
    else:
        sizes = [longest] * (budget // longest) + [budget % longest] * (budget % longest > 0)
    lengths = torch.tensor(sizes)
    real = int(lengths.sum())
    padding = -real % token_alignment(config.parallel)
    positions = [torch.arange(int(length)) for length in lengths] + [torch.zeros(padding, dtype=torch.int64)]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    return MicroBatch(token_ids=torch.randint(1000, (real + padding,)), position_ids=torch.cat(positions),
                      cu_seqlens=bounds, rows=torch.arange(len(lengths)))


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """This process as rank 0 of many: collectives return at once and leave their output as it is."""
    new_group = dist.new_group

    def all_gather_object(results: list[Any], value: Any, group: Any = None) -> None:
        results[:] = [value] * len(results)

    @contextlib.contextmanager
    def one_by_one(group: Any = None, **kwargs: Any) -> Iterator[Any]:
        yield mock.Mock(name="work")  # fake tensors know no coalesced collectives; each is done when it returns

    with contextlib.ExitStack() as stack:
        buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
        stack.enter_context(mock.patch.object(buffers, "_coalescing_manager", one_by_one))
        stack.enter_context(mock.patch.object(
            dist, "new_group", lambda *args, **kwargs: new_group(*args, **kwargs | {"backend": None})))
        stack.enter_context(mock.patch.object(dist, "all_gather_object", all_gather_object))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        yield


@contextlib.contextmanager
def data_parallel_apart(meter: Meter) -> Iterator[None]:
    """Count what happens once in a step, though during a pass, as a part of its own."""
    groups = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")._ParamAndGradBucketGroup

    def apart(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            meter.part, part = "data parallel", meter.part
            try:
                return method(*args, **kwargs)
            finally:
                meter.part = part

        return call

    names = ("start_param_sync", "start_grad_sync", "finish_grad_sync")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(groups, name, apart(vars(groups)[name])))
        yield


@contextlib.contextmanager
def fakes_as_on_cuda() -> Iterator[None]:
    """Give fake tensors what they lack beside real ones: the name of their type, RMSNorm's kernel, `Module.to`."""
    type_of = Tensor.type

    def named(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_of(tensor, *args, **kwargs)
        is_missing = isinstance(name, str) and tensor.device.type == "cuda" and ".cuda." not in name
        return name.replace("torch.", "torch.cuda.", 1) if is_missing else name

    def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None,
                 eps: float | None = None) -> tuple[Tensor, Tensor]:
        rows = (*x.shape[:-len(shape)], *[1] * len(shape))
        return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)

    def rms_norm_backward(gradient: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None,
                          mask: list[bool]) -> tuple[Tensor, Tensor | None]:
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)

    def to(model: EmbeddingModel, device: torch.device, dtype: torch.dtype) -> EmbeddingModel:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if (parameter.device, parameter.dtype) != (device, dtype):
                    moved = torch.nn.Parameter(parameter.detach().to(device, dtype), parameter.requires_grad)
                    for key, mark in vars(parameter).items():  # Megatron's marks; a fake has its device there as well
                        vars(moved).setdefault(key, mark)
                    module.register_parameter(name, moved)
        return model

    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm", rms_norm, "CUDA")
    library.impl("_fused_rms_norm_backward", rms_norm_backward, "CUDA")
    with mock.patch.object(Tensor, "type", named), mock.patch.object(EmbeddingModel, "to", to):
        yield


def as_fake(value: Any, fake: FakeTensorMode) -> Any:
    """The value with fake tensors in place of real ones."""
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return fake.from_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = object.__new__(type(value))
        for name, field_value in vars(value).items():
            object.__setattr__(made, name, as_fake(field_value, fake))
        return made
    if type(value) in (tuple, list):
        return type(value)(as_fake(item, fake) for item in value)
    return value


@contextlib.contextmanager
def shards_of_all_ranks(topology: Topology) -> Iterator[None]:
    """Within it the ranks between which a save is divided tell each other what they hold: those that hold rank 0's
    parameters these, and as much of the optimizer's state as rank 0; the others nothing that rank 0 has."""
    strategies = importlib.import_module("megatron.core.dist_checkpointing.strategies.fully_parallel")
    copies = dist.get_process_group_ranks(topology.groups.dp_cp)

    def of_rank(rank: int, shards: list[Any]) -> list[Any]:
        return [shard if not shard.key.startswith(PREFIX) else dataclasses.replace(shard, key=f"{shard.key} of {rank}")
                for shard in shards]

    def all_gather_object(results: list[Any], value: Any, group: Any = None) -> None:
        results[:] = [value if rank == 0 else of_rank(rank, value) if rank in copies else []
                      for rank in range(len(results))]

    with (mock.patch.object(dist, "all_gather_object", all_gather_object),
          mock.patch.object(strategies, "validate_sharding_integrity")):
        yield


def save(chunks: list[EmbeddingModel], optimizer: compat.MegatronOptimizer, topology: Topology) -> SaveCounts:
    """What checkpoint/save.py copies to host memory before Megatron writes it: nothing of a GPU is the optimizer's in
    host memory, so there is nothing to copy once more behind the steps."""
    checkpoints = "megatron.core.dist_checkpointing"
    preprocess = importlib.import_module(f"{checkpoints}.state_dict_utils").save_preprocess
    writer = importlib.import_module(f"{checkpoints}.strategies.filesystem_async").FileSystemWriterAsync
    with HostBytes() as host, shards_of_all_ranks(topology):
        model = model_state(chunks)
        sharded, _ = preprocess({"model": model, "optimizer": optimizer_to_save(optimizer, model)}, False)
        compat.parallel_save().apply_saving_parallelization(sharded)
        own = [shard.data for shard in compat.nested_values(sharded) if isinstance(shard, compat.ShardedTensor)
               and compat.is_main_replica(shard.replica_id)]
        on_host = writer.preload_tensors([("file", "key", ([], [(None, tensor) for tensor in own]))], True)
        counts = SaveCounts(share=sum(tensor.nbytes for tensor in own), kept=host.live, peak=host.peak)
    del on_host
    return counts


def count_step(config: RunConfig, world_size: int, micro_batch: MicroBatch | None = None,
               layers: int | None = None, *, saves: bool = False) -> StepCounts:
    """Counts of rank 0 of `world_size`, for one micro-batch, by default of the longest texts. Once per process.

    Args:
        layers: of the model; None: all. Experts get equally many rows.
        saves: whether the state is saved after the step; without experts, whose copies are on other ranks.
    """
    shape = shape_of(config.model.path)
    shape = dataclasses.replace(shape, num_layers=layers or shape.num_layers)
    products_can_accumulate()  # tried with real numbers, once
    engine = te_stand_in.usable() if config.model.backend == "te" else contextlib.nullcontext()
    with engine, fake_ranks(world_size), fakes_as_on_cuda(), balanced_experts():
        topology = initialize(config.parallel)
        assert not saves or not shape.num_experts, "copies of experts are on other ranks"
        assert topology.pp_size == 1, "a stage would wait for the others' shapes"
        compat.model_parallel_cuda_manual_seed(1)
        micro_batch, kernel = micro_batch or longest_micro_batch(config), attention_kernel(config)
        with recorded() as copies:  # real tensors: their sizes and bounds are values
            batch = to_device(micro_batch, topology, config.embedding.pooling, kernel=kernel,
                              causal=not shape.bidirectional, shape=shape)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with (fake, Meter() as meter, data_parallel_apart(meter),
              mock.patch.object(te_regions, "listener", meter.count_region)):
            resident, counts = _run(config, shape, topology, as_fake(batch, fake), meter, saves=saves)
    meter.work["to_device"].waits.update(copies)
    grid = grid_of(config, world_size)
    planned = stage_memory(config, shape, grid, 0)
    tokens = micro_batch.token_ids.numel()
    activations = activation_bytes(config, shape, dataclasses.replace(grid, micro_batch_tokens=tokens), 0)
    return StepCounts(tokens=tokens, layers=shape.num_layers, resident=resident, work=dict(meter.work), save=counts,
                      planned=dataclasses.replace(planned, activations=activations))


def _run(config: RunConfig, shape: ModelShape, topology: Topology, batch: Any, meter: Meter, *,
         saves: bool) -> tuple[int, SaveCounts | None]:
    """Both passes over one micro-batch, the update, and a save. Returns the resident bytes before, and the save's."""
    chunks = build_model(config, shape, topology, config.embedding.pooling)
    for chunk in chunks:
        chunk.train()
    wrapped = wrap_in_ddp(chunks, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    compat.initialize_optimizer_state(optimizer)
    cache = GradCache(chunks=wrapped, models=chunks, topology=topology, objective=NoLoss(meter),
                      kernel=attention_kernel(config), has_dropout=False)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    resident = meter.live
    meter.part = "pass 1"
    cache.two_pass(StepBatch(micro_batches=(), num_truncated=0), [batch])
    meter.part = "optimizer"
    update(optimizer, copy_to_host(*squared_norms(optimizer)), loss=1.0)
    meter.part = "save"
    return resident, save(chunks, optimizer, topology) if saves else None
