"""What concerns GPUs: `suite` runs on one; `compile_report` and `cuda_report` compile for one and need none."""
