"""A private, real Slurm cluster on one machine, for tests, the demo, and trying things out."""

from hydro_slurm.testbed.cluster import Testbed, TestbedStatus, list_testbeds
from hydro_slurm.testbed.spec import TestbedSpec, default_exposed

__all__ = ["Testbed", "TestbedSpec", "TestbedStatus", "default_exposed", "list_testbeds"]
