"""``python -m far_env.cli`` is ``far-env``."""

import sys

from far_env.cli.main import main

sys.exit(main())
