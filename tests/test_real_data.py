"""Public preference files through the product's own reader and pair builder, against counts made independently.

A few lines per file turn it into rows that the product reads; every number then comes from ``read_rows`` and
``compile_pairs``. The files are found by PAIRLOOP_TEST_DATA, by default ../shared/data beside the repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pairloop.formats import ReadResult, read_rows, write_rows
from pairloop.loop.pairs import CompiledPairs, PairRules, compile_pairs

DATA = Path(os.environ.get("PAIRLOOP_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data").resolve()

pytestmark = pytest.mark.skipif(not (DATA / "expected_counts.json").exists(), reason=f"no test data in {DATA}")

GSM8K_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

Row = dict[str, Any]
Count = Callable[[ReadResult, CompiledPairs], dict[str, Any]]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: object) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": text}]


def _gsm8k() -> Iterator[Row]:
    for line in _lines("gsm8k/scored_groups.jsonl"):
        answers = [{"content": line[name]["solution"], "score": line[name]["is_correct"]} for name in GSM8K_MODELS]
        yield {"messages": _user(line["question"]), "responses": answers, "source": "code"}


def _taskmaster(name: str) -> Iterator[Row]:
    for line in _lines(f"taskmaster/{name}_thumbs.jsonl"):
        yield {"prompt": line["context"], "completion": line["generation"], "label": line["reward"] == 1.0}


def _pandalm() -> Iterator[Row]:
    labels = {0: "Tie", 1: "A", 2: "B"}
    for line in json.loads((DATA / "pandalm/testset.json").read_text(encoding="utf-8")):
        comparison = {
            "prompt_conversation": _user(f"{line['instruction']}\n\n{line['input']}"),
            "completion_A": _assistant(line["response1"]),
            "completion_B": _assistant(line["response2"]),
        }
        votes = [{"rater_id": f"annotator{i}", "label": labels[line[f"annotator{i}"]]} for i in (1, 2, 3)]
        yield {"comparison": comparison, "labels": votes}


def _llama_factory() -> Iterator[Row]:
    """The file's own rows: it needs no turning into anything."""
    yield from json.loads((DATA / "llama_factory/kto_en_demo.json").read_text(encoding="utf-8"))


def _count_gsm8k(read: ReadResult, compiled: CompiledPairs) -> dict[str, Any]:
    correct = dict.fromkeys(GSM8K_MODELS, 0)
    for labelled in read.groups:
        for row in labelled.feedback:
            correct[GSM8K_MODELS[row.choice_index or 0]] += int(row.value or 0)
    counts = compiled.counts
    return {
        "groups": counts["scored_groups"],
        "correct_per_model": correct,
        "groups_with_contrast": counts["groups_with_contrast"],
        "all_correct": counts["all_correct"],
        "all_wrong": counts["all_wrong"],
        "all_pairs": counts["all_pairs"],
        "all_pairs_equal_texts_merged": len(compiled.pairs),
    }


def _count_taskmaster(read: ReadResult, compiled: CompiledPairs) -> dict[str, Any]:
    counts = compiled.counts
    return {
        "rows": read.rows,
        "up": counts["thumbs_up"],
        "down": counts["thumbs_down"],
        "distinct_context_generation": counts["thumbed_answers"],
        "contexts": counts["prompts"],
        "conflicting_labels": counts["conflicting_labels"],
        "contexts_with_both": counts["prompts_with_both"],
        "distinct_pairs": len(compiled.pairs),
    }


def _count_pandalm(read: ReadResult, compiled: CompiledPairs) -> dict[str, Any]:
    return {
        "rows": read.rows,
        "majority_tie": compiled.counts["majority_tie"],
        "unanimous": read.counts["unanimous_in_file"],
        "rows_with_empty_response": read.refused["empty_answer"],
        "rows_with_non_string_response": read.refused["not_a_string"],
        "prompts": read.counts["prompts_in_file"],
        "kept_pairs": compiled.counts["decided"],
    }


