"""Is a small network, distilled from a big one, worth it? One file per stage of dvc.yaml; the packages are what stages call."""
