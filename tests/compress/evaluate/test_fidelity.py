import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from llmpare.compress.evaluate.fidelity import EDGES, Scores, alone, score, summarise

WINDOWS, POSITIONS, VOCABULARY = 5, 9, 13


def logits(
    seed: int, *, windows: int = WINDOWS, positions: int = POSITIONS, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a model, those of one not far from it, and the tokens that follow."""
    torch.manual_seed(seed)
    dense = torch.randn(windows, positions, VOCABULARY) * spread + 4
    compressed = dense + 0.7 * torch.randn_like(dense)
    return dense, compressed, torch.randint(0, VOCABULARY, (windows, positions))


def log_probabilities(row: list[float]) -> list[float]:
    largest = max(row)
    total = math.log(sum(math.exp(value - largest) for value in row)) + largest
    return [value - total for value in row]


def five_largest(row: list[float]) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: -row[i])[:5])


def textbook(dense: Tensor, compressed: Tensor, targets: Tensor) -> dict[str, list[list[float]]]:
    """Every score of every position, one number at a time."""
    names = ("dense", "compressed", "kl", "agree", "top5")
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for a, b, ids in zip(dense.tolist(), compressed.tolist(), targets.tolist(), strict=True):
        for values in found.values():
            values.append([])
        for before, after, token in zip(a, b, ids, strict=True):
            p, q = log_probabilities(before), log_probabilities(after)
            found["dense"][-1].append(-p[token])
            found["compressed"][-1].append(-q[token])
            found["kl"][-1].append(sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
            found["agree"][-1].append(float(before.index(max(before)) == after.index(max(after))))
            found["top5"][-1].append(len(five_largest(before) & five_largest(after)) / 5)
    return found


def stderr(values: list[list[float]]) -> float:
    return statistics.stdev([statistics.mean(window) for window in values]) / len(values) ** 0.5


@pytest.mark.parametrize(("seed", "positions"), [(0, POSITIONS), (1, 1), (2, 150)])
def test_scores_are_those_of_the_textbook(seed: int, positions: int) -> None:
    """150 positions are more than exist at a time."""
    dense, compressed, targets = logits(seed, positions=positions)
    expected = textbook(dense, compressed, targets)
    found = score(dense, compressed, targets)
    for name, values in (("dense", found.dense_nll), ("compressed", found.compressed_nll), ("kl", found.kl)):
        torch.testing.assert_close(values, torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)
    assert found.agree.tolist() == [[bool(x) for x in row] for row in expected["agree"]]
    torch.testing.assert_close(found.top5, torch.tensor(expected["top5"]))


def test_divergence_is_of_the_compressed_from_the_dense() -> None:
    """KL(dense ‖ compressed), which is not the same the other way round."""
    dense, compressed = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(9.0), 0.0]]])
    kl = score(dense, compressed, torch.zeros(1, 1, dtype=torch.long)).kl.item()
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_a_shift_of_all_logits_changes_nothing() -> None:
    dense, compressed, targets = logits(0)
    expected = score(dense.clone(), compressed.clone(), targets)
    found = score(dense + 1000, compressed - 1000, targets)
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.dense_nll, expected.dense_nll, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_summary_is_that_of_the_textbook(seed: int) -> None:
    dense, compressed, targets = logits(seed)
    expected = textbook(dense, compressed, targets)
    flat = {name: list(itertools.chain.from_iterable(values)) for name, values in expected.items()}
    before, after = (math.exp(statistics.mean(flat[name])) for name in ("dense", "compressed"))
    pairs = zip(expected["dense"], expected["compressed"], strict=True)
    differences = [[y - x for x, y in zip(a, b, strict=True)] for a, b in pairs]
    found = summarise([score(dense, compressed, targets)], "torch.bfloat16")
    assert (found["tokens"], found["windows"], found["dtype"]) == (45, 5, "torch.bfloat16")
    assert found["perplexity"] == pytest.approx(
        {
            "dense": before,
            "compressed": after,
            "increase": after / before - 1,
            "increase_stderr": after / before * stderr(differences),
            "dense_stderr": before * stderr(expected["dense"]),
            "compressed_stderr": after * stderr(expected["compressed"]),
        },
        rel=1e-4,
    )
    ordered = sorted(flat["kl"])
    histogram = found["kl"].pop("histogram")
    edges = histogram["edges"]
    assert histogram["counts"] == [
        sum(low <= value < high for value in ordered) for low, high in itertools.pairwise(edges)
    ]
    assert found["kl"] == pytest.approx(
        {
            "mean": statistics.mean(flat["kl"]),
            "stderr": stderr(expected["kl"]),
            "median": statistics.median(flat["kl"]),
            "p90": ordered[40],
            "p99": ordered[44],
            "max": ordered[44],
        },
        rel=1e-4,
    )
    assert found["agreement"] == pytest.approx(
        {
            "top1": statistics.mean(flat["agree"]),
            "top5": statistics.mean(flat["top5"]),
            "stderr": stderr(expected["agree"]),
        }
    )
    assert [(part["start"], part["end"]) for part in found["by_position"]] == [(i, i + 1) for i in range(POSITIONS)]
    for part in found["by_position"]:
        here = statistics.mean(window[part["start"]] for window in expected["kl"])
        assert part["kl"] == pytest.approx(here, rel=1e-4)
        assert part["top1"] == pytest.approx(statistics.mean(window[part["start"]] for window in expected["agree"]))


def constant(kl: list[list[float]]) -> Scores:
    values = torch.tensor(kl)
    return scores(torch.ones_like(values), torch.ones_like(values), values)


def scores(dense: Tensor, compressed: Tensor, kl: Tensor) -> Scores:
    """With these values, where both models agree on everything."""
    same = torch.zeros_like(kl, dtype=torch.int32)
    return Scores(dense, compressed, kl, same == 0, torch.ones_like(kl), same, same)


def test_quantiles_are_values_that_occurred() -> None:
    """By nearest rank: half of 1 … 1000 are at most the median, 99 % at most the 99th percentile."""
    torch.manual_seed(0)
    found = summarise([constant((torch.randperm(1000) + 1.0).view(10, 100).tolist())], "")["kl"]
    assert (found["median"], found["p90"], found["p99"], found["max"]) == (500, 900, 990, 1000)
    few = summarise([constant([[3.0], [1.0]])], "")["kl"]
    assert (few["median"], few["p90"]) == (1, 3)
    assert found["max"] == 1000
    assert found["mean"] == 500.5
    single = summarise([constant([[0.25]])], "")["kl"]
    assert single["median"] == single["p99"] == single["max"] == 0.25


def test_the_histogram_counts_an_edge_above_and_what_is_beyond_at_the_ends() -> None:
    values = [[-1e-7, 0.0, 1.0, 1e6, math.inf, math.nan]]
    counts = summarise([constant(values)], "")["kl"]["histogram"]["counts"]
    assert (counts[0], counts[EDGES.index(1.0)], counts[-1], sum(counts)) == (2, 1, 2, 5)


def test_the_standard_error_is_over_windows() -> None:
    """Positions of one window are not independent: here all the spread is between windows, there within them."""
    between, within = [[1.0, 1.0], [3.0, 3.0]], [[1.0, 3.0], [3.0, 1.0]]
    assert summarise([constant(between)], "")["kl"]["stderr"] == pytest.approx(1.0)
    assert summarise([constant(within)], "")["kl"]["stderr"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_model_compared_with_itself(seed: int) -> None:
    dense, _, targets = logits(seed)
    found = summarise([score(dense.clone(), dense.clone(), targets)], "")
    counts = found["kl"].pop("histogram")["counts"]
    assert counts[0] == sum(counts) == WINDOWS * POSITIONS
    assert set(found["kl"].values()) == {0}
    assert found["agreement"] == {"top1": 1, "top5": 1, "stderr": 0}
    assert found["perplexity"]["increase"] == 0
    assert found["perplexity"]["dense"] == found["perplexity"]["compressed"]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    flat = torch.zeros(2, 3, 50)
    found = summarise([score(flat.clone(), flat.clone(), torch.zeros(2, 3, dtype=torch.long))], "")
    assert found["perplexity"]["dense"] == pytest.approx(50)


def test_parts_of_windows_and_windows_apart_give_the_same_summary() -> None:
    """As the engine does it: positions in steps, window by window."""
    dense, compressed, targets = logits(1)
    parts = []
    for window in range(WINDOWS):
        one = slice(window, window + 1)
        pieces = [
            score(dense[one, a:b].clone(), compressed[one, a:b].clone(), targets[one, a:b])
            for a, b in ((0, 4), (4, 8), (8, 9))
        ]
        parts.append(Scores.join(pieces))
        assert parts[-1].kl.shape == (1, POSITIONS)
    whole = summarise([score(dense, compressed, targets)], "")
    apart = summarise(parts, "")
    assert apart["kl"].pop("histogram") == whole["kl"].pop("histogram")
    for section in ("perplexity", "kl", "agreement"):
        assert apart[section] == pytest.approx(whole[section], rel=1e-5)
    assert (apart["tokens"], apart["windows"]) == (whole["tokens"], whole["windows"])


def test_one_window_has_no_standard_error() -> None:
    dense, compressed, targets = logits(2, windows=1)
    found = summarise([score(dense, compressed, targets)], "")
    assert found["kl"]["stderr"] == found["agreement"]["stderr"] == found["perplexity"]["dense_stderr"] == 0
    assert found["kl"]["mean"] > 0


def test_scores_do_not_share_memory_with_the_logits() -> None:
    """score works in place, so callers may use the logits' memory for the next batch; targets are left alone."""
    dense, compressed, targets = logits(3)
    before = targets.clone()
    found = score(dense, compressed, targets)
    kept = [each.clone() for each in found.tensors()]
    dense.zero_()
    compressed.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, found.tensors(), strict=True))
    assert torch.equal(targets, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_give_a_summary_that_is_none(bad: float) -> None:
    """…and which no gate lets pass, instead of an exception at the end of a long run."""
    dense, compressed, targets = logits(5)
    compressed[2, 3] = bad
    found = summarise([score(dense, compressed, targets)], "")
    for value in (found["kl"]["mean"], found["kl"]["max"], found["kl"]["stderr"]):
        assert math.isnan(value)
    for name in ("compressed", "compressed_stderr", "increase"):
        assert math.isnan(found["perplexity"][name])
    assert math.isfinite(found["perplexity"]["dense"])
    assert math.isfinite(found["kl"]["median"])
    assert 0 <= found["agreement"]["top1"] <= 1


def test_tokens_that_both_models_rule_out_add_nothing() -> None:
    """0 · (−∞ − −∞) is 0 here: some models mask the ids that pad their vocabulary."""
    dense, compressed, targets = logits(4)
    expected = score(dense[..., :-3].clone(), compressed[..., :-3].clone(), targets.clamp(max=VOCABULARY - 4))
    dense[..., -3:] = compressed[..., -3:] = -math.inf
    found = score(dense, compressed, targets.clamp(max=VOCABULARY - 4))
    torch.testing.assert_close(found.kl, expected.kl)
    torch.testing.assert_close(found.compressed_nll, expected.compressed_nll)


def test_a_token_that_only_the_original_rules_out_adds_nothing() -> None:
    dense = torch.tensor([[[0.0, 0.0, -math.inf]]])
    kl = score(dense, torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long)).kl.item()
    assert kl == pytest.approx(math.log(1.5))


