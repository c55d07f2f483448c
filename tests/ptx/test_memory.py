"""Which memory counts as written."""

from __future__ import annotations

import pytest
import torch

from tests.ptx.machine import Fault
from tests.ptx.memory import Memory, tensors_in


def test_torch_may_not_read_what_was_never_written() -> None:
    with Memory():
        x = torch.empty(2, 5)
        x[:, :3] = 1
        assert x[:, :3].sum() == 6
        with pytest.raises(Fault, match=r"an operand of aten\.sum\.default, \(2, 5\): 4 elements were never written"):
            x.sum()
        torch.add(x[:, :2], 1, out=x[:, 3:])
        assert x.sum() == 14
        with pytest.raises(Fault, match=r"aten\.add_\.Tensor, \(3,\): 3 elements"):
            x.new_empty(3).add_(1)


def test_other_tensors_are_written() -> None:
    before = torch.empty(3)
    with Memory() as memory:
        for x in (before, torch.zeros(3), torch.empty(3).zero_(), torch.ones(4)[1:], torch.empty(0)):
            x.sum()
        assert [region.shadow for region in memory.regions([before])] == [None]


def test_a_kernel_may_touch_the_storages_of_its_tensors() -> None:
    """Each once, with what has been written of it."""
    with Memory() as memory:
        x, y = torch.empty(4, 3), torch.zeros(5)
        x[1] = 0
        regions = memory.regions(tensors_in(((x[2:], None, 7), x[:1], y)))
    assert [(region.address, region.size) for region in regions] == [(x.data_ptr(), 48), (y.data_ptr(), 20)]
    assert regions[0].shadow is not None
    assert regions[0].shadow.view(4, 12).all(1).tolist() == [False, True, False, False]
    regions[0].shadow[24:36] = 1  # as a kernel does
    memory.check_written(x[1:3], "two rows")
    with pytest.raises(Fault, match=r"all rows, \(4, 3\): 6 elements"):
        memory.check_written(x, "all rows")


def test_memory_given_back_to_torch_is_forgotten() -> None:
    """Tensors that are allocated later, perhaps at the same address, have a state of their own."""
    with Memory() as memory:
        x = torch.empty(100)
        assert len(memory.allocated()) == 1
        del x
        assert not memory.allocated()
        for _ in range(100):
            torch.ones(100).sum()
