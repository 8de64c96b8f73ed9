"""Teachers: whatever gives logits, runs of kd or trained elsewhere."""
