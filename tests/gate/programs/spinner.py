"""Readers that never stop looking, one gate after the other: `spinner.py DIRECTORY ROUNDS guarded|unguarded`.

Each attaches to DIRECTORY/N, says so, and calls `may_run` as fast as it can until the gate is gone.
"""

import sys
from pathlib import Path

from hydro_slurm.gate import reader as reader_module

if sys.argv[3] == "unguarded":
    reader_module.guard = lambda address, num_bytes: bool(address)

for number in range(int(sys.argv[2])):
    reader = reader_module.GateReader.attach(Path(sys.argv[1]) / str(number))
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()
    while not reader.gone_reason:
        reader.may_run(0)
    reader.close()
sys.stdout.write("done\n")
