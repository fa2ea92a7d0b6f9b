"""Attention of a few new queries to a cache of keys and values."""
