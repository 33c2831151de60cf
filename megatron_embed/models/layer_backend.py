"""Whose kernels a model's layers are made of: Transformer Engine's or torch's; refused where they cannot run."""

from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.names import Fp8Recipe, LayerBackend
from megatron_embed.platform.compat import HAS_CUDA, HAS_TRANSFORMER_ENGINE, get_te_version

OLDEST_VERSION = (2, 3)
"""Release of Transformer Engine from which both FP8 recipes are there; as in setup.py."""
FP8_WIDTH = 16
"""Every dimension of a matrix that is multiplied in FP8 is a multiple of it."""
EXPERT_WIDTH = "width of an expert"


def layer_backend(config: RunConfig) -> LayerBackend:
    """The backend that `model.backend` names, or for auto the one that can run here. No communication.

    Raises:
        ConfigError: te, model.fp8 or parallel.tp_comm_overlap is asked for and Transformer Engine cannot run here; the
            same on every rank with the same packages.
    """
    wanted, reason = config.model.backend, _why_not(config)
    if wanted != "torch" and reason is None:
        return "te"
    if wanted == "te":
        raise ConfigError(f"model.backend = 'te': {reason}; use 'auto' or 'torch' here", key="model.backend")
    if config.model.fp8 != "none":
        raise ConfigError(f"model.fp8 = {config.model.fp8!r} needs Transformer Engine: {reason}; use 'none' here",
                          key="model.fp8")
    if config.parallel.tp_comm_overlap:
        raise ConfigError(f"parallel.tp_comm_overlap = True needs Transformer Engine: {reason}; set it to false here",
                          key="parallel.tp_comm_overlap")
    return "torch"


def check_layer_backend(config: RunConfig, shape: ModelShape) -> None:
    """Raises ConfigError, before the first collective, if the layers cannot run as asked; see `layer_backend`."""
    if layer_backend(config) == "torch" or config.model.fp8 == "none":
        return
    fp8, recipe = config.model.fp8, config.model.fp8_recipe
    reason = _why_no_fp8(recipe)
    if reason is not None:
        other = "use 'none'" if recipe == "tensorwise" else "use 'none', or try model.fp8_recipe = tensorwise"
        raise ConfigError(f"model.fp8 = {fp8!r} with model.fp8_recipe = {recipe!r}: {reason}; {other}", key="model.fp8")
    for what, width in _widths(shape, config.parallel).items():
        if width % FP8_WIDTH:
            raise ConfigError(f"model.fp8 = {fp8!r}: a rank's {what} is {width}, which is not a multiple of "
                              f"{FP8_WIDTH}; use 'none', or fewer parallel.{_splits(what)}", key="model.fp8")


def _why_not(config: RunConfig) -> str | None:
    """The reason against Transformer Engine's layers here; None: they can be used."""
    if not HAS_CUDA:
        return "it needs a GPU"
    if config.model.quantization != "none":
        return "its layers hold no quantized weights"
    if not HAS_TRANSFORMER_ENGINE:
        return "it is not installed (pip install 'megatron_embed[gpu]')"
    version = get_te_version()
    if (version.major, version.minor) < OLDEST_VERSION:
        return f"version {version} is older than {'.'.join(map(str, OLDEST_VERSION))}"
    if config.model.dtype == "float32":
        # transformer_engine/common/gemm/cublaslt_gemm.cu, CUBLAS_COMPUTE_32F_FAST_TF32 for three float32 matrices.
        return "it multiplies float32 matrices in TF32, and model.dtype is float32"
    return None


def _why_no_fp8(recipe: Fp8Recipe) -> str | None:
    """The reason why this machine cannot multiply FP8 numbers that are scaled so; None: it can."""
    from transformer_engine.pytorch.fp8 import check_fp8_block_scaling_support, check_fp8_support

    check = check_fp8_block_scaling_support if recipe == "blockwise" else check_fp8_support
    supported, reason = check()
    return None if supported else reason.rstrip(".")


def _widths(shape: ModelShape, sizes: ParallelConfig) -> dict[str, int]:
    """The widths of the matrices that a rank multiplies."""
    tp, etp = sizes.tensor_model_parallel_size, sizes.expert_tensor_parallel_size
    heads, groups = shape.num_attention_heads // tp, shape.num_query_groups // tp
    inner = {EXPERT_WIDTH: shape.ffn_hidden_size // etp} if shape.num_experts else {
        "MLP width": shape.ffn_hidden_size // tp}
    return {"hidden size": shape.hidden_size, "attention width": heads * shape.head_dim,
            "width of queries, keys and values": (heads + 2 * groups) * shape.head_dim, **inner}


def _splits(width: str) -> str:
    """The key of section `parallel` that divides a width."""
    return "expert_tensor_parallel_size" if width == EXPERT_WIDTH else "tensor_model_parallel_size"
