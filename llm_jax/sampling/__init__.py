"""Generation from a checkpoint. Depends on `models/`, the checkpoint and the tokenizer alone."""
