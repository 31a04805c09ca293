"""What a student learns from inside the teacher: hidden states of chosen layers (``loss.layers``)."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from kdscale.config.schedule import Scheduled, within
from kdscale.config.section import Section
from kdscale.spec import LayerDistance

Weight = Annotated[Scheduled, AfterValidator(within(lambda v: v >= 0, "be 0 or more"))]


class LayersSection(Section):
    """Layer 0 is what the first block is given (the embedding's output), layer ``i`` what block ``i`` puts out, counted from 1;
    the last one is taken before the final norm."""

    pairs: dict[int, int] = Field(min_length=1)
    """``{student's layer: teacher's layer}``: the one learns to be like the other. A teacher's layer may stand in several."""
    distance: LayerDistance = "cosine"
    """mse: mean over the width of the squared difference (TinyBERT); cosine: 1 - cos, which is half of Patient KD's distance.
    Language models have a few numbers much larger than all others, which an mse is mostly about."""
    weight: Weight = 1.0
    """What the distances, summed over the pairs, are multiplied by before they are added to the loss. A number or a schedule."""
    projection: Literal["learned", "none"] = "learned"
    """learned: each pair has a linear map from the student's width to the teacher's, trained with the student and not exported;
    none: the states are compared as they are, in models of one width."""
    encoding: Literal["bfloat16", "int8"] = "bfloat16"
    """How the teacher's states travel. int8 has one scale a row: beside a number that is much larger than all others, those
    are lost."""

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """What is asked of the teacher, ascending."""
        return tuple(sorted(set(self.pairs.values())))

    @field_validator("pairs")
    @classmethod
    def _counted_from_0(cls, pairs: dict[int, int]) -> dict[int, int]:
        if (least := min(*pairs.keys(), *pairs.values())) < 0:
            raise ValueError(
                f"layer {least}: layers count from 0, the embedding's output; layer i is the output of block i"
            )
        return pairs
