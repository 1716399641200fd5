"""What the benchmarks share: what is trained, and how a result is written down."""
