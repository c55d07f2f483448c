"""``python -m amflow_kernels`` is the command ``amflow``."""

import sys

from amflow_models.cli.main import main

sys.exit(main())
