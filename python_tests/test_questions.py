"""Modes of certification through the public functions: what is issued, from how many samples, at any batch size."""

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import pacd_fast
from pacd_fast.cli import main

P = [0.3, 0.49, 0.52, 0.6, 0.75, 0.9, 0.97, 0.999]
IMAGES = torch.tensor([[float(norm.ppf(p)), 0.0] for p in P])


def plane(x: Tensor) -> Tensor:
    """Class 1 with probability P[i] under noise of sigma = 1 at image i, and a third class that nobody gets."""
    return torch.stack([-x[:, 0], x[:, 0], torch.full_like(x[:, 0], -1e9)], 1)


def certify(**options):
    given = {"num_classes": 3, "sigma": 1.0, "n": 10_000, "seed": 2}
    return pacd_fast.certify(plane, IMAGES, **(given | options))


MODES = {
    "full": {},
    "radii": {"radii": [0.1, 0.5, 1.0, 1.5]},
    "tolerance": {"tolerance": 0.1},
    "two sides": {"sides": 2},
    "two sides, radii": {"sides": 2, "radii": [0.1, 0.5, 1.0]},
    "two sides, tolerance": {"sides": 2, "tolerance": 0.1},
    "float": {"noise": "float"},
}


@pytest.mark.parametrize("mode", MODES)
def test_certificates_do_not_depend_on_batches_or_company(mode):
    found = certify(**MODES[mode])
    for batch_size in (64, 999, 100_000):
        other = certify(batch_size=batch_size, **MODES[mode])
        for name in ("prediction", "radius", "p_lower", "rival_upper", "samples", "counts", "selection_counts"):
            assert torch.equal(getattr(found, name), getattr(other, name)), name
    alone = pacd_fast.certify(
        plane, IMAGES[4:5], num_classes=3, sigma=1.0, n=10_000, seed=2, image_ids=torch.tensor([4]), **MODES[mode]
    )
    assert torch.equal(alone.counts[0], found.counts[4]) and alone.samples[0] == found.samples[4]


@pytest.mark.parametrize("mode", MODES)
def test_radii_are_true_and_near(mode):
    """The true radius at image i is the quantile of its probability, with one bound and with two."""
    found = certify(**MODES[mode])
    true = IMAGES[:, 0].double().abs()
    assert bool((found.radius <= true).all())
    assert set(found.prediction[:2].tolist()) <= {-1, 0} and set(found.prediction[2:].tolist()) <= {-1, 1}
    if "radii" in MODES[mode]:
        radii = MODES[mode]["radii"]
        assert set(found.radius[found.prediction >= 0].tolist()) <= set(radii)
        reached = [max((r for r in radii if r <= 0.9 * t), default=0.0) for t in true.tolist()[4:]]
        assert found.radius[4:].tolist() >= reached
    else:
        assert bool((found.radius[4:] >= true[4:] - 0.1 - 0.12 * true[4:]).all())
    if mode != "full" and mode not in ("two sides", "float"):
        assert float(found.samples.double().mean()) < 7000


def test_giving_up_changes_no_certificate():
    for sides in (1, 2):
        early, full = certify(sides=sides), certify(sides=sides, futility=0)
        issued = full.prediction >= 0
        for name in ("prediction", "radius", "p_lower", "counts"):
            assert torch.equal(getattr(early, name)[issued], getattr(full, name)[issued])
        assert bool((early.prediction[~issued] == -1).all())
        assert sides == 2 or int(early.samples[~issued].sum()) < 10_000 * int((~issued).sum())


def test_two_sides_certify_below_one_half():
    """Three classes at 0.45, 0.3, 0.25: one side abstains, two sides certify."""
    cuts = torch.tensor([float(norm.ppf(0.3)), float(norm.ppf(0.75))])

    def thirds(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.bucketize(x[:, 0].contiguous(), cuts), 3).float()

    one, two = (
        pacd_fast.certify(thirds, torch.zeros(1, 2), num_classes=3, sigma=1.0, n=20_000, seed=1, sides=s)
        for s in (1, 2)
    )
    true = 0.5 * float(norm.ppf(0.45) - norm.ppf(0.3))
    assert one.prediction.tolist() == [-1] and two.prediction.tolist() == [1]
    assert 0.8 * true < float(two.radius) <= true


def test_predict_errs_seldom_and_stops_early():
    found = pacd_fast.predict(plane, IMAGES, num_classes=3, sigma=1.0, n=10_000, seed=3)
    assert set(found.prediction[[0, 4, 5, 6, 7]].tolist()) <= {0, 1} and found.prediction[0] == 0
    assert int(found.samples[7]) < 200 and int(found.samples[2]) > 1000
    assert torch.equal(found.counts.sum(1), found.samples)


