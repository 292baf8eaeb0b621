"""What only some methods can be asked for. The options of `gradmap prune` are made of these too."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gradmap.common.reading import Strict
from gradmap.model.sublayers import Pair


class MethodOptions(Strict):
    """Options of methods; each method names the class that it reads. purpose: what they are, where
    their names do not tell."""

    purpose: ClassVar[str] = ""


class ManualOptions(MethodOptions):
    """layers: in order of removal."""

    purpose: ClassVar[str] = "the order of removal"
    layers: list[Pair] = Field(
        default_factory=list,
        description="For --selector manual: which layers, in order of removal, such as 21,22; with "
        "--unit pair M20+A21 too, the FFN of layer 20 and the attention of 21.",
    )


class ProjectionOptions(MethodOptions):
    """Variations of GradMAP's stage 2, for its ablations.

    top_z: how many layers are corrected, those that drifted most (Table 12). side: which side of
    the weight W' is on (Table 11). target: the linear map, by the first part of its name: q for
    q_proj (Table 6). unregularised: whether the objective lacks Eq. 12 (Table 9).
    """

    top_z: int = Field(1, ge=1, description="projection: how many layers, those that drifted most.")
    side: Literal["left", "right"] = Field(
        "left", description="projection: the side of the weight that W' is on."
    )
    target: str = Field(
        "down",
        description="projection: the linear map to correct, down, or q, k, v, o, up, gate by Adam.",
    )
    unregularised: bool = Field(False, description="projection: leave Eq. 12 out of the objective.")


AS_PUBLISHED = ProjectionOptions()
