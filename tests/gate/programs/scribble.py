"""A host that opens and closes as fast as it can, until its standard input ends."""

import select
import sys
import time
from pathlib import Path

from hydro_slurm.gate.writer import GateWriter

with GateWriter.create(Path(sys.argv[1]), stage=0, num_stages=2) as writer:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    number = 0
    while not (number % 64 == 0 and select.select([sys.stdin], [], [], 0)[0]):
        number += 1
        writer.open(time.monotonic_ns() + 1_000_000 + number, iteration=number, free_bytes=number * 3)
        if number % 3 == 0:
            writer.close()
