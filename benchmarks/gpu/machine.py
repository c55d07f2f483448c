"""What the GPU suite asks of its machine: a GPU, or none in a dry run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from amflow_kernels.dispatch import IMPLEMENTATIONS
from amflow_kernels.impl.triton import configs
from benchmarks.gpu.kernel_cache import Kernel, Lookups, record
from benchmarks.gpu.problems import H100

Results = tuple[Tensor, ...]


class Gpu:
    """The GPU that PyTorch uses."""

    device = "cuda"
    dry = False

    def __init__(self, lookups: Lookups) -> None:
        self.lookups = lookups

    @contextmanager
    def ready(self) -> Iterator[None]:
        """In this context the library's kernels run."""
        yield

    def looked_up(self) -> dict[str, Any]:
        """How many kernels this process found compiled, and those that it had to compile."""
        return {"from the cache": len(self.lookups.hits), "compiled": sorted(self.lookups.misses)}

    def describe(self) -> dict[str, Any]:
        """Name, versions, and what nvidia-smi says."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
            "driver": nvidia_smi("driver_version"),
            "clock MHz": nvidia_smi("clocks.max.sm"),
        }

    def launch_device(self) -> configs.Device:
        """What the configurations of the kernels depend on."""
        return configs.Device.of(torch.device(self.device))

    def architecture(self) -> int:
        """The compute capability, as 90."""
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def broken(self) -> bool:
        """Whether an error left this process unable to use the GPU."""
        try:
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            return True
        return False

    def clock(self, call: Callable[[], object]) -> Callable[[], float]:
        """Launch a call; the result gives the GPU's seconds, once all was waited for."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # the GPU waits while the host launches, so that only GPU time is measured
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], Results]) -> int:
        """Peak memory of a call besides its inputs and results."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)

    def captured(self, step: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """A CUDA graph of a step: its results, cleared, and the function that replays it into them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for x in results:
            x.zero_()
        return results, graph.replay

    def another_stream(self) -> AbstractContextManager[Any]:
        """The current stream is a new one, which is busy."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)
        return torch.cuda.stream(stream)

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, **options)

    def others(self) -> list[str]:
        """The other GPUs."""
        return [f"cuda:{n}" for n in range(1, torch.cuda.device_count())]

    def attention_by(self, backend: SDPBackend | None) -> AbstractContextManager[Any]:
        """PyTorch's attention takes this backend; None: its own choice."""
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def attention_op(self, op: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exps of one of PyTorch's attention operators."""
        out, lse, *_ = op(*arguments, **options)
        return out, lse


class NoGpu(Gpu):
    """A dry run: all calls are made, on CPU tensors, and the library's kernels are looked up but not launched."""

    device = "cpu"
    dry = True

    def __init__(self, lookups: Lookups) -> None:
        super().__init__(lookups)
        self.recorded: list[Kernel] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        kernels = IMPLEMENTATIONS["triton"]
        torch.set_num_threads(1)  # all tensors are small
        with (
            record(H100) as self.recorded,
            mock.patch.object(kernels, "devices", ("cpu",)),
            mock.patch.dict(IMPLEMENTATIONS, cuda=kernels),
        ):
            yield

    def looked_up(self) -> dict[str, Any]:
        """A kernel that the plan of the cache lacks is an error."""
        names = [f"{kernel.name} {kernel.src.constants} {kernel.src.attrs}"[:1500] for kernel in self.recorded]
        return {"error": f"not in benchmarks/gpu/plan.py: {names}"} if names else {}

    def describe(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        return {"gpu": "none: a dry run", "versions": versions, "driver": nvidia_smi("driver_version")}

    def launch_device(self) -> configs.Device:
        return H100

    def architecture(self) -> int:
        return 90

    def cache_bytes(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def broken(self) -> bool:
        return False

    def clock(self, call: Callable[[], object]) -> Callable[[], float]:
        begin = perf_counter()
        call()
        seconds = perf_counter() - begin
        return lambda: seconds

    def peak_bytes(self, call: Callable[[], Results]) -> int:
        return sum(x.nbytes for x in call())

    def captured(self, step: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        return step(), lambda: None

    def another_stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    def others(self) -> list[str]:
        return []

    def attention_by(self, backend: SDPBackend | None) -> AbstractContextManager[Any]:
        return nullcontext()

    def attention_op(self, op: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """On tensors without storage: the operators have no kernels for a CPU."""
        on_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
        out, lse, *_ = op(*on_meta, **options)
        return torch.zeros(out.shape, dtype=out.dtype), torch.zeros(lse.shape, dtype=lse.dtype)


def nvidia_smi(field: str) -> str:
    """What nvidia-smi says of the first GPU, or why it says nothing."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
