"""Section `optimizer`: where its state lies, and what is communicated behind the computation."""

from dataclasses import dataclass

from megatron_embed.config.checks import require


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks in buckets of 40 million (or a million per rank), each as soon as
    the backward pass of the step's last micro-batch has filled it; else all at once after that pass."""
    overlap_param_gather: bool = False
    """With overlap_grad_reduce and `distributed`: gather updated parameters bucket by bucket while the next step's
    first forward pass computes; else all at once after the update. Embedding models without adapters."""
    cpu_offload: bool = False
    """Keep float32 main parameters and moments in host memory and update them there: of a rank's share 16 bytes per
    parameter on the host instead of 12 on the GPU, and a slower update. GPU, `distributed`, bfloat16."""
    precision_aware: bool = False
    """Keep Adam's first moment in bfloat16, with Transformer Engine's FusedAdam: 10 bytes per parameter instead of 12.
    The second stays in float32: at adam_beta2 0.999 one in bfloat16 could not fall. GPU, `distributed`, bfloat16."""

    def __post_init__(self) -> None:
        require(not self.overlap_param_gather or self.distributed, "optimizer.overlap_param_gather",
                self.overlap_param_gather, "nothing is gathered where every rank updates all parameters; set "
                "optimizer.distributed: true, or this to false")
        require(not self.overlap_param_gather or self.overlap_grad_reduce, "optimizer.overlap_param_gather",
                self.overlap_param_gather, "parameters lie in the buckets of gradients, of which there is one without "
                "optimizer.overlap_grad_reduce; set that to true too, or this to false")

        for key, on in self._placement.items():
            require(not on or self.distributed, f"optimizer.{key}", on, "Megatron has it for the distributed optimizer "
                    "alone; set optimizer.distributed: true, or this to false")
        require(not self.precision_aware or not self.cpu_offload, "optimizer.precision_aware", self.precision_aware,
                "what optimizer.cpu_offload keeps in host memory is float32; set one of them to false")

    @property
    def _placement(self) -> dict[str, bool]:
        """The settings that say where the state lies, and in what."""
        return {"cpu_offload": self.cpu_offload, "precision_aware": self.precision_aware}

    def check_against(self, *, has_head: bool, dtype: str, lora_rank: int) -> None:
        """Raises ConfigError where the rest of the run does not go with these settings."""
        for key, on in self._placement.items():
            require(not on or dtype != "float32", f"optimizer.{key}", on, f"a model in model.dtype: {dtype} has no "
                    "other main parameters; set that to bfloat16, or this to false")
        require(not self.overlap_param_gather or not (has_head or lora_rank),
                "optimizer.overlap_param_gather", self.overlap_param_gather, OWN_READERS)


OWN_READERS = ("parameters of adapters and of a reranker's head are read without a call of the module that holds them, "
               "so nothing would wait for their gather; set it to false")
