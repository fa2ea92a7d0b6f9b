"""Semantic search: vectors of texts, an index of documents, and how well it finds what is meant.

embedder    texts to vectors of unit length, by any model whose states can be pooled
index       documents and their vectors in a folder, searched exactly
ranking     recall, mean reciprocal rank and nDCG of pairs
__main__    `python -m llm_jax.search index | query | evaluate`
"""
