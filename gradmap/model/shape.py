"""The sizes of a decoder, which are all that its costs depend on. They are in its config; torch is
not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmap.common.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A decoder: width d, inner width k of the FFN, layers, heads of keys and values over heads,
    vocabulary; head tied or not.

    attention: heads x size of a head, where that is not d. gated: whether the FFN has a gate beside
    its up projection. Of a mixture of experts, inner is that of all experts together that one token
    passes, and stored_inner of all that there are; experts: how many its router chooses from. Where
    layers differ, these are means over layers. head_cost: what the head takes with the loss behind
    it, in products of its size: 1 by FLOPs, and on a real machine more.
    """

    name: str
    width: int
    inner: float
    layers: int
    kv_share: float
    vocabulary: int
    tied: bool = False
    attention: int | None = None
    gated: bool = True
    stored_inner: float | None = None
    experts: float = 0
    head_cost: float = 1.0

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str = "") -> Shape:
        """The shape that a checkpoint's config tells, with its family's defaults filled in
        (gradmap.model.checkpoint.complete_config).

        Raises UserError if the family's sizes are not known, or one is missing.
        """
        family = config.get("model_type")
        if family not in _FIELDS:
            raise UserError(
                f"The sizes of a {family} model cannot be read; known are "
                f"{', '.join(sorted(_FIELDS))}."
            )
        fields = _FIELDS[family]
        heads, width = _size(config, fields.heads), _size(config, fields.width)
        kv_heads = config.get("num_key_value_heads") or heads
        attention = heads * int(config.get("head_dim") or width // heads)
        return cls(
            name=name or str(family),
            width=width,
            layers=_size(config, fields.layers),
            kv_share=kv_heads / heads,
            vocabulary=_size(config, "vocab_size"),
            tied=bool(_size(config, "tie_word_embeddings")),
            attention=attention,
            gated=fields.gated,
            **_feed_forward(config, fields, width),
        )

    @property
    def attention_width(self) -> int:
        return self.width if self.attention is None else self.attention

    @property
    def layer_parameters(self) -> float:
        """Parameters of a layer, as they are stored."""
        return self._parameters_with(self.inner if self.stored_inner is None else self.stored_inner)

    @property
    def active_parameters(self) -> float:
        """Parameters of a layer that one token is multiplied with."""
        return self._parameters_with(self.inner)

    @property
    def map_inputs(self) -> float:
        """The widths of what enters a layer's linear maps, added up."""
        gates = 2 if self.gated else 1
        return (3 + gates) * self.width + self.attention_width + self.inner

    @property
    def map_outputs(self) -> float:
        """Widths of what leaves the linear maps of a layer, added up."""
        gates = 2 if self.gated else 1
        return 2 * self.width + (1 + 2 * self.kv_share) * self.attention_width + gates * self.inner

    @property
    def head_parameters(self) -> float:
        return self.width * self.vocabulary

    def parameters(self, layers: float) -> float:
        return layers * self.layer_parameters + self.head_parameters * (1 if self.tied else 2)

    def read_parameters(self, layers: float, tokens: int = 1) -> float:
        """Parameters that so many tokens read together: no input embeddings but rows, and of a
        mixture the experts that they are routed to."""
        return (
            layers * min(self.layer_parameters, tokens * self.active_parameters)
            + self.head_parameters
        )

    def layer_flops(self, layers: float) -> float:
        """FLOPs of one token in so many layers; attention's own products are left out, for samples
        are short."""
        return 2 * layers * self.active_parameters

    @property
    def head_flops(self) -> float:
        """FLOPs of one token in the head."""
        return 2 * self.head_cost * self.head_parameters

    def forward_flops(self, layers: float) -> float:
        """FLOPs of one token in so many layers and the head."""
        return self.layer_flops(layers) + self.head_flops

    def _parameters_with(self, inner: float) -> float:
        attention = self.width * self.attention_width * (2 + 2 * self.kv_share)
        feed_forward = (3 if self.gated else 2) * self.width * inner
        return attention + feed_forward + self.width * self.experts


@dataclass(frozen=True)
class _Fields:
    """What a family calls its sizes. gated: see Shape. experts, expert_inner: of a mixture, how
    many FFNs a layer has, and how wide each is."""

    width: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    inner: str = "intermediate_size"
    gated: bool = True
    experts: str | None = None
    expert_inner: str = "moe_intermediate_size"


_GATED = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "smollm3"),
    *("granite", "olmo2", "olmo3", "stablelm", "cohere", "cohere2", "glm4", "seed_oss", "helium"),
    *("ernie4_5", "exaone4"),
)
_UNGATED = ("starcoder2", "phi", "gpt_neox", "arcee", "apertus", "nemotron")
_FIELDS = {
    **dict.fromkeys(_GATED, _Fields()),
    **dict.fromkeys(_UNGATED, _Fields(gated=False)),
    "mixtral": _Fields(experts="num_local_experts", expert_inner="intermediate_size"),
    "qwen2_moe": _Fields(experts="num_experts"),
    "qwen3_moe": _Fields(experts="num_local_experts"),
    "opt": _Fields(inner="ffn_dim", gated=False),
    "gpt2": _Fields(width="n_embd", layers="n_layer", heads="n_head", inner="n_inner", gated=False),
}


def _feed_forward(config: Mapping[str, Any], fields: _Fields, width: int) -> dict[str, float]:
    """inner, and of a mixture stored_inner and experts: means over layers, of which some may be
    dense."""
    is_gpt2_default = fields.inner == "n_inner" and config.get("n_inner") is None
    plain = 4 * width if is_gpt2_default else _size(config, fields.inner)
    if fields.experts is None:
        return {"inner": plain}
    experts, active = _size(config, fields.experts), _size(config, "num_experts_per_tok")
    of_expert = _size(config, fields.expert_inner)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    share = _share_of_sparse_layers(config, _size(config, fields.layers))
    return {
        "inner": share * (active * of_expert + shared) + (1 - share) * plain,
        "stored_inner": share * (experts * of_expert + shared) + (1 - share) * plain,
        "experts": share * experts,
    }


def _share_of_sparse_layers(config: Mapping[str, Any], layers: int) -> float:
    """Qwen: every n-th layer has experts, but for those listed."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers)) / layers


def _size(config: Mapping[str, Any], name: str) -> int:
    if config.get(name) is None:
        raise UserError(f"The config has no {name}, so that the model's sizes are not known.")
    return int(config[name])
