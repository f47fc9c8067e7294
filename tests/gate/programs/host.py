"""A host that makes its gate and then does what it is told, line by line: `open SECONDS`, `close`, `leave`."""

import sys
import time
from pathlib import Path

from hydro_slurm.gate.writer import GateWriter

writer = GateWriter.create(Path(sys.argv[1]), stage=0, num_stages=2)
sys.stdout.write("ready\n")
sys.stdout.flush()
for line in sys.stdin:
    action, *arguments = line.split()
    if action == "open":
        writer.open(time.monotonic_ns() + int(float(arguments[0]) * 1e9))
    else:
        getattr(writer, action)()
    sys.stdout.write(f"{action}\n")
    sys.stdout.flush()
writer.leave()
