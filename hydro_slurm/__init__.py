"""Runs hyperparameter sweeps in the pipeline bubbles of training jobs on Slurm clusters."""

__version__ = "0.1.0"
