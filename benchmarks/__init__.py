"""Measurements of this library.

Time and memory compared with the peers in `providers.py`, on a CPU:
    pytest benchmarks/                             prints tables within 5 minutes; --bench-minutes gives more time
        --bench-shape 1x8x12x257x64                measures your own (B, T, heads, N, D)
        --bench-results JSON                       saves a summary
        --bench-smoke                              a minute, to see that it runs
    python -m benchmarks.plot JSON -o PNG          plots a summary

Other commands, which describe their options with --help; only --write overwrites committed results:
    python -m benchmarks.precision                 errors of float32, 16-bit and the centred form: docs/precision.md
    python -m benchmarks.training_step             the cost of adapters in training and inference
    python -m benchmarks.motion                    accuracy of adapters on tasks that only motion can solve
    python -m benchmarks.families                  record_am_flow on small models of every family: docs/families.md
    python -m benchmarks.decoding                  reading of videos
    python -m benchmarks.call_cost                 what small calls cost besides their kernels: docs/benchmarks.md
    python -m benchmarks.many_threads              how busy many cores would be, simulated: docs/benchmarks.md
    python -m benchmarks.arm_report                the kernels for 64-bit ARM under an emulator: docs/arm.md
    python -m benchmarks.gpu.suite                 correctness, time and memory on a GPU; --dry-run without one
    python -m benchmarks.gpu.warm_cache            compiles the suite's kernels beforehand, without a GPU
    python -m benchmarks.gpu.triton_report         figures of the compiled Triton kernels: docs/triton_report.md
    python -m benchmarks.gpu.cuda_report           figures of the compiled CUDA kernels: docs/cuda_report.md
"""
