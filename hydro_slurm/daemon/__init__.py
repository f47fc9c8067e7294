"""The coordinator's loop: read the world, decide by policy, act."""

from hydro_slurm.daemon.reconcile import Backend, Reconciler, World

__all__ = ["Backend", "Reconciler", "World"]
