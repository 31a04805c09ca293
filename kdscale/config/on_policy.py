"""What on-policy distillation means: text the student writes, on which the teacher judges it. No torch."""

from pydantic import Field

from kdscale.config.section import Section
from kdscale.errors import ConfigError


class OnPolicySection(Section):
    """On-policy distillation (GKD: Agarwal et al. 2024, arXiv 2306.13649): in a share of the steps the student learns, from
    the teacher alone, on what it has itself written. Its presence asks for the measure on the student's own text too.

    Prompts are found as ``kdscale generate`` finds them: what stands before the first trained token of a training document, or
    the beginnings of pieces of plain text.
    """

    fraction: float = Field(0.5, ge=0, le=1)
    """Share of the steps whose batch is text of the student, spread evenly. 0: none, and the measure alone."""
    refresh_steps: int = Field(4, ge=1)
    """The text is written with the weights of every so many steps: those that stand at a multiple of it."""
    lag_steps: int = Field(2, ge=0)
    """The weights a step's text is written with are older than the step by so many steps or more (by less than this and
    ``refresh_steps`` together). Writing and training overlap where it is 1 or more."""
    prompt_tokens: int = Field(32, ge=1)
    """Most tokens of a prompt: of plain text its beginning; a longer prompt of a conversation is left out."""
    new_tokens: int = Field(64, ge=1)
    """Most tokens the student writes behind a prompt."""
    temperature: float = Field(1.0, ge=0, le=100)
    """0: always the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Draw among so many likeliest tokens; 0: among all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that hold this much of the probability."""
    heldout_prompts: int = Field(32, ge=1)
    """Of the held-out text: most prompts the student writes on from to be measured, before and after training."""
    batch_rows: int = Field(16, ge=1)
    """Continuations that are written at a time."""
    ranks: int = Field(1, ge=1)
    """Ray actors that write, each with a whole student; a step's text is written by one of them."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPU cores and threads of a rank."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs of a rank; 0 runs on CPU."""
    start_seconds: float = Field(600, gt=0)
    """Limit until the ranks are processes, and again until they are built."""
    heartbeat_seconds: float = Field(20, ge=1)
    """A rank that leaves a heartbeat unanswered for this long is lost; a dead one is noticed at once."""
    restarts: int = Field(3, ge=0)
    """How often in a row the ranks are started again, after one was lost, while the student waits."""
    restart_wait_seconds: float = Field(1, gt=0)
    """Like ``teacher.restart_wait_seconds``."""
    restart_forget_seconds: float = Field(600, gt=0)
    """Like ``teacher.restart_forget_seconds``."""
    give_up_seconds: float = Field(900, gt=0)
    """When a step's text is waited for and writers and student have made nothing for this long, the run ends."""

    @property
    def longest_text(self) -> int:
        """Tokens that prompt, continuation and end token take at most."""
        return self.prompt_tokens + self.new_tokens + 1


def require_none(section: OnPolicySection | None) -> None:
    """Raises: ConfigError where there is no Ray to start who writes."""
    if section is not None:
        raise ConfigError(
            "on_policy: who writes the student's text are Ray actors, and the DeepSpeed launcher starts none; use `kdscale"
            " train` (with --teacher-endpoints for a teacher that is served elsewhere), or remove the section"
        )
