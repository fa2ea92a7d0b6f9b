"""Cross-entropy of hidden states against an output head: one signature, several implementations."""
