"""`python -m hydro_sim`."""

import sys

from hydro_sim.cli import main

sys.exit(main())
