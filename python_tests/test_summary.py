"""What results files come to, against numbers that were worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from test_results import LOCUSLAB, RUN, row, write

from pacd_fast.certification import read_results, summarize, summary_table


def by_hand(tmp_path):
    return read_results(
        write(
            tmp_path / "hand.tsv",
            [
                row(0, 1, 1, 1.0, 0.9),
                row(1, 1, 1, 0.25, 0.8),
                row(2, 1, 0, 1.75, 0.7),
                row(3, 2, -1, 0.0, 0.4),
                row(4, 2, 2, 0.0, 0.5),
            ],
            dataclasses.replace(RUN, sigma=10.0),
        )
    )


def test_summary_by_hand(tmp_path):
    summary = summarize(by_hand(tmp_path))
    assert (summary.images, summary.abstentions, summary.acr, summary.aca) == (5, 1, 1.25 / 5, 2 / 5)
    assert summary.clean_accuracy == 3 / 5
    assert summary.radii == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert summary.certified_accuracy == (3 / 5, 2 / 5, 1 / 5, 1 / 5, 1 / 5)
    # 0.4 0.5 0.7 0.8 0.9, linear between order statistics.
    assert summary.p_lower_quantiles == pytest.approx({0.05: 0.42, 0.25: 0.5, 0.5: 0.7, 0.75: 0.8, 0.95: 0.88})
    assert summarize(by_hand(tmp_path), [0.25, 0.26, 9]).certified_accuracy == (2 / 5, 1 / 5, 0)


def test_summary_of_one_class(tmp_path):
    summary = summarize(by_hand(tmp_path), target_class=2)
    assert (summary.images, summary.abstentions, summary.acr, summary.clean_accuracy) == (2, 1, 0.0, 0.5)
    assert summary.radii == (0.0,)
    assert summary.p_lower_quantiles[0.5] == pytest.approx(0.45)
    with pytest.raises(ValueError, match="no image of class 7 among 5"):
        summarize(by_hand(tmp_path), target_class=7)
    for radius in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="radii must be finite"):
            summarize(by_hand(tmp_path), [radius])


def test_summary_as_json(tmp_path):
    values = json.loads(json.dumps(summarize(by_hand(tmp_path)).to_dict(), allow_nan=False))
    assert values["acr"] == 0.25
    assert values["certified_accuracy"] == [0.6, 0.4, 0.2, 0.2, 0.2]
    assert values["p_lower_quantiles"]["0.5"] == pytest.approx(0.7)
    assert values["run"]["sigma"] == 10.0


def test_table(tmp_path):
    published = tmp_path / "published.tsv"
    published.write_text(LOCUSLAB)
    text = summary_table({"ours": by_hand(tmp_path), "published": read_results(published)})
    lines = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in text.splitlines()[1:-1]}
    assert text.splitlines()[0].split() == ["ours", "published"]
    assert lines["images"] == ["5", "4"]
    assert lines["ACR"] == ["0.2500", "0.4265"]
    assert lines["abstained"] == ["1", "1"]
    assert lines["certified at 0.25"] == ["40.00%", "50.00%"]
    assert lines["certified at 1"] == ["20.00%", "25.00%"]
    assert "certified at 1.25" not in lines
    assert lines["p_A quantile 0.5"] == ["0.699999", "-"]  # the file has 0.6999999...
    *table, warning = text.splitlines()
    assert len({len(line) for line in table}) == 1 and warning.startswith("published: noise in floats")
    assert "certified at 0.3" in summary_table({"ours": by_hand(tmp_path)}, [0.3], target_class=1)
    seeds = summary_table({"a": by_hand(tmp_path), "b": read_results(published)}, over_seeds=True).splitlines()
    assert seeds[0].split() == ["a", "b", "mean±sd"] and seeds[2].split()[1:] == ["0.2500", "0.4265", "0.3382±0.1248"]
    assert seeds[1].split()[1:] == ["5", "4", "4.5±0.7"] and seeds[-2].split()[-3:-1] != ["-", "-"]
    assert "mean" not in summary_table({"a": by_hand(tmp_path)}, over_seeds=True)


def test_a_huge_radius_is_refused_or_takes_few_columns(tmp_path):
    """In a file that does not say sigma; the table's radii would take gigabytes."""
    path = tmp_path / "cohen.tsv"
    for radius, steps in (("31", 31), ("100000", 40), ("1e300", 0), ("9999999999999999999", 0)):
        path.write_text(f"idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t{radius}\t1\t0:00:01\n")
        if steps:
            radii = summarize(read_results(path)).radii
            assert radii[0] == 0 and 20 <= len(radii) <= steps + 1 and radii[-1] <= float(radius)
        else:
            with pytest.raises(ValueError, match="beyond any noise level"):
                read_results(path)
