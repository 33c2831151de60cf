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

    def __post_init__(self) -> None:
        require(not self.overlap_param_gather or self.distributed, "optimizer.overlap_param_gather",
                self.overlap_param_gather, "nothing is gathered where every rank updates all parameters; set "
                "optimizer.distributed: true, or this to false")
        require(not self.overlap_param_gather or self.overlap_grad_reduce, "optimizer.overlap_param_gather",
                self.overlap_param_gather, "parameters lie in the buckets of gradients, of which there is one without "
                "optimizer.overlap_grad_reduce; set that to true too, or this to false")

    def check_against(self, *, task: str, lora_rank: int) -> None:
        """Raises ConfigError where the rest of the run does not go with these settings."""
        require(not self.overlap_param_gather or (task == "embedding" and not lora_rank),
                "optimizer.overlap_param_gather", self.overlap_param_gather, OWN_READERS)


OWN_READERS = ("parameters of adapters and of a reranker's head are read without a call of the module that holds them, "
               "so nothing would wait for their gather; set it to false")
