"""README.md of a model, with the hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(manifest: Mapping[str, Any]) -> str:
    """README.md with the hub's metadata, from the manifest alone (so that it is the same for the same model)."""
    import yaml

    merge = len(manifest["parents"]) > 1
    front = {
        "library_name": "transformers",
        "base_model_relation": "merge" if merge else "finetune",
        "base_model": list(manifest["parents"]),
        "license": manifest.get("license") or "unknown",
        "datasets": sorted(manifest["data"]),
        "tags": ["fanbu", str(manifest["method"])],
        "metrics": sorted(manifest["metrics"]) or ["accuracy"],
    }
    lines = [f"- parents (sha256): {', '.join(manifest['parents']) or 'none'}", f"- seed: {manifest['seed']}"]
    lines += [f"- {key}: {value}" for key, value in sorted(manifest["parameters"].items())]
    lines += [f"- data {name} (sha256): {value}" for name, value in sorted(manifest["data"].items())]
    text = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    loader = manifest["loader"]
    return (
        f"---\n{text}---\n\n# Made by fanbu: {manifest['method']}\n\n"
        f"A plain transformers checkpoint ({loader}); fanbu is not needed to use it.\n\n" + "\n".join(lines) + "\n"
    )
