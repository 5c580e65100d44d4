"""Tables as sites: lookups counted, gradients at what is looked up, one metric for table and head."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional

import geofx
from geofx.analysis_store import StoredAnalysis, read_analysis, save_analysis
from geofx.factorizations import Dense, GroupReduce, LowRank, TokenMPS
from geofx.moments import Moments
from geofx.objective import Custom, NextToken, SquaredError
from geofx.passes.calibrate import calibrate
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.count_flops import count_flops
from geofx.passes.find_sites import FindSites, find_sites, linear_nodes, lookup_nodes, sites_of
from geofx.program import Program
from geofx.region_analysis import Metric, MomentMetrics, lookup_shares, nearest_product
from geofx.trace import trace

TABLE = "model.embed_tokens.weight"


def program_of(model: nn.Module, example: Any) -> Program:
    program = trace(model, example)
    run_passes(program, [Canonicalize(), FindSites()])
    return program


def moments_of(name: str, batches: list[dict[str, Any]], **options: Any) -> tuple[nn.Module, Moments]:
    model = tiny_models.build(name)
    program = program_of(model, tiny_models.example(name))
    objective = NextToken() if name == "llama" else SquaredError()
    return model, calibrate(program, batches, objective, **options)


def test_a_tied_table_is_one_site_with_both_uses() -> None:
    program = program_of(tiny_models.build("llama"), tiny_models.example("llama"))
    (site,) = [site for site in sites_of(program) if site.kind != "linear"]
    assert (site.weight, site.kind, site.shape) == (TABLE, "tied_embedding", (128, 64))
    assert site.aliases == ("lm_head.weight",)
    assert [name for name, used in lookup_nodes(program).items() if used == site] == [site.nodes[0]]
    assert [name for name, used in linear_nodes(program).items() if used == site] == [site.nodes[1]]
    assert count_flops(program)[1][TABLE] == 1.0


def test_tables_of_all_indices_are_sites() -> None:
    program = program_of(tiny_models.build("bert"), tiny_models.example("bert"))
    tables = {site.weight.split(".")[1]: site for site in sites_of(program) if site.kind == "embedding"}
    assert {name: site.shape for name, site in tables.items()} == {
        "word_embeddings": (128, 64),
        "position_embeddings": (64, 64),
        "token_type_embeddings": (2, 64),
    }
    assert count_flops(program)[1]["embeddings.word_embeddings.weight"] == 1.0


class OddTable(nn.Module):
    """A table that is also summed, or multiplied by the wrong way round."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.table, self.transposed = nn.Embedding(6, 6), transposed

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return rows @ self.table.weight if self.transposed else rows * self.table.weight.sum()


@pytest.mark.parametrize("transposed", [True, False])
def test_other_uses_of_a_table_are_skipped(transposed: bool) -> None:
    program = program_of(OddTable(transposed), torch.zeros(2, 3, dtype=torch.long))
    sites, skips = find_sites(program)
    assert not sites
    assert [skip.reason for skip in skips] == ["NON_LINEAR_USE"]


@pytest.mark.parametrize("mode", ["two_sided", "forward"])
def test_counts_are_those_of_the_tokens_that_are_not_padding(mode: Any) -> None:
    batches = [tiny_models.example("llama", 3, 12, seed) for seed in range(3)]
    _, moments = moments_of("llama", batches, mode=mode)
    valid = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    assert torch.equal(moments.lookups[TABLE], valid.bincount(minlength=128).double())
    assert moments.tokens_at(TABLE) == valid.numel()
    counts = [batch["input_ids"][batch["attention_mask"].bool()].bincount(minlength=128) for batch in batches]
    assert torch.equal(moments.lookup_batches[TABLE], (torch.stack(counts) > 0).sum(0).double())
    assert (TABLE in moments.lookup_outputs) == (mode == "two_sided")


def test_positions_given_once_for_a_batch_count_for_every_row_of_it() -> None:
    batches = [tiny_models.example("bert", 3, 12, 0), tiny_models.example("bert", 2, 9, 1)]
    _, moments = moments_of("bert", batches)
    positions = torch.cat([batch["attention_mask"].nonzero()[:, 1] for batch in batches])
    expected = positions.bincount(minlength=64).double()
    assert torch.equal(moments.lookups["embeddings.position_embeddings.weight"], expected)
    types = moments.lookups["embeddings.token_type_embeddings.weight"]
    assert types.tolist() == [positions.numel(), 0]
    whole = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    seen = moments_of("bert", whole)[1].lookups["embeddings.position_embeddings.weight"]
    assert seen[:13].tolist() == [5.0] * 9 + [3.0] * 3 + [0.0]


