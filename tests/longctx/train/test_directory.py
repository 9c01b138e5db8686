import dataclasses

import pytest

from longctx.configs import RUNS
from longctx.errors import RunError
from longctx.train.directory import check_directory, read_config, write_config


def test_a_directory_belongs_to_one_run(tmp_path):
    config = RUNS["quickstart"]
    check_directory(config, tmp_path)
    assert not list(tmp_path.iterdir())
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=7))
    mlp = dataclasses.replace(config.model.mlp, width=64)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp=mlp))
    check_directory(wider, tmp_path)  # no checkpoint: nothing that another run could spoil
    (tmp_path / "checkpoints" / "200").mkdir(parents=True)
    check_directory(longer, tmp_path)
    with pytest.raises(RunError, match=r"\(model\.mlp\.width \d+ -> 64\)"):
        check_directory(wider, tmp_path)
    for change, message in (
        ({"init": "other"}, r"train\.init '' -> 'other'"),
        ({"seed": 7}, r"train\.seed 0 -> 7"),
        ({"steps": 199}, r"train\.steps=199 must be at least 200"),
    ):
        train = dataclasses.replace(config.train, **change)
        with pytest.raises(RunError, match=message):
            check_directory(dataclasses.replace(config, train=train), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file"):
        check_directory(config, tmp_path / "file")


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="model is missing"):
        read_config(tmp_path)
