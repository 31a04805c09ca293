"""The one place that undoes DeepSpeed's averaging.

A rank's micro-batch yields a loss *sum*. DeepSpeed divides each backward by the accumulation steps (in a pipeline: on the
last stage) and averages gradients over the data ranks (not over the stages); the gradient wanted is
``sum over the step / tokens of the step``, however it is cut.
"""


def backward_factor(num_tokens_step: int, micro_steps: int, data_ranks: int) -> float:
    """What a micro-batch's loss sum is multiplied by before ``engine.backward``.

    ``num_tokens_step`` counts the trained tokens of the whole optimizer step, over all ranks and micro-batches; a step
    without any contributes nothing (factor 0).
    """
    return micro_steps * data_ranks / num_tokens_step if num_tokens_step else 0.0
