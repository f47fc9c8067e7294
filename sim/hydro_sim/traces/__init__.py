"""Traces: the history of a cluster's jobs, read from files or generated."""

from hydro_sim.traces.generated import generate_trace
from hydro_sim.traces.mapped import ColumnMapping, load_mapped
from hydro_sim.traces.plausible import check_plausible
from hydro_sim.traces.public import load_helios, load_philly
from hydro_sim.traces.sacct import load_sacct
from hydro_sim.traces.table import Trace, TraceJob

__all__ = [
    "ColumnMapping",
    "Trace",
    "TraceJob",
    "check_plausible",
    "generate_trace",
    "load_helios",
    "load_mapped",
    "load_philly",
    "load_sacct",
]
