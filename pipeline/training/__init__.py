"""One training as a value, the loop that computes it, and the cache that keeps it."""