def test_positions_of_long_windows_share_ranges() -> None:
    values = torch.rand(3, 100, generator=torch.Generator().manual_seed(0))
    found = summarise([scores(values, values, values)], "")["by_position"]
    assert len(found) == 32
    assert [part["end"] for part in found[:-1]] == [part["start"] for part in found[1:]]
    assert (found[0]["start"], found[-1]["end"]) == (0, 100)
    assert found[5]["kl"] == pytest.approx(values[:, found[5]["start"] : found[5]["end"]].mean().item())


def test_bits_per_byte() -> None:
    """A model that gives every token of 4 bytes a probability of 1/16 takes 4 bits for 4 bytes."""
    nll = torch.full((2, 10), math.log(16.0))
    found = summarise([scores(nll, 2 * nll, nll)], "", scored_bytes=80)["bits_per_byte"]
    assert found == pytest.approx({"dense": 1.0, "compressed": 2.0})
    assert summarise([scores(nll, nll, nll)], "")["bits_per_byte"] == {"dense": None, "compressed": None}


def test_a_model_alone_has_the_same_figures_of_its_own() -> None:
    dense, compressed, targets = logits(8)
    pair = score(dense, compressed, targets)
    both, own = summarise([pair], "float32", 100), alone(pair.compressed_nll, "float32", 100)
    assert own.keys() == both.keys()
    for name in ("compressed", "compressed_stderr"):
        assert own["perplexity"][name] == both["perplexity"][name]
    assert own["perplexity"].keys() == both["perplexity"].keys()
    assert own["bits_per_byte"] == {"dense": None, "compressed": both["bits_per_byte"]["compressed"]}
    assert own["kl"] is own["agreement"] is own["perplexity"]["dense"] is None
    assert own["by_position"] == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_logit_that_is_no_number(bad: float) -> None:
    dense, compressed, targets = logits(6)
    compressed[0, 0, 0] = bad
    assert not math.isfinite(summarise([score(dense, compressed, targets)], "")["kl"]["mean"])


def test_an_original_that_gives_no_numbers() -> None:
    dense, compressed, targets = logits(7)
    dense[:] = math.nan
    found = summarise([score(dense, compressed, targets)], "")
    assert math.isnan(found["perplexity"]["dense"])
    assert math.isnan(found["perplexity"]["increase"])
    assert math.isfinite(found["perplexity"]["compressed"])


def test_a_perplexity_beyond_all_floats_is_infinite() -> None:
    large = summarise([scores(torch.full((2, 3), 650.0), torch.full((2, 3), 650.0), torch.ones(2, 3))], "")
    assert large["perplexity"]["dense"] == pytest.approx(math.exp(650))
    values = torch.full((2, 3), 1000.0)
    found = summarise([scores(torch.ones(2, 3), values, torch.ones(2, 3))], "")
    assert found["perplexity"]["compressed"] == found["perplexity"]["increase"] == math.inf
    assert found["perplexity"]["dense"] == pytest.approx(math.e)
