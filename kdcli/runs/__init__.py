"""Run directories: what a run is, its files, all of them listed, and copies elsewhere."""
