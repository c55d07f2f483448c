"""Which bytes of memory have been written, by kernels and by torch, and the memory that a kernel may touch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ptx import machine

aten = torch.ops.aten
ALLOCATORS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
OVERWRITERS = (aten.copy_, aten.fill_, aten.zero_)  # in place, without reading what was there


class Shadow(NamedTuple):
    """A storage, and for each of its bytes whether it has been written."""

    reference: StorageWeakRef  # keeps its address in `Memory` from being given to another storage
    address: int
    written: Tensor


class Memory(TorchDispatchMode):
    """While it is entered, tensors that torch allocates without initialising them are unwritten.

    A byte becomes written when a kernel or a torch op writes it, and torch ops may read only those that are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shadows: dict[int, Shadow] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads, writes = _accesses(func, args, kwargs)
        for x in reads:
            self.check_written(x, f"an operand of {func}")
        result = func(*args, **kwargs)
        if func.overloadpacket in ALLOCATORS and result.numel():
            self.adopt(result, torch.zeros(result.untyped_storage().nbytes(), dtype=torch.uint8))
        for x in writes:
            if (shadow := self._shadow_of(x)) is not None:
                shadow.fill_(1)
        return result

    def check_written(self, x: Tensor, what: str) -> None:
        """Raises machine.Fault if an element of x has never been written."""
        shadow = self._shadow_of(x)
        if shadow is not None and not shadow.all():
            count = int((shadow == 0).any(-1).sum())
            raise machine.Fault("uninitialised", f"{what}, {tuple(x.shape)}: {count} elements were never written")

    def shadow(self, x: Tensor) -> Tensor | None:
        """For each byte of the storage of x whether it has been written; None if all have been from the beginning."""
        found = self._shadows.get(x.untyped_storage()._cdata)
        return None if found is None else found.written

    def adopt(self, x: Tensor, written: Tensor) -> None:
        """From now on the bytes of the storage of x are treated as `written` says."""
        storage = x.untyped_storage()
        self._shadows[storage._cdata] = Shadow(StorageWeakRef(storage), storage.data_ptr(), written)

    def allocated(self) -> list[machine.Region]:
        """The storages with a shadow that still exist."""
        known = [shadow for shadow in self._shadows.values() if not shadow.reference.expired()]
        return [
            machine.Region(shadow.address, shadow.written.numel(), f"allocation {n}", shadow.written)
            for n, shadow in enumerate(known)
        ]

    def regions(self, tensors: Iterable[Tensor]) -> list[machine.Region]:
        """The storages of the tensors that a kernel is given: memory that it may touch."""
        regions: dict[int, machine.Region] = {}
        for n, x in enumerate(tensors):
            storage = x.untyped_storage()
            if storage.nbytes():
                name = f"tensor {n}, {tuple(x.shape)}"
                regions.setdefault(
                    storage._cdata, machine.Region(storage.data_ptr(), storage.nbytes(), name, self.shadow(x))
                )
        return list(regions.values())

    def _shadow_of(self, x: Tensor) -> Tensor | None:
        """The shadow of a tensor's elements: (*x.shape, bytes of an element)."""
        shadow, size = self.shadow(x), x.element_size()
        if shadow is None:
            return None
        return shadow.as_strided((*x.shape, size), (*(n * size for n in x.stride()), 1), x.storage_offset() * size)


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """All tensors among the arguments of a kernel, in tuples too."""
    return (x for x in tree_leaves(arguments) if isinstance(x, Tensor))


def _accesses(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a torch op reads, and those that it writes. Views do neither."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    if func.overloadpacket in ALLOCATORS:
        return reads, writes
    for n, argument in enumerate(func._schema.arguments):
        value = args[n] if n < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        viewed = argument.alias_info is not None and not written
        overwritten = written and (argument.is_out or func.overloadpacket in OVERWRITERS)
        for x in tensors_in(value):
            if written:
                writes.append(x)
            if not viewed and not overwritten:
                reads.append(x)
    return reads, writes
