"""``python -m amflow_kernels`` is the command ``amflow``."""

import sys

from amflow_kernels.cli import main

sys.exit(main())
