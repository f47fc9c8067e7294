"""A reader that waits until its gate is open or gone, and says which; once for each line of its standard input.

`waiter.py DIRECTORY [UID]`: as another user, after having tried to write the page.
"""

import os
import sys
from pathlib import Path

from hydro_slurm.gate.reader import GateReader

if len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC):
        try:
            os.open(Path(sys.argv[1]) / "page", flags)
            sys.exit("this user may write the page")
        except PermissionError:
            pass
    try:
        (Path(sys.argv[1]) / "page").unlink()
        sys.exit("this user may delete the page")
    except PermissionError:
        pass
reader = GateReader.attach(Path(sys.argv[1]))
sys.stdout.write("ready\n")
sys.stdout.flush()
for _ in sys.stdin:
    state = reader.wait_open(0, timeout_s=60)
    sys.stdout.write(f"{state}\n")
    sys.stdout.flush()
