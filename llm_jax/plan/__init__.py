"""What a config costs on a slice, before anybody pays for one: `python -m llm_jax.plan`.

  estimate   memory and time from the config alone, in a second: what a search prunes by
  planner    compiles the step for the slice: memory as the compiler counts it, modelled time
  search     tries meshes, remat policies, batch sizes and accumulation, and ranks what fits
  sampling   the same of prefill and of a decoded token
  refusals   a program that is too large, in words that say which setting helps
  text       tables for a terminal

`aot` says how the time is modelled and how far off it is.
"""
