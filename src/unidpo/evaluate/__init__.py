"""Benchmarks: questions put to models in batches, answers kept as they come, scores that can be compared."""
