"""`hydro demo`: the whole system on one machine, with the proof that the host job is not slowed."""
