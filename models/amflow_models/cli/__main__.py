"""``python -m amflow_models.cli`` is the command ``amflow``."""

import sys

from amflow_models.cli.main import main

sys.exit(main())
