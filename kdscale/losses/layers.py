"""How far a student's hidden states are from a teacher's.

T = positions trained on, D = hidden size. Reductions in float32 (float64 where both are).
"""

import torch

from kdscale.spec import LayerDistance

_SHORTEST = 1e-8
"""A state of no length has no direction; its cosine with any other is 0."""


def layer_distance(name: LayerDistance, student_TD: torch.Tensor, teacher_TD: torch.Tensor) -> torch.Tensor:
    """[T], >= 0: the distance of each position's two states, of one width; differentiable with respect to both.

    ``mse``: ``mean over D of (s - t)^2``: TinyBERT (Jiao et al. 2019, arXiv 1909.10351), equation 8 with ``s`` the projected
    state ``H_S W_h``, and equation 9 at the embedding.
    ``cosine``: ``1 - s.t / (|s| |t|)``: half of Patient KD's ``|s/|s| - t/|t||^2 = 2 - 2 cos`` (Sun et al. 2019, arXiv
    1908.09355, equation 7), which has it of the [CLS] token, and here every trained token has one.

    A training objective adds ``weight`` times the sum over pairs of layers (TinyBERT, equation 6 with one lambda) and over
    positions.
    """
    student_TD, teacher_TD = (one if one.dtype == torch.float64 else one.float() for one in (student_TD, teacher_TD))
    match name:
        case "mse":
            return (student_TD - teacher_TD).square().mean(-1)
        case "cosine":
            lengths = (torch.linalg.vector_norm(one, dim=-1).clamp_min(_SHORTEST) for one in (student_TD, teacher_TD))
            student_T, teacher_T = lengths
            return 1 - torch.linalg.vecdot(student_TD, teacher_TD) / (student_T * teacher_T)
