"""Measurements of the GPU kernels: `suite` needs a GPU; `compile_report` and `cuda_report` only compile for one."""
