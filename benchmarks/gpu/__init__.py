"""Measurements of the GPU kernels: `suite` needs a GPU; `triton_report` and `cuda_report` only compile for one."""
