"""How families of transformers name their tensors: what writes and reads neurons, heads and hidden channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Port:
    """A module of a layer that writes units (its rows) or reads them (its columns).

    ``wide`` blocks of one unit lie side by side (DeBERTa's joint projection); ``parts`` lie one after the other, of
    which this is number ``part`` (GPT-2's). A name that is no module's is a vector's.
    """

    module: str
    reads: bool = False
    grouped: bool = False
    wide: int = 1
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Family:
    """How one family names its tensors: ``outside`` gives the hidden dimensions of those outside the layers.

    ``head_width`` is the config's name for the numbers in a head, where that is free of the hidden size.
    """

    prefixes: tuple[str, ...]
    neurons: tuple[Port, ...]
    heads: tuple[Port, ...]
    norms: str
    outside: Mapping[str, tuple[int, ...]]
    kept: str = r"$^"
    input_first: bool = False
    rotary: bool = False
    head_width: str = ""


def _writes(*modules: str, **more: Any) -> tuple[Port, ...]:
    return tuple(Port(m, **more) for m in modules)


def _reads(module: str) -> tuple[Port, ...]:
    return (Port(module, reads=True),)


_EMBEDDINGS = {
    r"embeddings\.(word|position|token_type)_embeddings\.weight": (1,), r"embeddings\.LayerNorm\..*": (0,),
    r"embeddings\.(position|token_type)_ids": (),
}  # fmt: skip
_BERT = Family(
    ("bert.", "roberta.", "electra."),
    _writes("intermediate.dense") + _reads("output.dense"),
    _writes("attention.self.query", "attention.self.key", "attention.self.value") + _reads("attention.output.dense"),
    r"(attention\.)?output\.LayerNorm",
    {
        **_EMBEDDINGS, r"pooler\.dense\.weight": (1,), r"pooler\.dense\.bias": (),
        r"(cls\.predictions|lm_head)\.bias": (),
        r"cls\.predictions\.transform\.dense\.weight|lm_head\.dense\.weight": (0, 1),
        r"cls\.predictions\.transform\.(dense\.bias|LayerNorm\..*)|lm_head\.(dense\.bias|layer_norm\..*)": (0,),
        r"(cls\.predictions|lm_head)\.decoder\.weight": (1,), r"(cls\.predictions|lm_head)\.decoder\.bias": (),
    },
    kept=r"attention\.self\.distance_embedding\.weight",
)  # fmt: skip
_DEBERTA_OUTSIDE = {
    **_EMBEDDINGS, r"encoder\.rel_embeddings\.weight": (1,), r"encoder\.(conv\.)?LayerNorm\..*": (0,),
    r"encoder\.conv\.conv\.weight": (0, 1), r"encoder\.conv\.conv\.bias": (0,),
    r"pooler\.dense\.weight": (1,), r"pooler\.dense\.bias": (),
}  # fmt: skip
_DEBERTA_2 = Family(
    ("deberta.",), _BERT.neurons,
    _writes(*(f"attention.self.{p}_proj" for p in ("query", "key", "value", "pos_key", "pos_query")))
    + _reads("attention.output.dense"),
    _BERT.norms, _DEBERTA_OUTSIDE,
)  # fmt: skip
_DEBERTA = Family(
    ("deberta.",), _BERT.neurons,
    _writes("attention.self.in_proj", wide=3)
    + _writes(*(f"attention.self.{p}" for p in ("q_bias", "v_bias", "pos_proj", "pos_q_proj")))
    + _reads("attention.output.dense"),
    _BERT.norms, _DEBERTA_OUTSIDE,
)  # fmt: skip
_DISTILBERT = Family(
    ("distilbert.",), _writes("ffn.lin1") + _reads("ffn.lin2"),
    _writes("attention.q_lin", "attention.k_lin", "attention.v_lin") + _reads("attention.out_lin"),
    r"(sa|output)_layer_norm",
    {
        **_EMBEDDINGS, r"pre_classifier\.weight": (1,), r"pre_classifier\.bias": (), r"vocab_projector\.weight": (1,),
        r"vocab_projector\.bias": (), r"vocab_transform\.weight": (0, 1),
        r"vocab_(transform\.bias|layer_norm\..*)": (0,),
    },
)  # fmt: skip
_LLAMA = Family(
    ("model.",), _writes("mlp.gate_proj", "mlp.up_proj") + _reads("mlp.down_proj"),
    _writes("self_attn.q_proj") + _writes("self_attn.k_proj", "self_attn.v_proj", grouped=True)
    + _reads("self_attn.o_proj"),
    r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm",
    {r"(embed_tokens|lm_head|score)\.weight": (1,), r"norm\.weight": (0,), r"score\.bias": ()},
    kept=r"self_attn\.([qk]_norm\.weight|rotary_emb\.inv_freq)", rotary=True, head_width="head_dim",
)  # fmt: skip
_GPT2 = Family(
    ("transformer.",), _writes("mlp.c_fc") + _reads("mlp.c_proj"),
    tuple(Port("attn.c_attn", part=i, parts=3) for i in range(3)) + _reads("attn.c_proj"),
    r"ln_[12]", {r"(wte|wpe|lm_head|score)\.weight": (1,), r"ln_f\.(weight|bias)": (0,)},
    kept=r"attn\.(bias|masked_bias)", input_first=True,
)  # fmt: skip
_VIT_OUTSIDE = {
    r"embeddings\.(cls_token|distillation_token|position_embeddings|mask_token)": (2,), r"layernorm\..*": (0,),
    r"embeddings\.patch_embeddings\.projection\.(weight|bias)": (0,), r"pooler\.dense\.weight": (1,),
    r"pooler\.dense\.bias": (),
}  # fmt: skip
_VIT = Family(
    ("vit.", "deit."), _writes("mlp.fc1") + _reads("mlp.fc2"),
    _writes("attention.q_proj", "attention.k_proj", "attention.v_proj") + _reads("attention.o_proj"),
    r"layernorm_(before|after)", _VIT_OUTSIDE,
)  # fmt: skip
_VIT_FIRST = Family(  # as the library stored it before its fifth version
    ("vit.", "deit."), _BERT.neurons,
    _writes(*(f"attention.attention.{p}" for p in ("query", "key", "value"))) + _reads("attention.output.dense"),
    r"layernorm_(before|after)", _VIT_OUTSIDE,
)  # fmt: skip
_NEOX = Family(
    ("gpt_neox.",), _writes("mlp.dense_h_to_4h") + _reads("mlp.dense_4h_to_h"),
    _writes("attention.query_key_value", wide=3) + _reads("attention.dense"),
    r"(input|post_attention)_layernorm",
    {r"(embed_in|embed_out|lm_head|score)\.weight": (1,), r"final_layer_norm\.(weight|bias)": (0,)},
    kept=r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)", rotary=True,
)  # fmt: skip
_MODERNBERT = Family(
    ("model.",), tuple(Port("mlp.Wi", part=i, parts=2) for i in range(2)) + _reads("mlp.Wo"),
    tuple(Port("attn.Wqkv", part=i, parts=3) for i in range(3)) + _reads("attn.Wo"),
    r"(attn|mlp)_norm",
    {
        r"embeddings\.tok_embeddings\.weight": (1,), r"(embeddings\.norm|final_norm|head\.norm)\.(weight|bias)": (0,),
        r"head\.dense\.weight": (0, 1), r"head\.dense\.bias": (0,), r"decoder\.weight": (1,), r"decoder\.bias": (),
    },
    rotary=True,
)  # fmt: skip
_WAV2VEC2 = Family(  # its positions are a convolution by groups: the hidden channels keep their order
    ("wav2vec2.",), _writes("feed_forward.intermediate_dense") + _reads("feed_forward.output_dense"),
    _writes("attention.q_proj", "attention.k_proj", "attention.v_proj") + _reads("attention.out_proj"),
    r"(final_)?layer_norm",
    {
        r"projector\.weight": (1,),
        r"(masked_spec_embed|(feature_projection\.projection|encoder\.layer_norm)\..*)": (0,),
        r"(projector\.bias|classifier\..*|feature_extractor\..*|feature_projection\.layer_norm\..*)": (),
    },
)  # fmt: skip
_WHISPER = Family(  # the encoder alone
    ("encoder.",), _writes("fc1") + _reads("fc2"),
    _writes("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") + _reads("self_attn.out_proj"),
    r"(self_attn|final)_layer_norm",
    {
        r"conv1\.(weight|bias)": (0,), r"conv2\.weight": (0, 1), r"conv2\.bias": (0,),
        r"embed_positions\.weight": (1,), r"layer_norm\.(weight|bias)": (0,), r"projector\.weight": (1,),
        r"(projector\.bias|classifier\.(weight|bias))": (),
    },
)  # fmt: skip
FAMILIES: Mapping[str, tuple[Family, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), (_BERT,)),
    "deberta-v2": (_DEBERTA_2,), "deberta": (_DEBERTA,), "distilbert": (_DISTILBERT,),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), (_LLAMA,)),
    **dict.fromkeys(("vit", "deit"), (_VIT, _VIT_FIRST)),
    "gpt2": (_GPT2,), "gpt_neox": (_NEOX,), "modernbert": (_MODERNBERT,),
    "wav2vec2": (_WAV2VEC2,), "whisper": (_WHISPER,),
}  # fmt: skip
