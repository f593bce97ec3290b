from dataclasses import replace

from llmpare.compress.evaluate.speed.cases import LARGEST, REQUESTS, VARIATIONS, choose
from llmpare.compress.evaluate.speed.engine import Case

BASE = Case(1, 1, 8)


def test_one_thing_varies_at_a_time() -> None:
    found = choose(BASE, list(VARIATIONS), batches=[1], prompts=[16], batched=True)
    first, *varied = found
    assert first == replace(BASE, prompt=16)
    assert varied == [
        replace(first, cache="static"),
        replace(first, cache="off"),
        replace(first, cache="static", compiled=True),
        replace(first, attention="eager"),
        replace(first, attention="flash_attention_2"),
        replace(first, batch=REQUESTS, cache="paged", continuous=True),
    ]


def test_batches_double_when_none_are_named_and_come_last() -> None:
    found = choose(BASE, ["static"], batches=None, prompts=[16, 64], batched=True)
    assert [(case.prompt, case.cache) for case in found[:3]] == [(16, "dynamic"), (64, "dynamic"), (16, "static")]
    grown = found[3:]
    assert [case.batch for case in grown[:4]] == [2, 4, 8, 16]
    assert grown[-1].batch == LARGEST
    assert all(case.growing and case.prompt == 16 for case in grown)
    assert not any(case.growing for case in found[:3])


def test_named_batches_grow_whatever_their_order() -> None:
    found = choose(BASE, [], batches=[8, 2, 8, 4], prompts=[16], batched=True)
    assert [(case.batch, case.growing) for case in found] == [(2, False), (4, True), (8, True)]


def test_an_engine_of_one_sequence_gets_one() -> None:
    found = choose(BASE, [], batches=[4, 8], prompts=[16, 32], batched=False)
    assert [(case.batch, case.prompt) for case in found] == [(1, 16), (1, 32)]


def test_no_case_comes_twice() -> None:
    found = choose(BASE, [], batches=[1], prompts=[16, 16, 32], batched=True)
    assert [case.prompt for case in found] == [16, 32]


def test_labels_tell_cases_apart() -> None:
    found = choose(BASE, list(VARIATIONS), batches=[1, 2, 4], prompts=[16, 32], batched=True)
    assert len({case.label for case in found}) == len(found)
