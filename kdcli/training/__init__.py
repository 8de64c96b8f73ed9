"""Training: the one loop, from a spec to a finished run, and where runs are trained."""
