"""The protocol that every implementation fulfils, and helpers that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from amflow_kernels.problem import MapPairs, MatmulProblem, Problem

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Implementation(Protocol):
    """One implementation of both operators, forward and backward.

    Attributes:
        devices: the types of device whose tensors it takes; None: any.
        dtypes: the dtypes it takes; None: any.
        ran_on: NVIDIA's compute capabilities, as 90, on which its kernels ran and were correct, by a result of the GPU
            suite in benchmarks/results.
        backward_by: the name of the implementation whose backward serves this one; None: its own. `forward` then saves
            nothing: the row sums of a peaked map are useless to products that are rounded differently.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    ran_on: frozenset[int] = frozenset()
    backward_by: str | None = None

    def unsupported(self, problem: MapPairs) -> str | None:
        """Why it can't take such a problem on any machine, or None. Cheap and without side effects: safe in traces."""
        q = problem.q
        if self.devices is not None and q.device.type not in self.devices:
            return f"expected tensors on {' or '.join(self.devices)}, got {q.device.type}"
        if self.dtypes is not None and q.dtype not in self.dtypes:
            return f"expected one of {', '.join(map(str, self.dtypes))}, got {q.dtype}"
        return None

    def unavailable(self) -> str | None:
        """Why it can't run in this process, or None. Builds or loads what it needs."""
        return None

    def presence(self) -> str:
        """Where its kernels come from, for `amflow doctor`, without building any."""
        return "in PyTorch"

    def not_chosen(self, problem: MapPairs) -> str | None:
        """Why impl=None does not take it for this problem, though it could run, or None."""
        return None

    def uses_lse(self, problem: MapPairs) -> bool:
        """Whether its forward of this problem would save work with the rows' log-sum-exps."""
        return False

    def saved_size(self, problem: Problem) -> int:
        """Elements of what `forward` saves: a function of device type, dtype and shapes, which traced code knows."""
        return 0

    @abstractmethod
    def forward(self, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """The flow, of `problem.flow_shape`, and what its backward needs, float32 (saved_size,), or None: nothing."""

    @abstractmethod
    def backward(self, problem: Problem, dflow: Tensor, saved: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """dq, dk, dq_b, dk_b, contiguous and in the dtype of q; without elements where `needs` is False.

        saved: what `forward` saved; empty after the forward of an implementation that names this one in `backward_by`.
        """

    @abstractmethod
    def matmul(self, problem: MatmulProblem) -> Tensor:
        """The motion operator times x, of `problem.product_shape`."""

    @abstractmethod
    def matmul_backward(self, problem: MatmulProblem, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """dq, dk, dq_b, dk_b, dx, contiguous and in their dtypes; without elements where `needs` is False."""

    @abstractmethod
    def describe(self, problem: MapPairs | None = None) -> list[str]:
        """What `explain` says: of the implementation on this machine, or of how it runs this problem."""


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Contiguous tensors for the gradients of the inputs that need one; for the others, tensors without elements.

    The first input gives the device, and the dtype of those that do not exist.
    """
    first = inputs[0]
    assert first is not None
    return tuple(
        first.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs, needs, strict=True)
    )


def clear_unpaired(problem: MapPairs, grads: Sequence[Tensor]) -> None:
    """Zeroes the gradients of frames that are in no pair, which there are for a lag of more than T / 2.

    The formula would give them 0 times their maps, which may be NaN.
    """
    if not problem.pair:
        for grad in grads[:2]:
            if grad.numel():
                grad[:, problem.P : problem.lag] = 0
