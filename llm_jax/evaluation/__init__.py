"""What checkpoints know and can do: benchmarks, and other people's harness."""
