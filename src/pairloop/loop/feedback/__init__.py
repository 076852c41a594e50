"""Feedback: a pick, thumb, score, comment or edit becomes a durable row; idempotent by id, revisable, never guessed.

Rows are judged against the group they name inside the transaction that writes them. What cannot be right is refused with the
field's name; what is doubtful (an instant pick, say) is kept, and set aside later with its reason.
"""

from pairloop.loop.feedback.outcomes import Applied, ConversationValue, record_outcome, submit_outcome
from pairloop.loop.feedback.picks import Outcome, Pick, record_preference, submit_preference
from pairloop.loop.feedback.record import Recorded, is_revealed
from pairloop.loop.feedback.repeats import submit_repeat
from pairloop.loop.feedback.reserved import submit_reserved
from pairloop.loop.feedback.values import MetricValue, record_metric, submit_metric

__all__ = [
    "Applied",
    "ConversationValue",
    "MetricValue",
    "Outcome",
    "Pick",
    "Recorded",
    "is_revealed",
    "record_metric",
    "record_outcome",
    "record_preference",
    "submit_metric",
    "submit_outcome",
    "submit_preference",
    "submit_repeat",
    "submit_reserved",
]
