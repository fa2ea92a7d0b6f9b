"""The families of Hugging Face models that are one of ours: a file and a table each."""

from llm_jax.convert import table
from llm_jax.convert.families import bert
from llm_jax.convert.families import deepseek
from llm_jax.convert.families import gemma2
from llm_jax.convert.families import gemma3
from llm_jax.convert.families import gpt2
from llm_jax.convert.families import llama
from llm_jax.convert.families import marian
from llm_jax.convert.families import mixtral
from llm_jax.convert.families import modernbert
from llm_jax.convert.families import olmo2
from llm_jax.convert.families import olmoe
from llm_jax.convert.families import qwen2
from llm_jax.convert.families import qwen3
from llm_jax.convert.families import qwen3_moe
from llm_jax.convert.families import t5

BY_TYPE: dict[str, table.Family] = {
    family.model_type: family
    for family in (
        gpt2.FAMILY,
        llama.FAMILY,
        llama.MISTRAL,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        olmo2.FAMILY,
        deepseek.V2,
        deepseek.V3,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        olmoe.FAMILY,
        bert.FAMILY,
        modernbert.FAMILY,
        t5.FAMILY,
        marian.FAMILY,
    )
}
