"""A trained temperature and bias: few numbers, the same on every rank, with an optimizer of their own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_embed.config.objective import SMALLEST_LEARNED
from megatron_embed.config.schema import RunConfig


class LearnedScale:
    """log(1 / temperature) (CLIP, Radford et al. 2021, arXiv:2103.00020) and, of the loss sigmoid, the bias (SigLIP,
    Zhai et al. 2023, arXiv:2303.15343), trained by Adam (Kingma and Ba 2014, arXiv:1412.6980) without weight decay.

    They belong to the run and not to the model, of whose vectors they change nothing: no export holds them. Every rank
    of the world has them as Python floats and updates them from the same gradient, a sum over the data-parallel ranks
    that comes with the step's metrics. So no layout, dtype or sharding touches them, and no factor of
    training/scaling.py applies.

    Attributes:
        names: of the metrics, per number its value and its gradient.
    """

    def __init__(self, config: RunConfig) -> None:
        objective, training = config.objective, config.training
        self._has_bias = objective.loss == "sigmoid"
        # SigLIP does not bound its scale: that of its published models is about 117.
        self._largest = math.inf if self._has_bias else -math.log(SMALLEST_LEARNED)
        self._values = [-math.log(objective.temperature), *([objective.bias] if self._has_bias else [])]
        self._means, self._squares, self._steps = [0.0] * len(self._values), [0.0] * len(self._values), 0
        self._betas, self._eps = (training.adam_beta1, training.adam_beta2), training.adam_eps
        self._rate = (objective.temperature_learning_rate or training.learning_rate) / training.learning_rate
        self._gradients = ("log_scale_gradient", *(["bias_gradient"] if self._has_bias else []))
        self.names = ("temperature", "log_scale_gradient", *(["bias", "bias_gradient"] if self._has_bias else []))

    @property
    def temperature(self) -> float:
        """Divides the similarity."""
        return math.exp(-self._values[0])

    @property
    def bias(self) -> float | None:
        """Added to the logits; None for a loss that has none."""
        return self._values[1] if self._has_bias else None

    def complete_gradient(self) -> tuple[Tensor, ...]:
        """Nothing: the gradients are metrics of the step."""
        return ()

    def receive(self, numbers: Sequence[Tensor]) -> None:
        """Nothing."""

    def step(self, metrics: Mapping[str, float], learning_rate: float) -> None:
        """One update, unless a gradient is not finite: then nothing changes.

        Args:
            metrics: of the step, the gradients among them; equal on all ranks.
            learning_rate: of the model at this step.
        """
        gradients = [metrics[name] for name in self._gradients]
        if not all(map(math.isfinite, gradients)):
            return
        self._steps += 1
        (beta1, beta2), rate = self._betas, learning_rate * self._rate
        for index, gradient in enumerate(gradients):
            self._means[index] = beta1 * self._means[index] + (1 - beta1) * gradient
            self._squares[index] = beta2 * self._squares[index] + (1 - beta2) * gradient * gradient
            mean = self._means[index] / (1 - beta1**self._steps)
            root = math.sqrt(self._squares[index] / (1 - beta2**self._steps))
            self._values[index] -= rate * mean / (root + self._eps)
        self._values[0] = min(self._values[0], self._largest)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, the same on every rank."""
        return {"values": list(self._values), "means": list(self._means), "squares": list(self._squares),
                "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the return value of `state_dict`."""
        self._values, self._means = list(state["values"]), list(state["means"])
        self._squares, self._steps = list(state["squares"]), int(state["steps"])
