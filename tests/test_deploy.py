"""Deploying: a version is probed before an alias names it, and every move is one transaction with its record."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection
from tests.loop_rig import Rig, open_rig, settings

from pairloop.errors import ConflictError, EngineError, ModelError, NotFoundError
from pairloop.loop import deploy
from pairloop.policy.fake import FakePolicy, FakeTokens, write_skill
from pairloop.store import cycles, doctor, duels, new_id, versions
from pairloop.store.versions import Promotion, PromotionAction
from pairloop.types import Alias, Cycle, CycleState, CycleStep, Duel, Prompt, Version, VersionKind

NOW = datetime(2026, 1, 5, tzinfo=UTC)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with open_rig(settings(tmp_path)) as opened:
        yield opened


def add_version(rig: Rig, skill: int, *, parent: int = 0) -> Version:
    with rig.store.artifacts.stage() as folder:
        write_skill(folder, skill)
        artifact = rig.store.artifacts.publish(folder, {})

    def insert(c: Connection) -> Version:
        version = Version(
            policy="bot",
            number=versions.next_number(c, "bot"),
            kind=VersionKind.ADAPTER,
            path=str(artifact.path),
            artifact_hash=artifact.hash,
            parent=parent,
            dataset_id=None,
            run_id=None,
            created_at=NOW,
        )
        versions.insert(c, version)
        return version

    return rig.store.write(insert)


def add_cycle(rig: Rig) -> str:
    cycle = Cycle(new_id("cycle"), "bot", 1, 0, "test", NOW, (CycleStep(CycleState.CHECKING, {}, NOW),))
    rig.store.write(lambda c: cycles.insert(c, cycle))
    return cycle.cycle_id


def version(rig: Rig, number: int) -> Version:
    with rig.store.reading() as c:
        found = versions.get(c, "bot", number)
    assert found is not None
    return found


def nothing(_c: Connection, _duel: Duel) -> None:
    return None


def aliases(rig: Rig) -> tuple[int | None, int | None]:
    with rig.store.reading() as c:
        return versions.alias(c, "bot", Alias.CHAMPION), versions.alias(c, "bot", Alias.CHALLENGER)


def history(rig: Rig) -> list[tuple[str, int, int | None]]:
    with rig.store.reading() as c:
        return [(event.action, event.number, event.previous) for event in versions.promotions(c, "bot")]


def test_a_duel_opens_with_its_alias_and_its_record(rig: Rig) -> None:
    challenger = add_version(rig, 1)
    seen: list[str] = []
    cycle_id = add_cycle(rig)
    duel = deploy.open_duel(
        rig.store,
        rig.policy,
        cycle_id=cycle_id,
        champion=version(rig, 0),
        challenger=challenger,
        also=lambda _c, opened: seen.append(opened.duel_id),
    )
    assert seen == [duel.duel_id]
    assert aliases(rig) == (0, 1)
    assert rig.duel == duel
    assert rig.policy.loaded() == {0, 1}


def test_a_record_that_fails_undoes_the_move(rig: Rig) -> None:
    challenger = add_version(rig, 1)
    cycle_id = add_cycle(rig)

    def refuse(_c: Connection, _duel: Duel) -> None:
        raise ConflictError("the lease is gone")

    with pytest.raises(ConflictError, match="lease"):
        deploy.open_duel(rig.store, rig.policy, cycle_id=cycle_id, champion=version(rig, 0), challenger=challenger, also=refuse)
    assert aliases(rig) == (0, None)
    with rig.store.reading() as c:
        assert duels.current(c, "bot") is None


def test_a_version_that_answers_like_its_parent_is_refused(rig: Rig) -> None:
    same = add_version(rig, 0)
    with pytest.raises(EngineError, match="log-probs of its parent bot@0"):
        deploy.promote(rig.store, rig.policy, same, reason="test")
    assert aliases(rig) == (0, None)
    assert history(rig) == []


class BreaksPrefixRule(FakeTokens):
    """A template that renders earlier turns otherwise once they are answered: it serves, and cannot write a given answer."""

    def encode_completion(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        raise ModelError(f"the chat template breaks the prefix rule on {prompt!r} and {text!r}")


class WithSuchTemplate(FakePolicy):
    @property
    def tokens(self) -> FakeTokens:
        return BreaksPrefixRule()


def test_a_template_that_breaks_the_prefix_rule_is_probed_on_sampled_tokens(rig: Rig) -> None:
    better, same = add_version(rig, 1), add_version(rig, 0)
    policy = WithSuchTemplate()
    deploy.load(policy, better, version(rig, 0))
    with pytest.raises(EngineError, match="log-probs of its parent"):
        deploy.load(policy, same, version(rig, 0))
    policy.close()


def test_a_version_that_cannot_be_loaded_is_refused(rig: Rig) -> None:
    broken = add_version(rig, 1)
    (Path(broken.path) / "fake.json").write_text("{")
    with pytest.raises(ModelError, match="not a fake version"):
        deploy.promote_by_hand(rig.store, rig.policy, "bot", number=broken.number, reason="test")
    assert aliases(rig) == (0, None)


def test_promotion_ends_the_duel(rig: Rig) -> None:
    challenger = add_version(rig, 1)
    deploy.open_duel(
        rig.store, rig.policy, cycle_id=add_cycle(rig), champion=version(rig, 0), challenger=challenger, also=nothing
    )
    moved = deploy.promote(rig.store, rig.policy, challenger, reason="won", replacing=0)
    assert (moved.action, moved.number, moved.previous, moved.reason) == ("promote", 1, 0, "won")
    assert aliases(rig) == (1, None)
    with rig.store.reading() as c:
        assert duels.current(c, "bot") is None
    with pytest.raises(ConflictError, match="champion already"):
        deploy.promote(rig.store, rig.policy, challenger, reason="again")


def test_promotion_over_a_champion_that_was_not_the_opponent_is_refused(rig: Rig) -> None:
    one, two = add_version(rig, 1), add_version(rig, 2)
    deploy.promote(rig.store, rig.policy, one, reason="by hand")
    with pytest.raises(ConflictError, match="no longer the champion"):
        deploy.promote(rig.store, rig.policy, two, reason="won against 0", replacing=0)
    assert aliases(rig) == (1, None)


def test_retiring_archives_the_challenger(rig: Rig) -> None:
    challenger = add_version(rig, 1)
    deploy.open_duel(
        rig.store, rig.policy, cycle_id=add_cycle(rig), champion=version(rig, 0), challenger=challenger, also=nothing
    )
    deploy.retire(rig.store, rig.policy, challenger, reason="undecided")
    assert aliases(rig) == (0, None)
    assert history(rig) == [("retire", 1, 0)]
    assert rig.policy.loaded() == {0}
    with rig.store.reading() as c:
        assert duels.current(c, "bot") is None
        assert duels.list_(c, "bot")[0].closed_at is not None


def test_rollback_goes_back_one_champion_at_a_time(rig: Rig) -> None:
    for skill, parent in ((1, 0), (2, 1)):
        deploy.promote(rig.store, rig.policy, add_version(rig, skill, parent=parent), reason="won")
    assert deploy.rollback(rig.store, "bot", reason="odd").number == 1
    assert deploy.rollback(rig.store, "bot", reason="still odd").number == 0  # not back to 2
    with pytest.raises(ConflictError, match="nothing to roll back to"):
        deploy.rollback(rig.store, "bot", reason="more")
    assert history(rig)[2:] == [("rollback", 1, 2), ("rollback", 0, 1)]
    assert aliases(rig) == (0, None)
    assert doctor.check(rig.store) == []


def test_rollback_to_a_named_version(rig: Rig) -> None:
    for skill, parent in ((1, 0), (2, 1)):
        deploy.promote(rig.store, rig.policy, add_version(rig, skill, parent=parent), reason="won")
    never = add_version(rig, 3, parent=2)
    with pytest.raises(NotFoundError, match="no version 9"):
        deploy.rollback(rig.store, "bot", to=9, reason="odd")
    with pytest.raises(ConflictError, match="no earlier champion"):
        deploy.rollback(rig.store, "bot", to=never.number, reason="odd")
    with pytest.raises(ConflictError, match="champion already"):
        deploy.rollback(rig.store, "bot", to=2, reason="odd")
    rig.policy.unload(0)
    assert deploy.rollback(rig.store, "bot", to=0, reason="odd", policy=rig.policy).previous == 2
    assert aliases(rig)[0] == 0
    with pytest.raises(NotFoundError, match="no policy"):
        deploy.rollback(rig.store, "unknown", reason="odd")


@pytest.mark.parametrize(
    ("moves", "champions"),
    [
        ([], [0]),
        ([("promote", 1), ("promote", 2)], [0, 1, 2]),
        ([("promote", 1), ("retire", 2), ("promote", 3)], [0, 1, 3]),
        ([("promote", 1), ("promote", 2), ("rollback", 1)], [0, 1]),
        ([("promote", 1), ("promote", 2), ("rollback", 0), ("promote", 3)], [0, 3]),
        ([("promote", 1), ("promote", 2), ("promote", 1), ("rollback", 2)], [0, 1, 2]),
    ],
)
def test_past_champions(moves: list[tuple[PromotionAction, int]], champions: list[int]) -> None:
    events = [Promotion("bot", number, None, action, "", None, NOW) for action, number in moves]
    assert versions.past_champions(events) == champions
