"""Hugging Face models and ours, both ways: `python -m llm_jax.convert`.

families/        a file and a table each: settings, tensors
table            what such a file declares
settings layers  fields of a `config.json` and of `ModelConfig`, by each other
engine           a table and a file of tensors -> parameters, and back
tensors          safetensors, a tensor at a time
gguf_file        a GGUF file in the same words
tokenizer_files  the tokenizer beside them
importing        folder or file -> workdir
exporting        workdir -> folder
"""
