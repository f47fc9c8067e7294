"""Starts what follows as its child, prints the child's number, and waits: somebody will kill this."""

import subprocess
import sys

process = subprocess.Popen(sys.argv[1:])
sys.stdout.write(f"{process.pid}\n")
sys.stdout.flush()
process.wait()