def test_gradients_of_both_uses_are_those_of_the_eager_model() -> None:
    batches = [tiny_models.example("llama", 3, 12, seed) for seed in range(2)]
    model, moments = moments_of("llama", batches)
    looked_up, logits, terms = [], [], 0
    for batch in batches:
        rows = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        output = model(inputs_embeds=rows, attention_mask=batch["attention_mask"], use_cache=False).logits
        output.retain_grad()
        mask = batch["attention_mask"].bool()
        both = mask[:, 1:] & mask[:, :-1]
        losses = functional.cross_entropy(
            output[:, :-1][both], batch["input_ids"][:, 1:][both], reduction="sum"
        )
        losses.backward()
        terms += int(both.sum())
        looked_up.append(rows.grad.flatten(0, 1).double())
        logits.append(output.grad.flatten(0, 1).double())
    at_rows, at_logits = torch.cat(looked_up), torch.cat(logits)
    found = moments.lookup_outputs[TABLE].double()
    torch.testing.assert_close(found, at_rows.T @ at_rows / terms, rtol=1e-4, atol=1e-9)
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    energies = torch.zeros(128, dtype=torch.float64).index_add_(0, ids, at_rows.square().sum(1))
    torch.testing.assert_close(moments.lookup_energies[TABLE], energies, rtol=1e-4, atol=1e-9)
    assert float(energies.sum() / terms) == pytest.approx(float(found.trace()), rel=1e-4)
    diagonal = at_logits.square().sum(0) / terms
    assert moments.outputs[TABLE].shape == (128,)
    torch.testing.assert_close(moments.outputs[TABLE].double(), diagonal, rtol=1e-4, atol=1e-9)


def test_a_head_too_wide_for_its_gradients_keeps_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [tiny_models.example("qwen3", 3, 12, seed) for seed in range(2)]
    program = program_of(tiny_models.build("qwen3"), batches[0])
    whole = calibrate(program, batches, NextToken())
    monkeypatch.setattr("geofx.passes.calibrate.FULL_DECOMPOSITION_LIMIT", 100)
    part = calibrate(program, batches, NextToken())
    torch.testing.assert_close(part.outputs["lm_head.weight"], whole.outputs["lm_head.weight"].diagonal())
    weights = {"lm_head.weight": program.weight("lm_head.weight").detach()}
    metric = MomentMetrics(weights, part)["lm_head.weight"]
    assert metric.output is not None
    assert metric.output.shape == (128,)
    assert metric.output.min() > 0


def test_directions_are_moments_of_inputs_of_norm_one() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[7], x[8] = 0.0, 1e-20 * x[8]
    program = program_of(model, x[:4])
    objective = Custom(lambda output, batch: output.square().sum(-1))
    plain = calibrate(program, [{"input": x}], objective)
    moments = calibrate(program, [{"input": x}], objective, directions=True)
    assert not plain.directions
    unit = functional.normalize(x, dim=1, eps=1e-300)
    key = moments.input_of["0.weight"]
    torch.testing.assert_close(moments.directions[key], unit.T @ unit / 50, rtol=1e-12, atol=1e-12)
    assert moments.directions.keys() == moments.inputs.keys()


def test_all_moments_are_saved_and_loaded(tmp_path: Any) -> None:
    batches = [tiny_models.example("llama", 3, 12, seed) for seed in range(2)]
    _, moments = moments_of("llama", batches, directions=True)
    stored = StoredAnalysis("hash", moments, {}, batches[0], batches, False, NextToken())
    again = read_analysis(save_analysis(stored, tmp_path / "analysis")).moments
    for field in (
        "inputs",
        "outputs",
        "lookups",
        "lookup_batches",
        "lookup_energies",
        "lookup_outputs",
        "directions",
    ):
        before, after = getattr(moments, field), getattr(again, field)
        assert before.keys() == after.keys()
        assert before
        assert all(torch.equal(before[key], after[key]) for key in before), field


def test_shares_are_counts_with_the_chance_of_a_new_token_spread_over_all() -> None:
    counts = torch.tensor([50.0, 40.0, 1, 1, 1, 1, 6, 0, 0, 0])
    shares = lookup_shares(counts)
    torch.testing.assert_close(shares, 0.96 * counts.double() / 100 + 0.04 / 10)
    assert float(shares.sum()) == pytest.approx(1.0)
    batches = torch.tensor([2.0, 2, 1, 1, 1, 1, 1, 0, 0, 0])
    torch.testing.assert_close(lookup_shares(counts, batches), 0.9 * counts.double() / 100 + 0.1 / 10)
    torch.testing.assert_close(lookup_shares(counts, batches.clamp(max=1)), shares)
    energies = torch.tensor([10.0, 20, 8, 0, 0, 0, 2, 0, 0, 0])
    expected = 0.8 * energies.double() / 40 + 0.2 / 10
    torch.testing.assert_close(lookup_shares(counts, energies=energies), expected)
    settled = lookup_shares(torch.tensor([50.0, 50, 0, 0]))
    assert settled[2] == pytest.approx(0.01 / 4), "never free, even where no token was read once only"


