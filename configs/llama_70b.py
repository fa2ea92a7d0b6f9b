"""Llama 2 70B (Touvron et al. 2023): 80 layers, 8 key heads, 32k vocabulary, four million tokens a step.

    python -m llm_jax.train --config=configs/llama_70b.py --workdir=gs://BUCKET/llama_70b

Slice: v5p:8x8x8, 64 ways FSDP and 8 ways tensor parallel. Data: C4 from TFDS, prepared once by
`python -m llm_jax.prepare --config=configs/llama_70b.py` with the released tokenizer in `llama2/`.
Expected: not measured.
"""

from configs import llama_7b


def get_config(arg: str = ""):
    config = llama_7b.get_config(arg)
    config.slice = "v5p:8x8x8"
    config.model.update(num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, mlp_dim=28_672)
    config.mesh.update(tensor=8, rules="fsdp_tp")
    config.data.update(batch_size=1024, sequence_length=4096)
    config.optim.update(learning_rate=1.5e-4, accumulation_steps=4)
    return config
