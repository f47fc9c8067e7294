"""Trace-driven simulator of bubble sharing. The engine is not part of this version."""