def random_pair(rows: int, columns: int, seed: int) -> Metric:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return Metric(root @ root.T, torch.rand(rows, generator=generator, dtype=torch.float64), 0.5 + seed)


@pytest.mark.parametrize("second_scale", [1.0, 1e-9, 1e9, 0.0])
def test_the_nearest_product_is_van_loans(second_scale: float) -> None:
    """Against the SVD of the rearranged sum, written out."""
    first, second = random_pair(7, 4, 0), random_pair(7, 4, 1)
    second = Metric(second.input, second.output, second_scale)
    found = nearest_product(first, second, (7, 4))
    whole = sum(part.scale * torch.outer(part.output, part.input.flatten()) for part in (first, second))
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    expected = values[0] * torch.outer(left[:, 0], right[0])
    product = torch.outer(found.output, found.input.flatten())
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12 * float(values[0]))
    assert found.output.min() > 0
    assert torch.linalg.eigvalsh(found.input).min() > 0


@lru_cache
def trained() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A tiny tied decoder that has learned a chain of tokens of uneven frequency; calibration, held-out."""
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(128, 128, generator=generator) * 2 - torch.arange(1, 129).log() * 1.5
    chain = odds.softmax(-1)

    def text(rows: int) -> Tensor:
        ids = [torch.randint(0, 128, (rows,), generator=generator)]
        for _ in range(31):
            ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator)[:, 0])
        return torch.stack(ids, 1)

    model = tiny_models.build("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        ids = text(16)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batches = [{"input_ids": text(16)} for _ in range(24)]
    return model.eval(), batches[:16], batches[16:]


def test_predicted_loss_of_a_tied_table_is_that_measured() -> None:
    """Noise in the table that is read and multiplied by: Taylor's half of the form, within a third."""
    model, calibration, held = trained()
    program = program_of(model, calibration[0])
    moments = calibrate(program, calibration, NextToken())
    weight = program.weight(TABLE).detach().clone()
    metric = MomentMetrics({TABLE: weight}, moments)[TABLE]
    generator = torch.Generator().manual_seed(1)
    predicted, measured = 0.0, 0.0
    for _ in range(6):
        noise = 0.03 * weight.std() * torch.randn(weight.shape, generator=generator)
        predicted += metric.loss(noise)
        for sign in (1, -1):  # the slope cancels
            measured += (loss_of(model, weight + sign * noise, held) - loss_of(model, weight, held)) / 2
    loss_of(model, weight, held[:1])
    assert measured == pytest.approx(predicted / 2, rel=1 / 3)


def test_one_product_stands_for_both_uses_of_a_trained_table() -> None:
    """Rows read often are predicted often: the product is 17 % from the sum, the losses within 30 %."""
    model, calibration, _ = trained()
    program = program_of(model, calibration[0])
    weight = program.weight(TABLE).detach().double()
    metrics = MomentMetrics({TABLE: weight}, calibrate(program, calibration, NextToken()))
    parts = metrics._table(TABLE), metrics._linear(TABLE)
    exact = sum(torch.outer(part.output, part.input.flatten()) for part in parts)
    product = torch.outer(metrics[TABLE].output, metrics[TABLE].input.flatten())
    assert (product - exact).norm() < 0.2 * exact.norm()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for rank in (8, 24, 48):
        change = weight - (left[:, :rank] * values[:rank]) @ right[:rank]
        both = sum(part.loss(change) for part in parts)
        assert metrics[TABLE].loss(change) == pytest.approx(both, rel=0.3)


FORMS = {
    "llama": {TABLE: GroupReduce((32, 96), (30, 12))},
    "bert": {
        "embeddings.word_embeddings.weight": TokenMPS(64, 2),
        "embeddings.position_embeddings.weight": LowRank(9),
        "embeddings.token_type_embeddings.weight": LowRank(1),
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_rewritten_tables_compute_what_their_dense_forms_do(name: str) -> None:
    model = tiny_models.build(name)
    analysis = geofx.analyze(model, [tiny_models.example(name, 3, 12, seed) for seed in range(4)])
    plan = analysis.plan(geofx.Budget(size=1.0), include="*", formats=(Dense,)).edit(FORMS[name])
    result = analysis.apply(plan)
    inputs = tiny_models.example(name, 2, 9, 7)
    with torch.no_grad():
        for table in FORMS[name]:
            rewrite = result.rewrites[table]
            model.get_parameter(table).copy_(rewrite.factorization.to_dense(rewrite.factors))
        expected, found = (run(**inputs)[0] for run in (model, result))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert result.report.optimized.size_bytes < result.report.original.size_bytes


def loss_of(model: nn.Module, weight: Tensor, batches: list[dict[str, Tensor]]) -> float:
    """Nats per token with ``weight`` in the place of the table."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(weight)
        losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return float(torch.stack(losses).double().mean())
