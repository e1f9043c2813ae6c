"""AdamW, the learning rate's schedule, and averaged weights.

Weight decay is limited to linear maps (see `decayed_names`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from camenn_model.config import BATCH_SIZES

LEAST_STEPS = 400
"""Steps of an epoch that a batch size must leave"""
BATCH = BATCH_SIZES[0]
"""Examples of the steps that rates are given for. Smaller steps have the same."""


def choose_batch_size(examples: int) -> int:
    """Return the examples of a step for an epoch's size.

    Large steps take less time for each example, but a log that gives too few of them is learned
    less well.
    """
    fitting = [size for size in BATCH_SIZES if examples >= LEAST_STEPS * size]
    return fitting[-1] if fitting else BATCH_SIZES[0]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimiser and its schedule.

    ``learning_rate`` and ``ema_decay`` are those of steps of ``BATCH`` examples. ``warmup`` is the
    share of steps with a rising rate. Then the rate falls linearly to 0. ``clip`` is the largest
    gradient norm.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    ema_decay: float = 0.999

    def of_batch(self, size: int) -> OptimizerConfig:
        """Return the settings of steps of ``size`` examples.

        The rate grows by the root of the batch, and weights are averaged over as many examples.
        """
        larger = max(1.0, size / BATCH)
        return replace(self, learning_rate=self.learning_rate * larger**0.5, ema_decay=self.ema_decay**larger)


def decayed_names(module: nn.Module) -> frozenset[str]:
    """Name the parameters that take weight decay.

    They are the weights of linear maps, and nothing else. LayerNorms, biases, embedding tables,
    learned vectors and scalars take none.
    """
    names = set()
    for prefix, part in module.named_modules():
        if isinstance(part, nn.Linear):
            names.add(f"{prefix}.weight" if prefix else "weight")
    return frozenset(names)


def build_optimizer(modules: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over all parameters that learn.

    They are those of all modules (the model, and the loss where it learns weights), in two groups.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in modules:
        names = decayed_names(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                (decayed if name in names else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def rate_factor(step: int, total: int, warmup: float) -> float:
    """Return the factor on the learning rate at a step.

    It is that of ``step`` (from 0) of ``total``: linear up over a share ``warmup``, then linear
    down to 0.
    """
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total - step) / max(1, total - rising))


def build_schedule(
    optimizer: torch.optim.Optimizer, total: int, config: OptimizerConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a scheduler of ``rate_factor``.

    Call ``step()`` after each optimizer step.
    """
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, total, config.warmup))


def rate_at(done: float, warmup: float) -> float:
    """Return the rate's factor at a share of examples.

    The share `done` of the examples is seen. The factor is linear up over `warmup` of them, linear
    down to 0.
    """
    return done / warmup if done < warmup else max(0.0, (1.0 - done) / (1.0 - warmup))


def set_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, done: float) -> float:
    """Set the learning rate for the share `done`.

    Returns:
        The rate.
    """
    rate = config.learning_rate * rate_at(done, config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


class WeightAverage:
    """An exponential moving average of a module's parameters.

    It is kept in float32. Buffers are the module's own. Early on the decay is min(decay, (1 + n) /
    (10 + n)) after n updates, so that the start is forgotten soon.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay {decay} must lie in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.average = {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Update the average with the module's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        parameters = [parameter.detach().float() for parameter in module.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's weights with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Give the module its averaged weights inside the block.

        Its own weights are restored after the block.
        """
        own = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors only, fit for safetensors.

        The averages are under ``average.<name>``, the count is under ``updates``.
        """
        return {"updates": torch.tensor(self.updates)} | {f"average.{k}": v for k, v in self.average.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the output of ``state_dict``.

        Raises:
            ValueError: names or shapes differ.
        """
        expected = {f"average.{name}": tensor.shape for name, tensor in self.average.items()} | {
            "updates": torch.Size()
        }
        found = {name: tensor.shape for name, tensor in state.items()}
        if expected != found:
            differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ValueError(f"averaged weights do not fit the module: {', '.join(differ[:5])}")
        self.updates = int(state["updates"])
        for name, tensor in self.average.items():
            tensor.copy_(state[f"average.{name}"])
