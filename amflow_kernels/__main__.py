"""``python -m amflow_kernels`` prints versions, devices and which kernels run here, as ``amflow doctor`` does."""

from amflow_kernels.doctor import report

if __name__ == "__main__":
    print(report())
