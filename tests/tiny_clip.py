"""A CLIP text model of the true architecture, tiny and with random weights, and a tokenizer of its own."""

import json
from pathlib import Path

import torch

CHANNELS = 24
# Merges of the real kind: pairs of what is there already, "</w>" at a word's end.
MERGES = ("t h", "th e</w>", "s e", "se v", "sev e", "seve n</w>", "h a", "ha n", "han d", "o n", "on e</w>")
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def write_tokenizer(folder: Path) -> int:
    """Writes `vocab.json` and `merges.txt`, as CLIP's are; returns the number of words."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merged = ["".join(merge.split()) for merge in MERGES]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, *SPECIAL]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return len(vocabulary)


def write_clip(folder: Path, seed: int = 0, **changes: int) -> Path:
    """Writes a text model with its tokenizer, as a hub's folder holds them; returns the folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    num_words = write_tokenizer(folder)
    sizes = {
        "vocab_size": num_words,
        "hidden_size": CHANNELS,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": num_words - 2,
        "eos_token_id": num_words - 1,
        "pad_token_id": num_words - 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPTextModel(CLIPTextConfig(**{**sizes, **changes}))
    model.save_pretrained(folder)
    return folder
