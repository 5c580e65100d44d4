"""The next token out of logits, against what transformers makes of the same settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from geofx.errors import ConfigError, NumericsError
from geofx.sampling import Sampling

LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).mul(2)
SEEN = [[1, 2, 2, 7], [3], [0, 49]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.5, 20, 0.6), (2.0, 1, 0.01)],
)
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    wanted = TemperatureLogitsWarper(temperature)(None, LOGITS.double())
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    wanted = TopPLogitsWarper(top_p)(None, wanted).softmax(1)
    found = Sampling(temperature, top_k, top_p).probabilities(LOGITS.double().numpy())
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-12)


def test_without_a_temperature_the_likeliest_comes() -> None:
    random = np.random.default_rng(0)
    assert Sampling().pick(LOGITS.numpy(), SEEN, random).tolist() == LOGITS.argmax(1).tolist()


def test_what_is_there_comes_less() -> None:
    random = np.random.default_rng(0)
    ids = [[int(LOGITS[row].argmax())] for row in range(3)]
    wanted = RepetitionPenaltyLogitsProcessor(8.0)(torch.tensor(ids), LOGITS.clone()).argmax(1)
    assert Sampling(repetition_penalty=8.0).pick(LOGITS.numpy(), ids, random).tolist() == wanted.tolist()


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    sampling, logits = Sampling(temperature=1.0, top_k=3), LOGITS[:1].numpy()
    shares = sampling.probabilities(logits.astype(np.float64))[0]

    def drawn(seed: int, count: int) -> list[int]:
        random = np.random.default_rng(seed)
        return [int(sampling.pick(logits, [[]], random)[0]) for _ in range(count)]

    assert drawn(0, 20) == drawn(0, 20) != drawn(1, 20)
    counts = np.bincount(drawn(2, 4000), minlength=50) / 4000
    assert np.abs(counts - shares).max() < 4 * 0.5 / 4000**0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-308, 5e-324])
def test_next_to_no_temperature_draws_the_likeliest(temperature: float) -> None:
    shares = Sampling(temperature, top_k=5, top_p=0.9).probabilities(LOGITS.double().numpy())
    np.testing.assert_array_equal(shares, np.eye(50)[LOGITS.argmax(1)])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_logits_have_a_likeliest(sampling: Sampling) -> None:
    random = np.random.default_rng(0)
    for wrong in (np.nan, np.inf):
        logits = LOGITS.numpy().copy()
        logits[1, 7] = wrong
        with pytest.raises(NumericsError, match=r"NaN or \+inf.*row 1"):
            sampling.pick(logits, SEEN, random)
    with pytest.raises(NumericsError, match="row 0"):
        sampling.pick(np.full((1, 4), -np.inf, np.float32), [[]], random)
    masked = np.full((1, 50), -np.inf, np.float32)
    masked[0, 9] = 1.0
    assert sampling.pick(masked, [[]], random).tolist() == [9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("temperature", "hot"),
        ("top_k", 2.5),
        ("top_k", "5"),
        ("top_p", None),
        ("repetition_penalty", "2"),
        ("seed", 0.5),
    ],
)
def test_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*sampling"):
        Sampling(**{name: value})
