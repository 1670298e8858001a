"""``python -m ds_gpt2``."""

import sys

from ds_gpt2.cli import main

sys.exit(main())
