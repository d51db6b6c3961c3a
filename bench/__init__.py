"""Benchmarks: parity first, then times with their rivals in the same run."""
