"""A student with another tokenizer than its teacher's: how the two are brought together."""

from typing import Literal, get_args

from pydantic import Field

from kdscale.config.section import Section
from kdscale.spec import SEPARABLE, DivergenceName, Payload

Method = Literal["gold", "uld"]
ALIGNABLE: tuple[Payload, ...] = ("topk", "hidden", "dense")
"""Payloads that tell how likely the tokens of a text were, and how large the largest probabilities are. Samples estimate what is
linear in the probabilities, and neither a product of them nor their order is."""


class AlignmentSection(Section):
    method: Method | None = None
    """How a student with a tokenizer of its own learns from the teacher, on spans of bytes that both end at. gold: what both
    vocabularies spell alike, and the text itself, by ``loss.divergence``, the rest by sorted probabilities; uld: sorted
    probabilities alone (arXiv 2402.12030). ``kdscale.losses.aligned`` defines both. None: teacher and student share one."""
    tokenizer: str | None = None
    """The student's: directory, hub name or SentencePiece ``.model`` file (``kdscale tokenizer train`` makes one)."""
    unmatched_weight: float = Field(0.1, ge=0)
    """``gold``: weight of the sorted distance beside the divergence."""

    def refusal(
        self,
        *,
        task: str,
        payload: Payload,
        divergence: DivergenceName,
        temperatures: tuple[float, float],
        pipeline: int,
        soft: bool,
        several: bool,
    ) -> str | None:
        """Why the rest of a config does not go with the section; none where it does."""
        if self.method is None:
            unread = [name for name in ("tokenizer", "unmatched_weight") if getattr(self, name) != _default(name)]
            if unread:
                methods = " or ".join(get_args(Method))
                return (
                    f"alignment.{unread[0]} is not read without alignment.method; set that to {methods}, or remove it"
                )
            return None
        what = f"alignment.method = {self.method}"
        if self.tokenizer is None:
            return f"{what}: alignment.tokenizer is missing: the student's directory, hub name or .model file"
        if task != "language-modelling":
            return f"{what} aligns text token by token, and task = {task} has one position a row; remove the section"
        if several:
            return f"{what} brings one teacher's tokens together with the student's; remove teachers.others"
        if pipeline > 1:
            return (
                f"{what} with student.parallel.pipeline = {pipeline} is not supported; use student.parallel.data, with any"
                " ZeRO stage"
            )
        if not soft:
            return None
        if payload not in ALIGNABLE:
            return (
                f"{what} cannot be had from targets.payload = {payload}: how likely a span is, is a product of"
                f" probabilities; use targets.payload = {' or '.join(ALIGNABLE)}"
            )
        if set(temperatures) != {1.0}:
            return (
                f"{what} compares probabilities of text, which are those at temperature 1, and loss.temperature goes from"
                f" {temperatures[0]:g} to {temperatures[1]:g}; set loss.temperature: 1"
            )
        if self.method == "uld" and divergence != "forward_kl":
            return f"{what} has a distance of its own and does not read loss.divergence = {divergence}; remove that"
        if divergence not in SEPARABLE:
            return f"{what} needs a sum over outcomes; use loss.divergence = {', '.join(SEPARABLE)}"
        return None


def _default(name: str) -> object:
    return AlignmentSection.model_fields[name].default
