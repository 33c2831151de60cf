"""Settings of the section model: type, unit, range and default."""

from dataclasses import dataclass
from typing import Literal

from megatron_embed.config.require import require
from megatron_embed.names import Fp8Passes, Fp8Recipe, LayerBackend, MatmulLibrary, ModelDtype, Quantization


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Hugging Face directory, a checkpoint of megatron-embed, or a hub name."""
    attention: Literal["auto", "te", "flash", "sdpa"] = "auto"
    """auto: flash in half precision on a GPU whose torch has its operators, otherwise sdpa. flash: torch's
    variable-length flash kernels (GPU), FlashAttention 3 where torch has it. te: Transformer Engine's (GPU), without
    dropout and context parallelism. sdpa: torch's scaled_dot_product_attention over groups of sequences of similar
    length (also on CPUs, in float32 there). With model.backend te, auto is te where that can run."""
    backend: Literal["auto", LayerBackend] = "auto"
    """Whose kernels compute norms, linear layers and activations. te: Transformer Engine's (GPU, bfloat16). torch:
    torch's. auto: te where it is installed and can run. Checkpoints and exports are the same."""
    fp8: Fp8Passes = "none"
    """Multiply in FP8 in linear layers, with Transformer Engine, in the first pass of a training step (which only needs
    embeddings for the loss) or in both: faster, and an approximation (docs/transformer_engine.md). Evaluation and
    everything outside training compute in bfloat16."""
    fp8_recipe: Fp8Recipe = "blockwise"
    """Scaling of FP8 numbers, by their current values. blockwise: a factor for every 128 numbers of a token, so that a
    text's embedding does not depend on its neighbours (GPUs from H100, CUDA 12.9). tensorwise: one factor per tensor
    (from Ada, CUDA 12.1); with fp8: both, the passes then have the same micro-batches."""
    bidirectional: bool = False
    """True: every token of a decoder attends to the whole sequence. Encoder families always do."""
    dtype: Literal["auto", ModelDtype] = "auto"
    """Dtype of parameters and activations; the optimizer keeps float32 main parameters either way. auto: bfloat16 on
    GPUs and on processors with instructions for it (AVX512-BF16, AMX-BF16 or ARM's, unless ATEN_CPU_CAPABILITY,
    ONEDNN_MAX_CPU_ISA or MKL_ENABLE_INSTRUCTIONS disables them), if every rank has them; otherwise float32. A resumed
    run keeps the dtype of its checkpoint. bfloat16 on another processor: products are computed in float32."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """auto: on GPUs with Triton, which comes with torch there, norms, residual additions, rotary positions, gated
    activations and the addition of weight gradients to their float32 buffer are one kernel each. off: torch's plain
    operators, which compute the same and move about five times the memory."""
    cpu_matmul: tuple[MatmulLibrary, ...] | None = None
    """Libraries of the float32 matrix products of CPU ranks, for the forward pass, the gradient of the input and that
    of the weight; torch: its own choice, MKL on x86. null: the fastest of each, measured on rank 0 when training starts
    (a fifth of a second; onednn for matrices below 65,536 elements); a resumed run keeps its checkpoint's. `encode`,
    `evaluate` and others compute with those of a checkpoint, and take this setting too."""

    quantization: Quantization = "none"
    """Hold the frozen weights of the layers' linears in 4 bits (nf4: Dettmers et al. 2023, arXiv:2305.14314) or 8 bits
    (int8: a scale for each row) by bitsandbytes, and restore each for its products, forward and backward. Only with
    adapters (section lora). Checkpoints then hold the adapters, and the path and fingerprint of the base model."""
    double_quantization: bool = True
    """With nf4: hold the scales of its blocks of 64 weights in 8 bits, too: 4.13 bits per weight instead of 4.5."""

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", self.path, "must name a model directory")
        matmul = self.cpu_matmul
        require(matmul is None or len(matmul) == 3, "model.cpu_matmul", list(matmul or ()), "must be null or three "
                "libraries, of the forward pass, the gradient of the input and that of the weight")

    @property
    def scales_by_micro_batch(self) -> bool:
        """Whether an embedding depends on its micro-batch in both passes, which then need the same ones."""
        return self.fp8 == "both" and self.fp8_recipe == "tensorwise"
