"""A small training program for matrix.py: a Llama of 4 layers in NF4 with checkpointing and 8-bit AdamW, on
padded rows of which masked positions are chosen. In its third step it prints which libraries of NVIDIA's
names it has loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 3


def in_four_bits(model: torch.nn.Module) -> None:
    """Its linear layers, the head aside."""
    for name, part in list(model.named_modules()):
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(
                part.in_features, part.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            new.weight = bnb.nn.Params4bit(part.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)


config = LlamaConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4096,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
in_four_bits(model)
model.cuda().train()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
optimizer = bnb.optim.AdamW8bit([it for it in model.parameters() if it.requires_grad])
for step in range(STEPS):
    ids = torch.arange(1, 1 + 2 * (128 + 64 * step)).view(2, -1).cuda() % 4000
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    assert len(ids[mask == 0]) == 20
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    if step == STEPS - 1:
        mapped = set(
            re.findall(r"/\S*/(?:lib(?:cu|nccl|nv)\w*|nvidia)\S*\.so\S*", Path("/proc/self/maps").read_text())
        )
        print(json.dumps({"mapped": sorted(mapped), "cuda": torch.version.cuda}), flush=True)
    optimizer.step()
    optimizer.zero_grad()