def _count_llama_factory(read: ReadResult, compiled: CompiledPairs) -> dict[str, Any]:
    counts = compiled.counts
    return {
        "rows": read.rows,
        "up": counts["thumbs_up"],
        "down": counts["thumbs_down"],
        "prompts": counts["prompts"],
        "prompts_with_both": counts["prompts_with_both"],
        "distinct_pairs": len(compiled.pairs),
        "thumbs_without_partner": compiled.dropped["thumb_without_partner"],
    }


CASES: dict[str, tuple[Callable[[], Iterable[Row]], Count]] = {
    "gsm8k": (_gsm8k, _count_gsm8k),
    "tm3": (lambda: _taskmaster("tm3"), _count_taskmaster),
    "tm4": (lambda: _taskmaster("tm4"), _count_taskmaster),
    "pandalm": (_pandalm, _count_pandalm),
    "llama_factory_kto": (_llama_factory, _count_llama_factory),
}


@pytest.mark.parametrize("name", CASES)
def test_public_files_give_the_expected_counts_twice(name: str, tmp_path: Path) -> None:
    rows, count = CASES[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows()), encoding="utf-8")

    first_read, second_read = read_rows(path), read_rows(path)
    first, second = (compile_pairs(read.groups, PairRules()) for read in (first_read, second_read))
    found = count(first_read, first)
    print(name, json.dumps(found))

    assert found == json.loads((DATA / "expected_counts.json").read_text(encoding="utf-8"))[name]
    assert (first_read, first) == (second_read, second)
    assert first_read.rows == len(first_read.groups) + sum(first_read.refused.values())
    assert first.counts["feedback_rows"] == first.counts["feedback_used"] + sum(first.dropped.values())


def test_a_public_file_of_thumbs_is_read_as_it_lies_there() -> None:
    result = read_rows(DATA / "llama_factory/kto_en_demo.json").or_raise()
    expected = json.loads((DATA / "expected_counts.json").read_text(encoding="utf-8"))["llama_factory_kto"]
    assert (result.family, result.rows) == ("thumbs", expected["rows"])
    assert sum(row.value is True for labelled in result.groups for row in labelled.feedback) == expected["up"]


def test_public_pairs_and_questions_are_read_in_the_families_of_other_trainers(tmp_path: Path) -> None:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def turn(given: dict[str, str]) -> dict[str, str]:
        return {"role": roles[given["from"]], "content": given["value"]}

    path = tmp_path / "rows.jsonl"
    raw: list[Any] = json.loads((DATA / "llama_factory/dpo_en_demo.json").read_text(encoding="utf-8"))
    rows: list[Row] = [
        {"messages": [*map(turn, row["conversations"])], "chosen": turn(row["chosen"]), "rejected": turn(row["rejected"])}
        for row in raw
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    read = read_rows(path)
    assert (read.family, read.rows, len(read.groups) + sum(read.refused.values())) == ("ranking", 300, 300)
    same = sum(row["chosen"]["content"] == row["rejected"]["content"] for row in rows)
    blank = sum(not (row["chosen"]["content"].strip() and row["rejected"]["content"].strip()) for row in rows)
    print("llama_factory_dpo", len(read.groups), read.refused)
    assert read.refused.get("identical_answers", 0) + read.refused.get("empty_answer", 0) == same + blank

    judged = json.loads((DATA / "llmbar/Processed.MT-Bench.json").read_text(encoding="utf-8"))
    picks = [
        {
            "messages": _user(row["input"]),
            "preferred_completion": row[f"output_{row['label']}"],
            "other_completion": row[f"output_{3 - row['label']}"],
            "tied": None,
        }
        for row in judged
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in picks), encoding="utf-8")
    read = read_rows(path).or_raise()
    assert (read.family, read.rows) == ("picks", 200)


@pytest.mark.parametrize("name", CASES)
def test_the_pairs_of_public_files_survive_the_way_out_and_in(name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in CASES[name][0]()), encoding="utf-8")
    pairs = compile_pairs(read_rows(source).groups, PairRules()).pairs

    assert write_rows(out, pairs, "trl").rows == len(pairs) > 0

    again = compile_pairs(read_rows(out).or_raise().groups, PairRules()).pairs
    assert [(p.prompt, p.chosen, p.rejected) for p in again] == [(p.prompt, p.chosen, p.rejected) for p in pairs]


def _lines(name: str) -> Iterator[Row]:
    with (DATA / name).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
