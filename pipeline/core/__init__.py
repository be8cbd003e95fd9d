"""Files, errors, the command line and provenance: decides no byte of a stage's output."""
