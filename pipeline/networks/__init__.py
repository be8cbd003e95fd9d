"""The architectures, their checkpoints, and inference."""
