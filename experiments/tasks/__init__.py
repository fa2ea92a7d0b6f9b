"""Tasks on real data, from a checkpoint to a score beside a baseline's."""
