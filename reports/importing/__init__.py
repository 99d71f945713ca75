"""Results of other benchmarks as records of ours: one file a format."""
