"""A program that uses a gate and then meets a SIGBUS of its own: `foreign_fault.py DIRECTORY default|faulthandler`."""

import faulthandler
import mmap
import os
import sys
from pathlib import Path

from hydro_slurm.gate.reader import GateReader

if sys.argv[2] == "faulthandler":
    faulthandler.enable()
reader = GateReader.attach(Path(sys.argv[1]))
assert reader.state() == "closed"
path = Path(sys.argv[1]) / "data"
path.write_bytes(bytes(4096))
with path.open("r+b") as file:
    mapping = mmap.mmap(file.fileno(), 4096)
os.truncate(path, 0)
mapping[0]
