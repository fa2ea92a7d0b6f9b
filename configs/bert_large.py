"""BERT-large (Devlin et al. 2019): twice the layers of BERT-base, and a third wider.

    python -m llm_jax.train --config=configs/bert_large.py --workdir=gs://BUCKET/bert_large

Slice: v5e:4x4. Data: as configs/bert_base.py.
Expected: nobody has run this.
"""

from configs import bert_base


def get_config(arg: str = ""):
    config = bert_base.get_config(arg)
    config.model.update(num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096, remat="dots")
    return config
