"""From a snapshot's rows to groups of token ids, with a reason for every row that cannot be used. No torch."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pairloop.errors import InvalidRequestError, UserError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.policy.protocols import TokenCompletion, Tokens
from pairloop.types import PairSide, PreferencePair, TrainingRow

GROUP_FAMILY = frozenset({"grpo", "rloo", "dr_grpo", "dapo"})
"""Objectives that compare rewards within a group, so that one of equal rewards has nothing to say."""
ANY_SIZE = GROUP_FAMILY | {"kto", "sft"}
"""Objectives that take groups of any size; the others take pairs."""


class UnfitRows(UserError):
    """The rows are of a kind that the objective cannot learn from."""


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A prompt and its completions with a reward each. A preference pair is the group (chosen, rejected) with rewards (1, 0).

    ``is_fresh``: the reference sampled all completions, and their log-probs were recorded.
    """

    group_id: str
    prompt: tuple[int, ...]
    completions: tuple[TokenCompletion, ...]
    rewards: tuple[float, ...]
    weight: float = 1.0
    tempered: bool = False
    is_fresh: bool = False

    @property
    def is_demonstration(self) -> bool:
        """True of a lone good answer that no policy is known to have sampled: importance weights have no meaning for it."""
        return len(self.completions) == 1 and self.rewards[0] > 0 and not self.is_recorded

    @property
    def is_recorded(self) -> bool:
        """True where every completion has the log-probs of what sampled it."""
        return all(completion.logps for completion in self.completions)

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt) + max(len(completion.token_ids) for completion in self.completions)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences, the prompt counted with each."""
        return sum(len(self.prompt) + len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model can read: ids below ``vocab_size``, sequences of at most ``max_length`` tokens."""

    max_length: int
    vocab_size: int


def read_split(snapshot_dir: Path, name: str) -> list[TrainingRow]:
    """The rows of one file of the snapshot; a held-out file may be absent."""
    path = snapshot_dir / name
    if name == HELDOUT_FILE and not path.exists():
        return []
    return list(snapshot.read_rows(path))


def tokenize(
    rows: Iterable[TrainingRow], tokens: Tokens, limits: Limits, *, parent_version: int, objective: str = "dpo"
) -> tuple[list[TokenGroup], Counter[str]]:
    """Token ids of the usable rows, in their order, and reason → count of the others.

    Reasons: ``template_refused``, ``empty_prompt``, ``empty_completion``, ``same_tokens`` (all of a group's), ``over_long``,
    ``unknown_token``, ``no_weight``, ``bad_reward``, and for the group family ``equal_rewards``. Rows of the wrong kind are
    `refuse_unfit`'s business.
    """
    usable: list[TokenGroup] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            found = _encode(row, tokens, parent_version)
        except InvalidRequestError:
            dropped["template_refused"] += 1
            continue
        reason = _refusal(found, limits)
        if reason is None and objective in GROUP_FAMILY and len(set(found.rewards)) == 1:
            reason = "equal_rewards"
        if reason is None:
            usable.append(found)
        else:
            dropped[reason] += 1
    return usable, dropped


def refuse_unfit(rows: Sequence[TrainingRow], objective: str) -> None:
    """UnfitRows unless the objective can learn from rows of these kinds; it says from what, and which objectives can."""
    demonstrations = sum(not isinstance(row, PreferencePair) and row.is_demonstration for row in rows)
    if demonstrations and objective not in ("sft", "kto"):
        raise UnfitRows(
            f'train.objective = "{objective}" compares answers, and {demonstrations} of the {len(rows)} rows are '
            'demonstrations, one ideal answer each: train on them with objective "sft", or give rows with two answers or more'
        )
    larger = sum(not isinstance(row, PreferencePair) and len(row.answers) > 2 for row in rows)
    if larger and objective not in ANY_SIZE:
        raise UnfitRows(
            f'train.objective = "{objective}" learns from pairs, and {larger} of the {len(rows)} rows are groups of more than '
            'two answers: take "grpo" or another objective of the group family'
        )


def fingerprint(groups: Sequence[TokenGroup]) -> str:
    """A hash of all that training reads of the groups, in their order."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr(group).encode())
    return digest.hexdigest()


def epoch_batches(n: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices 0..n-1 in the epoch's seeded order, in ceil(n / batch_size) batches whose sizes differ by one at most.

    Even sizes, because each step has the same learning rate: a last batch of one pair would count as much as sixteen.
    """
    order = list(range(n))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    steps = -(-n // batch_size)
    cuts = [n * i // steps for i in range(steps + 1)]
    return [order[start:end] for start, end in pairwise(cuts)]


def _encode(row: TrainingRow, tokens: Tokens, parent_version: int) -> TokenGroup:
    prompt = row.prompt_token_ids or tuple(tokens.encode_prompt(row.prompt))
    sides = (row.chosen, row.rejected) if isinstance(row, PreferencePair) else row.answers
    completions = tuple(_side(row, side, tokens) for side in sides)
    recorded = bool(row.prompt_token_ids and all(completion.logps for completion in completions))
    return TokenGroup(
        group_id=row.row_id,
        prompt=prompt,
        completions=completions,
        rewards=(1.0, 0.0) if isinstance(row, PreferencePair) else row.rewards,
        weight=row.weight,
        tempered=row.tempered,
        is_fresh=recorded and row.sampled_by == parent_version,
    )


def _side(row: TrainingRow, side: PairSide, tokens: Tokens) -> TokenCompletion:
    if not side.token_ids:
        return TokenCompletion(tuple(tokens.encode_completion(row.prompt, side.text)))
    # Log-probs that do not match their tokens one to one, or tokens whose prompt was not kept, cannot be trusted.
    whole = len(side.logps) == len(side.token_ids) and bool(row.prompt_token_ids)
    return TokenCompletion(side.token_ids, side.logps if whole else ())


def _refusal(group: TokenGroup, limits: Limits) -> str | None:
    sides = [completion.token_ids for completion in group.completions]
    if not group.prompt:
        return "empty_prompt"
    if not all(sides):
        return "empty_completion"
    if len(sides) > 1 and len(set(sides)) == 1:
        return "same_tokens"
    if group.length > limits.max_length:
        return "over_long"
    if any(not 0 <= token < limits.vocab_size for ids in (group.prompt, *sides) for token in ids):
        return "unknown_token"
    if not 0 < group.weight < math.inf:
        return "no_weight"
    return None if all(map(math.isfinite, group.rewards)) else "bad_reward"
