"""How far what an engine computes is from what headfold's runtime computes."""

from dataclasses import dataclass

from .ask import Answer
from .expected import Expected

SAME_KL = 1e-6
"""Nats per token, in the mean. Engines that compute in float32 are below 1e-11; a GELU from a table in float16, as in llama.cpp, costs
2e-7."""
MOST_KL = 1e-4
"""Nats at any one token."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """An engine's answer beside that of headfold's runtime."""

    kl: float
    """Of the runtime's next-token distribution from the engine's, nats per token."""
    greatest_kl: float
    """At one token."""
    greatest_difference: float
    """Of a log-probability."""
    num_same_greedy: int
    num_greedy: int
    same_tokens_of_text: bool | None
    """Whether both divide the text alike; None where the driver does not say."""

    @property
    def is_same(self) -> bool:
        """Whether the engine computes the same model, and reads text as the same tokens."""
        same_text = self.same_tokens_of_text is not False
        same = abs(self.kl) <= SAME_KL and self.greatest_kl <= MOST_KL
        return same and self.num_same_greedy == self.num_greedy and same_text


def likeness(answer: Answer, wanted: Expected) -> Likeness:
    """Return how far an answer is from what headfold's runtime computes.

    Logits of new tokens are compared as long as both have read the same. Engines may have logits for more entries than the vocabulary
    has, which are left out.
    """
    same = [a == b for a, b in zip(answer.greedy, wanted.greedy, strict=False)]
    expected = wanted.written_logits[: [*same, False].index(False) + 1] if answer.of_written else wanted.logits
    ours = expected.double().log_softmax(-1)
    theirs = answer.logits[: len(ours), : ours.shape[-1]].log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    return Likeness(
        kl=kl.mean().item(),
        greatest_kl=kl.max().item(),
        greatest_difference=(ours - theirs).abs().max().item(),
        num_same_greedy=sum(same),
        num_greedy=len(wanted.greedy),
        same_tokens_of_text=None if answer.tokens is None else answer.tokens == wanted.tokens,
    )
