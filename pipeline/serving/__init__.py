"""The model registry, the model server, and prediction on files."""
