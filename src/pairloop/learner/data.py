"""From a snapshot's preference pairs to groups of token ids, with a reason for every pair that cannot be used. No torch."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pairloop.errors import InvalidRequestError
from pairloop.formats import snapshot
from pairloop.formats.snapshot import HELDOUT_FILE
from pairloop.policy.protocols import TokenCompletion, Tokens
from pairloop.types import PairSide, PreferencePair


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


def read_split(snapshot_dir: Path, name: str) -> list[PreferencePair]:
    """The pairs of one file of the snapshot; a held-out file may be absent."""
    path = snapshot_dir / name
    if name == HELDOUT_FILE and not path.exists():
        return []
    return list(snapshot.read(path))


def tokenize(
    pairs: Iterable[PreferencePair], tokens: Tokens, limits: Limits, *, parent_version: int
) -> tuple[list[TokenGroup], Counter[str]]:
    """Token ids of the usable pairs, in their order, and reason → count of the others.

    Reasons: ``template_refused``, ``empty_prompt``, ``empty_completion``, ``same_tokens``, ``over_long``, ``unknown_token``,
    ``no_weight``.
    """
    usable: list[TokenGroup] = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        try:
            found = _encode(pair, tokens, parent_version)
        except InvalidRequestError:
            dropped["template_refused"] += 1
            continue
        reason = _refusal(found, limits)
        if reason is None:
            usable.append(found)
        else:
            dropped[reason] += 1
    return usable, dropped


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


def _encode(pair: PreferencePair, tokens: Tokens, parent_version: int) -> TokenGroup:
    prompt = pair.prompt_token_ids or tuple(tokens.encode_prompt(pair.prompt))
    chosen, rejected = (_side(pair, side, tokens) for side in (pair.chosen, pair.rejected))
    recorded = bool(pair.prompt_token_ids and chosen.logps and rejected.logps)
    return TokenGroup(
        group_id=pair.pair_id,
        prompt=prompt,
        completions=(chosen, rejected),
        rewards=(1.0, 0.0),
        weight=pair.weight,
        tempered=pair.tempered,
        is_fresh=recorded and pair.sampled_by == parent_version,
    )


def _side(pair: PreferencePair, side: PairSide, tokens: Tokens) -> TokenCompletion:
    if not side.token_ids:
        return TokenCompletion(tuple(tokens.encode_completion(pair.prompt, side.text)))
    # Log-probs that do not match their tokens one to one, or tokens whose prompt was not kept, cannot be trusted.
    whole = len(side.logps) == len(side.token_ids) and bool(pair.prompt_token_ids)
    return TokenCompletion(side.token_ids, side.logps if whole else ())


def _refusal(pair: TokenGroup, limits: Limits) -> str | None:
    sides = [completion.token_ids for completion in pair.completions]
    if not pair.prompt:
        return "empty_prompt"
    if not all(sides):
        return "empty_completion"
    if sides[0] == sides[1]:
        return "same_tokens"
    if pair.length > limits.max_length:
        return "over_long"
    if any(not 0 <= token < limits.vocab_size for ids in (pair.prompt, *sides) for token in ids):
        return "unknown_token"
    if not 0 < pair.weight < float("inf"):
        return "no_weight"
    return None
