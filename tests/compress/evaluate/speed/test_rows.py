import pytest

from llmpare.compress.evaluate.speed.engine import Case, Work
from llmpare.compress.evaluate.speed.rows import rows

CASE = Case(batch=2, prompt=10, new_tokens=3)
WORK = Work(weight_bytes=1000, read_bytes=800, body=300, head=100, kv_bytes=4, attention=6)
MACHINE = {"bandwidth_gb_s": 1e-6, "gflops": 1e-5}  # 1000 bytes and 10000 operations per second
SAMPLE = {
    "first": [1.0, 2.0, 4.0],
    "steps": [0.5, 0.5, 1.0, 1.0, 2.0, 2.0],
    "decode": [1.0, 2.0, 4.0],
    "prompt_tokens": 20,
    "new_tokens": 6,
    "peak_bytes": 7,
    "memory": "resident",
    "warmup": 1,
}


def test_a_case_gives_a_row_for_the_prompt_and_one_for_what_follows() -> None:
    prefill, decode = rows("e", CASE, SAMPLE, WORK, "as stored", MACHINE)
    for row in (prefill, decode):
        assert (row["engine"], row["batch"], row["prompt"], row["new_tokens"]) == ("e", 2, 10, 3)
        assert (row["cache"], row["compiled"], row["attention"]) == ("dynamic", False, "its own")
        assert (row["weight_bytes"], row["peak_bytes"], row["memory"]) == (1000, 7, "resident")
        assert (row["warmup"], row["repeats"]) == (1, 3)
        assert row["ttft_ms"]["median"] == 2000
    assert (prefill["mode"], prefill["tpot_ms"], prefill["tokens_per_second"]) == ("prefill", None, 10.0)
    assert (decode["mode"], decode["tpot_ms"]["median"], decode["tokens_per_second"]) == ("decode", 1000, 2.0)
    assert prefill["spread"] == pytest.approx((15 - 7.5) / 10)


def test_the_roofline_counts_every_pass_once() -> None:
    prefill, decode = rows("e", CASE, SAMPLE, WORK, "as stored", MACHINE)
    assert prefill["roofline"]["bandwidth_share"] == pytest.approx((800 + 2 * 10 * 4) / 2 / 1000)
    pairs = sum(range(1, 11))  # each token attends to itself and those before it
    assert prefill["roofline"]["compute_share"] == pytest.approx(2 * 2 * (10 * 300 + 100 + pairs * 6) / 2 / 10000)
    moved = sum(800 + 2 * (context + 1) * 4 for context in (10, 11))
    assert decode["roofline"]["bandwidth_share"] == pytest.approx(moved / 2 / 1000)
    computed = sum(2 * 2 * (300 + 100 + (context + 1) * 6) for context in (10, 11))
    assert decode["roofline"]["compute_share"] == pytest.approx(computed / 2 / 10000)


def test_without_a_cache_every_token_costs_all_before_it() -> None:
    _, decode = rows("e", Case(2, 10, 3, cache="off"), SAMPLE, WORK, "as stored", MACHINE)
    moved = sum(800 + 2 * length * 4 for length in (11, 12))
    assert decode["roofline"]["bandwidth_share"] == pytest.approx(moved / 2 / 1000)


def test_what_is_not_known_of_a_model_is_not_made_up() -> None:
    for row in rows("e", CASE, SAMPLE, Work(1000), "as stored", MACHINE):
        assert row["roofline"] == {"bandwidth_share": None, "compute_share": None}
        assert row["weight_bytes"] == 1000


def test_requests_that_come_and_go_have_a_throughput_only() -> None:
    case = Case(2, 10, 3, continuous=True, cache="paged")
    (row,) = rows("e", case, {**SAMPLE, "first": [0.0] * 3, "steps": []}, WORK, "as stored", MACHINE)
    assert (row["mode"], row["tokens_per_second"]) == ("continuous", 3.0)
    assert row["ttft_ms"] is row["tpot_ms"] is None
