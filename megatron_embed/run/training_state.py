"""The objects that a run trains, built from its inputs by the run itself and by an audit that repeats its steps."""

import torch

from megatron_embed.checkpoint.load import TrainingState
from megatron_embed.loading.model_directory import error_context
from megatron_embed.objectives.base import Learned
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.task import Inputs
from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp


def build_training_state(inputs: Inputs, topology: Topology,
                         learned: Learned | None) -> tuple[list[torch.nn.Module], TrainingState]:
    """(this rank's model chunks as they are trained, the state with the directory's weights). Called by all ranks.

    Args:
        learned: what the objective trains itself.
    Raises:
        UserError: the weights cannot be read.
    """
    config = inputs.config
    with error_context("model.path", config.model.path):
        models = inputs.task.load_model_chunks(topology)
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    scheduler = build_scheduler(optimizer, config.training, inputs.train_steps)
    return wrapped, TrainingState(models=models, optimizer=optimizer, scheduler=scheduler, learned=learned)
