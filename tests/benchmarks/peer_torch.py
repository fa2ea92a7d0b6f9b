"""The peers of `cpu_speed.py`: PyTorch at training, Hugging Face `generate` at sampling.

Needs `torch` and `transformers`, in this Python or in the one given by `--peer_python`. The trained
model has nanoGPT's architecture (fused QKV, `scaled_dot_product_attention`, tied head, AdamW, eager
mode), written out here; weights are random.
"""

import json
import os
import sys
import time

import torch
from torch import nn
import torch.nn.functional as F

_PROMPT, _NEW = 16, 128  # tokens, as in worker.py

# layers, heads, width, context, vocabulary, has bias, batch, repeats
TRAINED = {
    "train_char": (4, 4, 128, 64, 256, False, 12, 60),
    "train_gpt2": (12, 12, 768, 256, 50304, True, 4, 4),
}
SAMPLED = {"sample_1": 1, "sample_16": 16}
# rows, tokens of a row, tokens of a decoder's row
TUNED = {"tune_bert": (8, 128, 0), "train_t5": (4, 128, 32)}
# rows, tokens of a source, tokens written, beams
WRITTEN = {"write_t5": (8, 128, 64, 1), "beams_t5": (4, 128, 64, 4)}
_T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


class Block(nn.Module):
    """A pre-norm block of GPT-2."""

    def __init__(self, width: int, num_heads: int, has_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width, bias=has_bias)
        self.qkv = nn.Linear(width, 3 * width, bias=has_bias)
        self.out = nn.Linear(width, width, bias=has_bias)
        self.mlp_norm = nn.LayerNorm(width, bias=has_bias)
        self.up = nn.Linear(width, 4 * width, bias=has_bias)
        self.down = nn.Linear(4 * width, width, bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = [
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(width, 2)
        ]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Gpt(nn.Module):
    """Embeddings, blocks, tied head, mean cross-entropy."""

    def __init__(self, layers, heads, width, context, vocabulary, has_bias):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, has_bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=has_bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _trainer(case: str, is_bfloat16: bool):
    layers, heads, width, context, vocabulary, has_bias, batch, repeats = TRAINED[case]
    model = Gpt(layers, heads, width, context, vocabulary, has_bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    tokens = torch.randint(0, vocabulary, (batch, context + 1))

    def repeat() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return repeat, batch * context, repeats


def _tuner(case: str, is_bfloat16: bool):
    """BERT-base on labels, or T5-base on text, as Hugging Face's models train by default."""
    import transformers

    rows, length, target_length = TUNED[case]
    if case == "tune_bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig()).train()
        labels = torch.randint(0, 2, (rows,))
    else:
        config = transformers.T5Config(**_T5_BASE, dropout_rate=0.0, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config).train()
        labels = torch.randint(0, config.vocab_size, (rows, target_length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    tokens = torch.randint(0, 30_000, (rows, length))

    def repeat() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bfloat16):
            loss = model(tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return repeat, rows * (length + target_length), 4


def _sampler(case: str, is_bfloat16: bool):
    import transformers

    batch = SAMPLED[case]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    model = model.bfloat16() if is_bfloat16 else model
    tokens = torch.randint(0, 50_257, (batch, _PROMPT))

    @torch.no_grad()
    def repeat() -> None:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=_NEW,
            min_new_tokens=_NEW,
            pad_token_id=0,
        )

    return repeat, batch * _NEW, 2


def _writer(case: str, is_bfloat16: bool):
    """T5-base, greedy or by beams."""
    import transformers

    rows, length, num_tokens, num_beams = WRITTEN[case]
    config = transformers.T5Config(**_T5_BASE, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model = model.bfloat16() if is_bfloat16 else model
    tokens = torch.randint(2, 30_000, (rows, length))

    @torch.no_grad()
    def repeat() -> None:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )

    return repeat, rows * num_tokens, 2


def main() -> None:
    case, dtype = sys.argv[1:]
    make = _trainer if case in TRAINED else _tuner if case in TUNED else _sampler
    make = _writer if case in WRITTEN else make
    repeat, num_tokens, repeats = make(case, dtype == "bfloat16")
    repeat()
    wall, cpu = [], []
    for _ in range(repeats):
        started, worked = time.perf_counter(), time.process_time()
        repeat()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - worked)
    name = "nanoGPT in PyTorch" if case in TRAINED else "Hugging Face generate"
    name = "Hugging Face" if case in TUNED else name
    what = f"{name} {dtype}, torch {torch.__version__}"
    row = {"program": what, "tokens": num_tokens, "wall": wall, "cpu": cpu, "cores": os.cpu_count()}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
