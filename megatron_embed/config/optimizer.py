"""Section `optimizer`: where its state is kept, and which communication overlaps with computation."""

from dataclasses import dataclass
from typing import Literal

from megatron_embed.config.require import require
from megatron_embed.names import OptimizerName


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: OptimizerName = "adamw"
    """What updates the parameters. adamw_8bit: AdamW with both moments in 8 bits, by bitsandbytes (arXiv:2110.02861): 2
    bytes per parameter instead of 8 beside the main parameter; tensors of less than 4096 elements keep 32 bits. Needs
    `distributed`. Checkpoints are those of adamw. muon: Muon (torch.optim.Muon, scaled so that
    training.learning_rate and weight_decay are AdamW's) on the linear layers' matrices, AdamW on the rest: 4 bytes of
    state instead of 8 per element of a matrix. Tensor-parallel ranks gather each update, in bfloat16, and all compute
    the whole. Needs `distributed: false` and no adapters."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool | Literal["auto"] = "auto"
    """Reduce gradients over the data-parallel ranks in buckets of 40 million (or a million per rank), each as soon as
    the backward pass of the step's last micro-batch has filled it; otherwise all at once after that pass. `auto`: on
    GPUs, unless the yes and no of a reranker's head are rows of the word embeddings."""
    overlap_param_gather: bool | Literal["auto"] = "auto"
    """With overlap_grad_reduce and `distributed`: gather updated parameters bucket by bucket during the next step's
    first forward pass; otherwise all at once after the update. Only embedding models without adapters. `auto`: on GPUs,
    where these conditions hold."""
    cpu_offload: bool = False
    """Keep float32 main parameters and moments in host memory and update them there: 16 bytes on the host per parameter
    of a rank's share instead of 12 on the GPU, and a slower update. Needs a GPU, `distributed` and bfloat16."""
    precision_aware: bool = False
    """Keep Adam's first moment in bfloat16, with Transformer Engine's FusedAdam: 10 bytes per parameter instead of 12.
    The second moment stays in float32, since in bfloat16 it could not decrease at adam_beta2 0.999. Needs a GPU,
    `distributed` and bfloat16."""

    def __post_init__(self) -> None:
        require(self.overlap_param_gather is not True or self.distributed, "optimizer.overlap_param_gather",
                self.overlap_param_gather, "nothing is gathered where every rank updates all parameters; set "
                "optimizer.distributed: true, or this to false")
        # `auto` is off on a CPU.
        require(self.overlap_param_gather is not True or self.overlap_grad_reduce is True,
                "optimizer.overlap_param_gather", self.overlap_param_gather, "it needs the buckets of "
                "optimizer.overlap_grad_reduce; set that to true too, or this to false")
        require(self.name != "adamw_8bit" or self.distributed, "optimizer.name", self.name, "its moments are saved as "
                "the distributed optimizer's are; set optimizer.distributed: true, or this to adamw")
        require(self.name != "muon" or not self.distributed, "optimizer.name", self.name, "it needs whole matrices, "
                "and the distributed optimizer cuts them; set optimizer.distributed: false, or this to adamw")
        for key, on in self._placement.items():
            require(not on or self.name == "adamw", f"optimizer.{key}", on, f"it is for float32 moments, and "
                    f"optimizer.name is {self.name}; set that to adamw, or this to false")
            require(not on or self.distributed, f"optimizer.{key}", on, "Megatron has it only for the distributed "
                    "optimizer; set optimizer.distributed: true, or this to false")
        require(not self.precision_aware or not self.cpu_offload, "optimizer.precision_aware", self.precision_aware,
                "optimizer.cpu_offload keeps float32 in host memory; set one of them to false")

    @property
    def _placement(self) -> dict[str, bool]:
        """The settings of where the state is kept, and in which dtype."""
        return {"cpu_offload": self.cpu_offload, "precision_aware": self.precision_aware}

    def check_against(self, *, has_head: bool, dtype: str, lora_rank: int) -> None:
        """Raises ConfigError if the rest of the run is not compatible with these settings."""
        require(self.name != "muon" or not lora_rank, "optimizer.name", self.name, "adapters are no matrices of the "
                "model; set this to adamw, or lora.rank to 0")
        for key, on in self._placement.items():
            require(not on or dtype != "float32", f"optimizer.{key}", on, f"a model in model.dtype: {dtype} has no "
                    "other main parameters; set that to bfloat16, or this to false")
        require(self.overlap_param_gather is not True or not (has_head or lora_rank),
                "optimizer.overlap_param_gather", self.overlap_param_gather, OWN_READERS)


OWN_READERS = ("parameters of adapters and of a head are read without a call of the module that holds them, "
               "so nothing would wait for their gather; set it to false")
