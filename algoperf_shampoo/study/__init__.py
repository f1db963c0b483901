"""Studies: variants x workloads x seeds. Plan them, run them, read their logs, make tables."""
