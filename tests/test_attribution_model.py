"""An attribution model: what it learns from a method's scores, its losses, and what cannot be learned from."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from learnable import TELLING

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.search.mapper import stored_mapper
from attrdb.training.attribution_model import LowRankMaps, TableSettings, _batch, train_on_table
from attrdb.training.attribution_table import Table, average_ranks, rank_correlation
from attrdb.training.objective import Maps, contrastive_loss
from attrdb.training.table_losses import LOSSES, Batch
from attrdb.training.train import TrainSettings, train

QUICK = TableSettings(lr=0.01, steps=60, batch=32, n_others=8)
METHOD = {
    "method_id": "in_run",
    "kind": "stored",
    "settings": '{"spec": "in-run"}',
    "unit": "gradient product",
    "tau": 1.0,
    "lam": 0.05,
}
PAIRS = """\
SELECT samples.image_id AS sample_id, exemplars.image_id AS candidate_id, samples.toy_12 AS s, exemplars.toy_12 AS t
FROM samples JOIN exemplars USING (model_id) JOIN models USING (model_id)
WHERE models.kind = 'style'
"""


@pytest.fixture(scope="module")
def scored_once(learnable, tmp_path_factory):
    """Samples of styles have scores: the inner product of what tells exemplars apart."""
    folder = tmp_path_factory.mktemp("table")
    db = attrdb.open(shutil.copytree(learnable.path, folder / "scored.attrdb"))
    db.writer.add_method(METHOD)
    rows = db.sql(PAIRS).to_pylist()
    scores = [float(np.dot(row["s"][:TELLING], row["t"][:TELLING])) for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("sample_id", "candidate_id")}
    db.writer.append_rows(
        "scores", pa.table({"method_id": ["in_run"] * len(rows), **columns, "score": scores}), db.snapshot
    )
    return db.path


@pytest.fixture
def db(scored_once, tmp_path):
    return attrdb.open(shutil.copytree(scored_once, tmp_path / "copy.attrdb"))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "one-hot"])
def test_each_loss_learns_the_order_of_the_scores(db, loss):
    result = train_on_table(db, settings=TableSettings(**{**vars(QUICK), "loss": loss, "steps": 150}))
    assert result.trained
    assert result.correlation > result.correlation_before + 0.05
    [row] = db.sql("SELECT trained_on, form, metrics, curves FROM mappers").to_pylist()
    metrics, curves = json.loads(row["metrics"]), json.loads(row["curves"])
    assert (row["trained_on"], row["form"], metrics["n_models"]) == ("attribution-table", "affine", 24)
    assert metrics["correlation"] == max(epoch["correlation"] for epoch in curves) == result.correlation


def test_it_is_a_method_for_images_that_were_never_scored(db):
    result = train_on_table(db, settings=QUICK, mapper_id="learned")
    db.refresh()
    mapper = stored_mapper(db.snapshot, "learned")
    validation = Table(db, "toy_12", "in_run", "val")
    assert validation.correlation(mapper) == pytest.approx(result.correlation)
    assert not db.sql("SELECT * FROM scores JOIN samples ON sample_id = image_id WHERE model_id = 'm85'").num_rows
    hits = db.attribute("m85/0/0", k=3, method="toy_12/learned")
    assert len(hits) == 3


def test_the_same_settings_make_the_same_model(db, scored_once, tmp_path):
    other = attrdb.open(shutil.copytree(scored_once, tmp_path / "other.attrdb"))
    results = [train_on_table(each, settings=QUICK) for each in (db, other)]
    assert results[0] == results[1]
    stored = [each.sql("SELECT parameters FROM mappers").to_pylist() for each in (db, other)]
    assert stored[0] == stored[1]
    again = train_on_table(db, settings=QUICK)
    assert (again.trained, again.correlation) == (False, results[0].correlation)
    with pytest.raises(InvalidValue, match=r"is in .* with lr = 0.01, now it is 0.02"):
        train_on_table(db, settings=TableSettings(**{**vars(QUICK), "lr": 0.02}), mapper_id=results[0].mapper_id)
    with pytest.raises(InvalidValue, match=r"is in .* with augment = None, now it is 'none'"):
        train(db, settings=TrainSettings(), mapper_id=results[0].mapper_id)


def test_targets_are_those_of_whole_models(db):
    table = Table(db, "toy_12", "in_run", "train")
    rows = db.query("attribution_targets", method="in_run").to_pylist()
    assert len(rows) == 24 * 4 * 3 == table.held.sum()
    assert table.samples.shape == (96, 12)
    assert table.exemplars.shape == (72, 12)
    positive = table.values.clamp(min=0)
    torch.testing.assert_close(table.shares().sum(1), torch.ones(96))
    row = int(positive.sum(1).argmax())
    torch.testing.assert_close(table.shares()[row], positive[row] / positive[row].sum())
    assert (table.scaled().min(), table.scaled().max()) == (0, 1)
    assert table.ranks()[0].sort().values.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    names = sorted({row["exemplar_id"] for row in rows})
    first = [row["exemplar_id"] for row in rows if row["sample_id"] == rows[-1]["sample_id"]]
    assert [names[column] for column in table.columns[-1]] == first

    gone = db.sql("SELECT candidate_id FROM scores WHERE sample_id = 'm00/0/0' LIMIT 1").to_pylist()[0]["candidate_id"]
    kept = db.sql("FROM scores WHERE candidate_id <> $gone", {"gone": gone})
    db.writer.add_method(METHOD | {"method_id": "less"})
    kept = kept.set_column(kept.column_names.index("method_id"), "method_id", pa.array(["less"] * len(kept)))
    db.writer.append_rows("scores", kept.replace_schema_metadata(None), db.snapshot)
    db.refresh()
    fewer = db.query("attribution_targets", method="less").to_pylist()
    assert {row["model_id"] for row in rows} - {row["model_id"] for row in fewer} == {"m00"}


def test_a_batch_has_the_scores_of_its_samples_and_others_of_all_models(db):
    table = Table(db, "toy_12", "in_run", "train")
    targets, maps = (table.shares(), table.scaled(), table.ranks()), LowRankMaps(12, 2, 0)
    random, n_exemplars = torch.Generator().manual_seed(0), len(table.exemplars)
    drawn = torch.zeros(n_exemplars)
    for _ in range(40):
        rows = torch.randperm(96, generator=random)[:8]
        batch = _batch(table, targets, rows, maps, torch.zeros(2), 10, random)
        everything = table.samples[rows] @ table.exemplars.T  # the maps begin at the identity
        used = [int((everything - column[:, None]).abs().amax(0).argmin()) for column in batch.cosines.T]
        assert sorted(set(used)) == used
        own = torch.zeros(8, n_exemplars, dtype=torch.bool).scatter(1, table.columns[rows], True)[:, used]
        assert batch.own.equal(own)
        assert not (batch.own & batch.others).any()
        assert batch.others.sum(1).max() <= 10
        assert (batch.outliers <= batch.others).all()
        assert batch.outliers.sum(1).tolist() == [1] * 8  # a tenth of three, rounded up
        for row, number in enumerate(rows):
            assert batch.shares[row, own[row]].tolist() == targets[0][number].tolist()
            assert own[row, batch.drawn[row]]
        drawn[used] += batch.outliers.sum(0)
    assert (drawn > 0).float().mean() > 0.9
    assert drawn.max() < 20


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """Four samples of two models with three exemplars each."""
    random = torch.Generator().manual_seed(0)
    models = torch.tensor([0, 0, 1, 1])
    own = (models[:, None] == torch.tensor([0, 0, 0, 1, 1, 1])).bool()
    values = torch.rand(4, 6, generator=random) * own
    others = ~own & torch.tensor([[True, True, False] * 2] * 4)
    outliers = ~own & torch.tensor([[False, True, False] * 2] * 4)
    return Batch(
        cosines=torch.rand(4, 6, generator=random) * 2 - 1,
        own=own,
        others=others,
        outliers=outliers,
        shares=values / values.sum(1, keepdim=True),
        scaled=values,
        ranks=torch.stack([torch.from_numpy(average_ranks(row.numpy())) / 3 for row in values]).float() * own,
        drawn=torch.tensor([0, 2, 3, 5]),
        models=models,
        logits=torch.tensor([-0.5, 2.0]),
    )


def softmax(values):
    exponentials = np.exp(np.array(values))
    return exponentials / exponentials.sum()


def by_hand(batch, loss, v):
    """The losses, one number at a time."""
    c, own, others = batch.cosines.double().numpy(), batch.own.numpy(), batch.others.numpy()
    y, share, rank = batch.scaled.numpy(), batch.shares.numpy(), batch.ranks.numpy()
    n, m = c.shape
    if loss == "one-hot":
        total = 0.0
        for i in range(n):
            rivals = [j for j in range(n) if j == i or batch.models[j] != batch.models[i]]
            for row in ([c[i, batch.drawn[j]] for j in rivals], [c[j, batch.drawn[i]] for j in rivals]):
                total -= np.log(softmax(np.array(row) / v)[rivals.index(i)]) / n
        return total
    if loss == "soft":
        total = 0.0
        for i in range(n):
            counted = [j for j in range(m) if own[i, j] or others[i, j]]
            chances = softmax(c[i, counted] / v)
            total -= sum(share[i, j] * np.log(chances[counted.index(j)]) for j in counted if own[i, j]) / n
        for j in range(m):
            counted = [i for i in range(n) if own[i, j] or others[i, j]]
            chances = softmax(c[counted, j] / v)
            of_column = share[:, j] / share[:, j].sum()
            total -= sum(of_column[i] * np.log(chances[counted.index(i)]) for i in counted if own[i, j]) / m
        return total
    if loss == "regression":
        weights = own + 0.5 * others
        return (weights * ((1 + c) / 2 - y) ** 2).sum() / weights.sum()
    if loss == "rank":
        pairs = [(i, j, k) for i in range(n) for j in range(m) for k in range(m) if own[i, j] and own[i, k]]
        pairs = [(i, j, k) for i, j, k in pairs if y[i, j] > y[i, k]]
        terms = [(y[i, j] - y[i, k]) * np.log1p(np.exp((c[i, k] - c[i, j]) / v)) for i, j, k in pairs]
        return sum(terms) / sum(y[i, j] - y[i, k] for i, j, k in pairs)
    a, b = batch.logits.tolist()
    terms = []
    for i in range(n):
        for j in [*np.flatnonzero(own[i]), *np.flatnonzero(batch.outliers[i])]:
            p = 1 / (1 + np.exp(-(a + b * c[i, j])))
            terms.append(-rank[i, j] * np.log(p) - (1 - rank[i, j]) * np.log(1 - p))
    return np.mean(terms)


@pytest.mark.parametrize("loss", ["one-hot", "soft", "regression", "rank", "rank-bce"])
def test_losses_by_hand(batch, loss):
    assert float(LOSSES[loss](batch, 0.3)) == pytest.approx(by_hand(batch, loss, 0.3), rel=1e-5)


def test_the_mixed_loss_is_the_sum(batch):
    parts = LOSSES["soft"](batch, 0.3) + LOSSES["regression"](batch, 0.3) / 2
    assert LOSSES["soft+regression"](batch, 0.3) == parts


def test_one_hot_of_distinct_models_is_the_loss_of_pairs():
    """Wang et al. 2023, Eq. 3, as mappers are trained with it."""
    random = torch.Generator().manual_seed(1)
    s, t = (torch.nn.functional.normalize(torch.randn(3, 4, generator=random), dim=1) for _ in range(2))
    some = torch.zeros(3, 3)
    none = some.bool()
    batch = Batch(s @ t.T, none, none, none, some, some, some, torch.arange(3), torch.arange(3), some)
    torch.testing.assert_close(LOSSES["one-hot"](batch, 0.2), contrastive_loss(t, s, 0.2))


def test_maps_of_low_rank_are_affine_ones():
    maps, plain = LowRankMaps(12, 3, 0), Maps("affine", 12)
    features = torch.nn.functional.normalize(torch.randn(5, 12), dim=1)
    torch.testing.assert_close(maps["sample"](features), features)
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.normal_(std=0.5)
    plain.load_state_dict({name: torch.from_numpy(value) for name, value in maps.arrays().items()})
    for side in ("sample", "exemplar"):
        torch.testing.assert_close(maps[side](features), plain[side](features))
        torch.testing.assert_close(maps[side].deviation(), plain[side].deviation())


def test_rank_correlation_with_ties():
    assert average_ranks(np.array([5.0, 1.0, 5.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    one, other = np.array([5.0, 1.0, 5.0, 0.0]), np.array([2.0, 2.0, 3.0, 1.0])
    expected = np.corrcoef([3.5, 2, 3.5, 1], [2.5, 2.5, 4, 1])[0, 1]
    assert rank_correlation(one, other) == pytest.approx(expected)
    assert rank_correlation(one, np.ones(4)) == 0.0


# --- what cannot be learned from, and the command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"split": "test"}, "--split is 'test': test models are for evaluation only"),
        ({"val_split": "train"}, "--split and --val-split are both 'train'"),
        ({"split": "nowhere"}, r"no sample in split 'nowhere' .* attrdb score .* in-run"),
        ({"target": "toy_12"}, "method 'toy_12' compares features"),
        ({"loss": "hard"}, "loss is 'hard'; it must be soft, one-hot"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"lr": float("nan")}, "lr is nan; it must be above 0"),
        ({"lr": 1e30}, "the loss of step .* lower the learning rate"),
    ],
)
def test_what_cannot_be_learned(db, settings, problem):
    with pytest.raises(InvalidValue, match=problem):
        train_on_table(db, settings=TableSettings(**settings))
    assert not db.sql("FROM mappers").num_rows


def test_a_method_that_is_not_there(db):
    with pytest.raises(NotFound, match=r"no scores by 'd_trak'; make them first: attrdb score .* d-trak"):
        train_on_table(db, settings=TableSettings(target="d_trak"))
    with pytest.raises(NotFound, match="no method 'mine' in"):
        train_on_table(db, settings=TableSettings(target="mine"))


def test_images_without_features_are_named(db):
    db.writer.add_encoder("toy:3", 3, {}, "none")
    with pytest.raises(InvalidValue, match=r"96 images .* no 'toy_3' feature, such as 'm00/0/0'; encode them first"):
        train_on_table(db, "toy_3")


def test_the_command(db):
    words = ["train", str(db.path), "--on", "attribution-table", "--mapper-id", "mine", "--lr", "0.01", "--steps", "30"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "mapper mine: on validation models its rank correlation with the scores is 0." in done.stderr
    assert "mapper mine was trained already, nothing to do" in CliRunner().invoke(main, words).stderr
    other = CliRunner().invoke(main, [*words, "--epochs", "3"])
    assert other.exit_code == 1
    assert "--epochs is not an option of training on attribution table; leave it out" in other.stderr
    pairs = CliRunner().invoke(main, ["train", str(db.path), "--loss", "soft"])
    assert "--loss is not an option of training on pairs; leave it out" in pairs.stderr
    evaluated = CliRunner().invoke(main, ["evaluate", str(db.path), "--mapper", "mine"])
    assert evaluated.exit_code == 0, evaluated.output
    page = db.path.parent / "report.html"
    report = CliRunner().invoke(main, ["report", str(db.path), "--out", str(page)])
    assert report.exit_code == 0, report.output
    assert "Attribution models" in page.read_text()
