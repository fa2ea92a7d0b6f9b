"""llm_jax: a research codebase for language models on TPU pod slices."""

import flax

# Modules are plain pytrees and JAX's own transforms run on them (no shared references, no state
# updated in place). Set once, before any module is built.
flax.config.update("nnx_graph_mode", False)
flax.config.update("nnx_graph_updates", False)

__version__ = "0.1.0"
