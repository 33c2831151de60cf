"""Megatron-style distributed training of text embedding models and rerankers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from megatron_embed.api import Embedder, Reranker
    from megatron_embed.config.schema import RunConfig

__version__ = "0.1.0"


def load(directory: str, *, pooling: str | None = None, max_length: int | None = None, dtype: str | None = None,
         normalize: bool = True) -> "Embedder | Reranker":
    """A model in this process: `load(DIR).encode(texts, role="query")`, or `.rerank(query, documents)` of a reranker.

    The libraries are loaded here, not with the package. Under torchrun every rank loads and calls alike.

    Args:
        directory: Hugging Face or Sentence Transformers directory, one of our checkpoints, or a hub name.
        pooling: None: the model's own setting, else mean for an encoder and lasttoken for a decoder.
        max_length: longest text in tokens, special tokens included; None: the model's own setting.
        dtype: computation dtype: auto, float32 or bfloat16; None: the model's own setting, else float32. auto:
            bfloat16 where the GPU or processor has instructions for it, else float32.
        normalize: unit vectors, unless the directory says otherwise; False: as the pooling gives them.
    Raises:
        UserError: the model does not exist, or cannot do that.
    """
    from megatron_embed.platform import cuda_environment

    cuda_environment.set_defaults()
    from megatron_embed.api import open_any

    return open_any(directory, pooling=pooling, max_length=max_length, dtype=dtype, normalize=normalize)


def train(config: "str | os.PathLike[str] | Mapping[str, Any] | RunConfig", overrides: "Sequence[str]" = (), *,
          on_step: "Callable[[int, Mapping[str, float]], None] | None" = None) -> dict[str, float]:
    """A training run in this process, as `megatron-embed train` does it: for scripts and notebooks.

    The run logs to stderr unless the program has set up logging. Under torchrun every rank calls this alike. A run
    whose `checkpoint.directory` holds a checkpoint resumes; a complete one is not touched.

    Args:
        config: a YAML file; its values as nested dicts, `{"model": {"path": ...}, ...}`; or a checked RunConfig.
        overrides: `section.key=value` each; later ones win.
        on_step: called as (step, metrics) after every optimizer step, and as (step, {"eval/NAME": value}) after every
            evaluation (step 0: before training), on every rank. An error in it ends the run.
    Returns:
        Metrics of the last step; empty if there was none left to do.
    Raises:
        UserError: settings, data or a model that cannot be used.
    """
    from megatron_embed.platform import cuda_environment

    cuda_environment.set_defaults()
    from megatron_embed.api import train_run

    return train_run(config, overrides, on_step=on_step)
