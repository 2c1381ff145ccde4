"""`python -m lorapro_hf` is the command `lorapro`."""

from __future__ import annotations

import sys

from lorapro_hf.cli import main

sys.exit(main())