BAD = {
    "radii must rise": {"radii": [0.5, 0.25]},
    "not be negative": {"radii": [-0.5]},
    "at least one radius": {"radii": []},
    "radii up to 3": {"radii": [9.0]},
    "tolerance must be positive": {"tolerance": 0.0},
    "tolerance must be at least": {"tolerance": 1e-9},
    "not both": {"tolerance": 0.1, "radii": [0.5]},
    "sides must be 1 or 2": {"sides": 3},
    "futility must be in": {"futility": 2.0},
    "noise must be one of": {"noise": "poisson"},
    "step must be positive": {"step": 0.0},
    "n must be a whole number": {"n": 100.5},
    "a pixel lies": {"check": True},
    "alpha must be at most 1/2": {"alpha": 0.7, "radii": [0.1]},
    "must be below 2\\^22": {"step": 1e-7},
    "step and offset are of lattice": {"noise": "float", "step": 0.1},
    "compile must be": {"compile": "always"},
    "a number, or one per channel": {"step": [0.1, 0.1, 0.1]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_questions_are_refused_before_sampling(message):
    def never(x: Tensor) -> Tensor:
        raise AssertionError("sampled")

    with pytest.raises(ValueError, match=message):
        pacd_fast.certify(never, IMAGES, **({"num_classes": 3, "sigma": 1.0, "n": 10_000} | BAD[message]))


def test_void_samples_are_misses(monkeypatch):
    """Every tenth sample void: p_lower falls as if those had voted for nobody, the rival bound as if for the rival."""
    from pacd_fast.certification.noise import Copies

    draw = Copies.draw

    def some_void(self, out, rows):
        return draw(self, out, rows) | (rows[:, 2] % 10 == 0)

    monkeypatch.setattr(Copies, "draw", some_void)
    found = pacd_fast.certify(plane, IMAGES[-1:], num_classes=3, sigma=1.0, n=10_000, seed=2, sides=2)
    assert int(found.voids) == 1000 and int(found.counts.sum()) == 9000
    hits, rival = int(found.counts[0, 1]), int(found.counts[0, 0]) + 1000
    n = torch.tensor(10_000)
    assert float(found.p_lower) == float(pacd_fast.ops.clopper_pearson_lower(torch.tensor(hits), n, 0.0005))
    assert float(found.rival_upper) == float(pacd_fast.ops.clopper_pearson_upper(torch.tensor(rival), n, 0.0005))
    soft = pacd_fast.soft_certify(plane, IMAGES[-1:], num_classes=3, sigma=1.0, n=10_000, seed=2, beta=1e4)
    assert float(soft.mean.sum()) == pytest.approx(0.9, abs=1e-4)
    assert int(pacd_fast.predict(plane, IMAGES[:1], num_classes=3, sigma=1.0, seed=2).prediction) == 0
    close = torch.tensor([[float(norm.ppf(0.54)), 0.0]])
    assert int(pacd_fast.predict(plane, close, num_classes=3, sigma=1.0, seed=2).prediction) == -1


def test_predict_and_modes_on_the_command_line(tmp_path, capsys):
    model = tmp_path / "m.safetensors"
    assert main(["train", "--model", "convnet", "--data", "mnist5k", "--train-images", "200", "--epochs", "1",
                 "--sigma", "0.5", "--method", "gaussian", "--out", str(model)]) == 0  # fmt: skip
    images = ["--checkpoint", str(model), "--data", "mnist5k", "--count", "8", "--n", "500", "--seed", "1"]
    assert main(["predict", *images, "--out", str(tmp_path / "p.tsv")]) == 0
    assert "samples an image" in capsys.readouterr().out
    header, *rows = (tmp_path / "p.tsv").read_text().splitlines()
    assert len(rows) == 8 and header.startswith("idx\tlabel\tpredict\tcorrect\tsamples\tvotes\tn0")
    assert main(["predict", *images, "--out", str(tmp_path / "p.tsv")]) == 2, "nothing is overwritten"
    out = ["--out", str(tmp_path / "r.tsv")]
    assert main(["certify", *images, "--radii", "0.1", "0.2", *out]) == 0
    assert main(["summary", str(tmp_path / "r.tsv")]) == 0
    assert "samples an image" in capsys.readouterr().out
    before = (tmp_path / "r.tsv").read_bytes()
    for wrong in (["--radii", "0.1", "0.3"], ["--tolerance", "0.1"], [], ["--radii", "0.1", "0.2", "--sides", "2"],
                  ["--radii", "0.1", "0.2", "--noise", "float"], ["--radii", "0.1", "0.2", "--step", "0.01"],
                  ["--radii", "0.1", "0.2", "--batch-size", "100"]):  # fmt: skip
        assert main(["certify", *images, *wrong, *out]) == 2
        assert "another run" in capsys.readouterr().err and (tmp_path / "r.tsv").read_bytes() == before
