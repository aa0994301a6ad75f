"""`python -m tools.tokenize` and `python -m tools.describe --data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pretrain.data.samples import png, sample, write_shard
from tools import tokenize
from tools.describe import __main__ as describe

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "mixture.yaml"


@pytest.fixture
def data(tmp_path: Path) -> str:
    write_shard(tmp_path / "a-train.tar", [sample(f"{n}", png(n), f"picture {n}") for n in range(40)])
    write_shard(tmp_path / "a-val.tar", [sample(f"v{n}", png(n), f"other {n}") for n in range(10)])
    return f"data.path={tmp_path}"


def test_parts_then_the_mixture(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("1/2", "2/2"):
        assert tokenize.main([str(RECIPE), data, "--part", part]) == 0
        assert capsys.readouterr().out.endswith("1 shards are tokenised\n")
    assert describe.main([str(RECIPE), data, "--data", "--json"]) == 0
    out = capsys.readouterr().out
    assert "indexing" not in out
    facts = json.loads(out[out.index("{\n") :])
    many, few = facts["sources"]["many"], facts["sources"]["few"]
    assert many["documents"] + many["held_out"] == 40 and few["documents"] == 10 and few["held_out"] == 0
    assert (many["share"], few["share"]) == (0.75, 0.25) and facts["rows"] == 24 * 8
    assert few["epochs"] * few["rows"] + many["epochs"] * many["rows"] == pytest.approx(24 * 8)
    assert few["tokens"]["image"] == 10 * 16
    assert describe.main([str(RECIPE), data, "--data"]) == 0
    assert "192 rows over the run" in capsys.readouterr().out


def test_wrong_parts_are_refused(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tokenize.main([str(RECIPE), data, "--part", "3/2"])
    assert "--part: 3/2; write it as 2/8" in capsys.readouterr().err
