"""T5-base (Raffel et al. 2020): the size of two BERT-base, one to read and one to write.

    python -m llm_jax.train --config=configs/t5_base.py --workdir=gs://BUCKET/t5_base

Slice: v5e:4x4. Data: as configs/t5_small.py.
Expected: nobody has run this.
"""

from configs import t5_small


def get_config(arg: str = ""):
    config = t5_small.get_config(arg)
    config.model.update(num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072)
    return config
