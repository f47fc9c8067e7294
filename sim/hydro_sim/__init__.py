"""Trace-driven simulator of bubble sharing: the daemon's own policy on a cluster's job history."""
