"""A training step that a GPU records once and then repeats.

A step of a small network is a thousand short kernels. Launching them one by one takes several times as long as they run; a
recording (a CUDA graph) launches them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from attrdb.ingest.devices import is_cpu

WARM_UP = 3  # calls that are not recorded: libraries choose their kernels, the optimizer makes its state


class Recorded:
    """A function of tensors on the GPU, whose shapes do not change and which never waits for a value.

    The first call runs the function WARM_UP times and records it; every call repeats the recording. So a training step takes
    WARM_UP steps more on its first batch. Nothing that the function decides in Python is decided again.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[torch.Tensor] = []
        self.output = torch.empty(0)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.graph is None:
            self.graph = self._record(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> torch.cuda.CUDAGraph:
        self.inputs = [given.clone() for given in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self.function(*self.inputs)
        return graph


def adamw(weights: Iterable[torch.nn.Parameter], lr: float, recorded: bool, **options: Any) -> torch.optim.AdamW:
    """The optimizer of a step that may be recorded: its learning rate is then a tensor, which `set_rate` changes."""
    parameters = list(weights)
    rate = torch.tensor(lr, device=parameters[0].device) if recorded else lr
    return torch.optim.AdamW(parameters, lr=rate, capturable=recorded, fused=True, **options)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_moments(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Go on with the moments of a checkpoint; how the optimizer runs stays as this process made it."""
    optimizer.load_state_dict({"state": stored["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The number of updates that its moments are of."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def memory_format(device: str) -> torch.memory_format:
    """How a convolution's weights lie: a GPU multiplies bf16 with the channels last, a CPU would lose time by that."""
    return torch.contiguous_format if is_cpu(device) else torch.channels_last
