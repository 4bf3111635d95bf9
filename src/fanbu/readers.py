"""What stands before a network: which class opens it for a task, and what prepares images and recordings for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fanbu.errors import IntegrityError, needs_extra
from fanbu.files import write_text
from fanbu.types import Task

PROCESSOR = "preprocessor_config.json"
# model types whose "sequences" are recordings
HEARING = {
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert",
    "wav2vec2-conformer", "wavlm",
}  # fmt: skip
_VARIES = {"transformers_version", "processor_class", "_processor_class"}


def auto_class(task: Task) -> Any:
    """The transformers class that opens a checkpoint for a task."""
    import transformers

    return {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "audio-classification": transformers.AutoModelForAudioClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[task]


def for_media(config: Mapping[str, Any]) -> bool:
    """Whether a bare body reads images or recordings."""
    return config.get("model_type") in HEARING or not config.get("vocab_size")


def load_processor(folder: Path, facts: Mapping[str, Any]) -> Any:
    """The image processor or feature extractor of a model; ``facts`` is what its file says."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    seeing = "image_processor_type" in facts
    if seeing:
        with needs_extra("media"):
            import_module("PIL")  # the processor asks for it late
    auto: Any = AutoImageProcessor if seeing else AutoFeatureExtractor
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise IntegrityError(
            "tokenizer-broken", f"{folder}: {error}", allowed="an image processor or a feature extractor",
            remedy="restore the folder from where it came from, or make it again",
        ) from None  # fmt: skip


def write_processor(processor: Any, folder: Path) -> None:
    """Its file, without what differs from version to version."""
    facts = {k: v for k, v in processor.to_dict().items() if k not in _VARIES}
    write_text(folder / PROCESSOR, json.dumps(facts, indent=2, sort_keys=True))
