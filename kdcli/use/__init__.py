"""A finished net in use: exported, or asked about images."""
