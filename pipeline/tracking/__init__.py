"""MLflow as a mirror of what is on the disk: decides no byte of a result."""
