"""Datasets: where images come from, how they are kept as bytes, and the views that nets see."""
