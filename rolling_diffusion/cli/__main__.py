"""`python -m rolling_diffusion.cli`, the same as `rolling-diffusion`."""

import sys

from .main import main

sys.exit(main())
