"""TFDS builders that ship with llm_jax. Each is a package, as TFDS needs on Python 3.11."""
