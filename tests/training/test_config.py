"""Settings: strict files, `--set`, documentation made of the declarations."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from click.testing import CliRunner

import recurformer
from recurformer import LanguageModel, ModelConfig
from recurformer.choose import SCAN_CHOICES
from recurformer.cli import cli, main
from recurformer.training import TrainConfig, read_train_config
from recurformer.training.config import OptimizerConfig, Scan, ScheduleConfig, names, open_tokens
from recurformer.training.reference import markdown

DOCS = Path(__file__).parents[2] / "docs"

TOML = """
batch_size = 8
[model]
d_model = 16
n_heads = 2
n_layers = 2
vocab_size = 256
layers = ["recurrent", "standard"]
[optimizer]
lr = 1e-3
grad_clip = "none"
[log]
loggers = ["tensorboard"]
"""
YAML = """
batch_size: 8
model: {d_model: 16, n_heads: 2, n_layers: 2, vocab_size: 256, layers: [recurrent, standard]}
optimizer:
  lr: 1e-3
  grad_clip: null
log: {loggers: [tensorboard]}
"""


def test_toml_yaml_and_json_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.yaml").write_text(YAML)
    config = read_train_config(tmp_path / "a.toml")
    assert config == read_train_config(tmp_path / "a.yaml")
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    assert config == read_train_config(tmp_path / "a.json")
    assert config.optimizer == OptimizerConfig(lr=0.001, grad_clip=None)
    assert config.model == ModelConfig(
        d_model=16, n_heads=2, n_layers=2, vocab_size=256, layers=("recurrent", "standard")
    )
    assert config.log.loggers == ("tensorboard",)


def test_set_wins_over_the_file_and_reads_every_kind_of_value(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    settings = [
        "optimizer.lr=3e-4", "model.layers=first:1", "model.qk_norm=none", "data.validation=none",
        "sample.prompt=Hello", "model.tie_embeddings=true", "log.loggers=[]", "batch_size=4", "data.train=a=b",
    ]  # fmt: skip
    config = read_train_config(tmp_path / "a.toml", settings)
    assert (config.optimizer.lr, config.model.layers, config.batch_size) == (3e-4, "first:1", 4)
    assert config.model.qk_norm == "none"  # a choice of that name, not the absence of one
    assert config.data.validation is None
    assert config.data.train == "a=b"
    assert (config.sample.prompt, config.model.tie_embeddings, config.log.loggers) == ("Hello", True, ())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.weight_deacy=0", "unknown setting 'optimizer.weight_deacy'; did you mean 'optimizer.weight_decay'"),
        ("model.n_layer=2", "unknown setting 'model.n_layer'; did you mean 'model.n_layers'?"),
        ("lr=0.1", "unknown setting 'lr'; did you mean 'optimizer.lr'?"),
        ("batch_sice=4", "unknown setting 'batch_sice'; did you mean 'batch_size'?"),
        ("optimiser.beta_1=0.9", "unknown setting 'optimiser.beta_1'; did you mean 'optimizer.beta1'?"),
        ("qqqq=1", "unknown setting 'qqqq'"),
        ("optimizer=3", "optimizer is 3; it is a section"),
        ("optimizer.lr.x=3", "unknown setting 'optimizer.lr.x'"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; it must be a finite number above 0"),
        ("optimizer.lr=-1", "optimizer.lr is -1; it must be a finite number above 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan; it must be"),
        ("schedule.steps=1.5", "schedule.steps is 1.5; it must be a whole number of at least 1"),
        ("schedule.steps=1000000000001", "schedule.steps is 1000000000001; it must be a whole number of at least 1"),
        ("schedule.steps=true", "schedule.steps is True; it must be a whole number of at least 1"),
        ("schedule.warmup_steps=2000", "schedule.warmup_steps is 2000; it must not exceed steps 1000"),
        ("schedule.final_fraction=1.5", "schedule.final_fraction is 1.5; it must be a number of at least 0"),
        ("precision=fp8", "precision is 'fp8'; choose one of 'fp32', 'bf16', 'fp64'"),
        ("log.loggers=[\"wand\"]", "log.loggers holds 'wand'; choose one of 'tensorboard', 'wandb'; did"),
        ("micro_batch_size=64", "micro_batch_size is 64; it must not exceed batch_size 32"),
        ("recurrent_micro_batch_size=64", "recurrent_micro_batch_size is 64; it must be at most batch_size 32"),
        ("timeout=1e14", "timeout is 100000000000000.0; it must be a number above 0 and at most 31,536,000"),
        ("model.d_model=130", "model.d_model 130 is not divisible by n_heads 4"),
        ("model.preset=nanoo", "model.preset is 'nanoo'; choose one of 'nano'"),
        ("batch_size", "--set 'batch_size' has no '='"),
        ("compile=1", "compile is 1; it must be true or false or none"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named_with_its_value(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_train_config(None, ["model.vocab_size=256", setting])


def test_every_scan_is_a_setting():
    assert get_args(Scan) == SCAN_CHOICES


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.train", "2024"), ("data.train", "2024-05-01"), ("data.train", "true"), ("data.train", "1e5"),
        ("data.train", "d.v2"), ("data.train", "data#1"), ("data.train", "données"), ("data.train", "with space"),
        ("data.train", "llama🦙"), ("data.train", "[1]"), ("data.train", "12:30:00"), ("data.train", "0x10"),
        ("data.validation", "2024"), ("data.validation", "false"), ("sample.prompt", "1"), ("sample.prompt", "inf"),
        ("init_from", "2024"), ("log.wandb_project", "3.5"), ("device", "0"),
    ],
)  # fmt: skip
def test_text_that_reads_as_a_value_stays_text(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recurformer.save(LanguageModel(ModelConfig(vocab_size=256, d_model=8, n_heads=1, n_layers=1)), tmp_path / "2024")
    config = read_train_config(None, [f"{name}={value}", "model.vocab_size=256"])
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value


def test_quotes_and_numbers_are_still_read():
    config = read_train_config(None, ['data.train="2024"', "seed=2024", 'sample.prompt="1"', "model.vocab_size=0x100"])
    assert (config.data.train, config.seed, config.sample.prompt, config.model.vocab_size) == ("2024", 2024, "1", 256)
    with pytest.raises(ValueError, match=r"data\.window is .*; it must be a whole number"):
        read_train_config(None, ["data.window=2024-05-01", "model.vocab_size=256"])


@pytest.mark.parametrize("name", ["modèle", "llama-🦙", 'quote"d', "back\\slash", "2024", "true", "a=b", "none "])
def test_init_from_is_taken_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recurformer.save(LanguageModel(ModelConfig(vocab_size=97, d_model=8, n_heads=1, n_layers=1)), tmp_path / name)
    config = read_train_config(None, (), init_from=name)
    assert (config.init_from, config.model.vocab_size) == (name, 97)
    with pytest.raises(ValueError, match="name two folders; drop one"):
        read_train_config(None, ["init_from=other"], init_from=name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer.lr": 0.001}, "'optimizer.lr' is written as one name; write lr in the table optimizer"),
        ({"model.layers": "standard", "seed": 1}, "'model.layers' is written as one name"),
        ({"model": {"preset": ["nano"]}}, "model.preset is ('nano',); choose one of 'nano'"),
        ({"model": {"preset": {"a": 1}}}, "unknown setting 'model.preset.a'"),
        ({"model": {"preset": 5}}, "model.preset is 5; choose one of"),
        ({"init_from": 5}, "init_from is 5; it must be text or none"),
        ({"init_from": ["a"]}, "init_from is ('a',); it must be text or none"),
        ({"optimiser": {}}, "unknown setting 'optimiser'"),
        ({"batch_size": {}}, "batch_size is {}; it must be a whole number"),
        ({"optimizer": []}, "optimizer is []; it is a section"),
        ({"model": "nano"}, "model is 'nano'; it is a section"),
        ({"model": {"dropout": 0.1}}, "unknown setting 'model.dropout'"),
        ({"data": {"train": 5}}, "data.train is 5; it must be text that is not empty"),
        ({"x" * 5000: 1}, "unknown setting 'xxx"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_slips_are_one_sentence(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TrainConfig.from_dict(values)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.dropout", None), ("model.droput", None), ("optimizer.momentum", None),
        ("model.rope_thet", "model.rope_theta"),
        ("data.windw", "data.window"), ("model.lr", "optimizer.lr"), ("trainer.warmup_step", "schedule.warmup_steps"),
        ("train", "data.train"),
    ],
)  # fmt: skip
def test_a_hint_is_near_or_absent(key, hint):
    with pytest.raises(ValueError, match=f"unknown setting '{key}'") as error:
        read_train_config(None, [f"{key}=1"])
    found = re.search("did you mean '(.*)'", str(error.value))
    assert (found and found[1]) == hint


def test_one_logger_needs_no_list(tmp_path):
    for text in ("wandb", '"wandb"', '["wandb"]', "tensorboard,wandb"):
        assert read_train_config(None, [f"log.loggers={text}", "model.vocab_size=256"]).log.loggers[-1] == "wandb"
    (tmp_path / "a.toml").write_text('[log]\nloggers = "tensorboard"\n[model]\nvocab_size = 256\n')
    assert read_train_config(tmp_path / "a.toml").log.loggers == ("tensorboard",)
    with pytest.raises(ValueError, match=r"log\.loggers holds 'wand'; choose one of"):
        read_train_config(None, ["log.loggers=wand", "model.vocab_size=256"])


@pytest.mark.parametrize("which", ["train", "validation"])
def test_a_text_file_is_no_folder_of_tokens(which, tmp_path):
    (file := tmp_path / "words.txt").write_text("words")
    config = read_train_config(None, [f"data.{which}={file}", "model.vocab_size=256"])
    with pytest.raises(ValueError, match=rf"data.{which} is .*words.txt.*recurformer prepare .*words.txt --out DIR"):
        open_tokens(config.data, which)


def test_missing_data_need_no_vocabulary_where_they_may_be_missing(tmp_path, values):
    missing = [f"data.train={tmp_path}/none"]
    with pytest.raises(ValueError, match="none"):
        read_train_config(None, missing)
    assert read_train_config(None, missing, data_may_be_missing=True).model.vocab_size == ModelConfig.vocab_size
    preset = read_train_config(None, [*missing, "model.preset=300m-6"], data_may_be_missing=True)
    assert preset.model.vocab_size == 32100
    there = values()["data"]["train"]
    found = read_train_config(None, [f"data.train={there}", "model.preset=300m-6"], data_may_be_missing=True)
    assert found.model.vocab_size == 256


def test_the_share_of_a_process():
    config = read_train_config(
        None,
        ["model.vocab_size=256", "model.layers=first:1", "batch_size=32", "micro_batch_size=8",
         "recurrent_micro_batch_size=16"],
    )  # fmt: skip

    def sizes(config):
        return config.batch_size, config.micro_batch_size, config.recurrent_micro_batch_size

    assert config.share(1) == config
    assert sizes(config.share(2)) == (16, 8, 16)
    assert sizes(config.share(8)) == (4, 4, 4)
    with pytest.raises(ValueError, match="batch_size 32 is not divisible by 3 processes"):
        config.share(3)
    whole = dataclasses.replace(config, micro_batch_size=None)  # each process takes its share at once
    assert sizes(whole.share(2)) == (16, None, 16)
    with pytest.raises(ValueError, match="recurrent_micro_batch_size is 16, less than the 32 sequences"):
        whole.share(1)
    with pytest.raises(ValueError, match="it must be at least micro_batch_size 8 and at most batch_size 32"):
        dataclasses.replace(config, recurrent_micro_batch_size=4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.ini", "", "must end in .toml"),
        ("a.toml", "a = = 1", "is not valid TOML"),
        ("a.yaml", "[1, 2]", "holds a list, not a table"),
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.json", "{", "is not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_train_config(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_train_config(tmp_path / f"missing-{name}".replace(".ini", ".toml"))


def test_limits_hold_without_a_file_too():
    with pytest.raises(ValueError, match=r"beta2 is 1\.0; it must be a number of at least 0 and less than 1"):
        OptimizerConfig(beta2=1.0)
    assert ScheduleConfig(steps=30).warmup == 3
    assert ScheduleConfig(steps=30, warmup_steps=0).warmup == 0


def test_a_preset_is_changed_by_the_other_settings_and_the_data_give_the_vocabulary(values):
    table = values()
    table["model"] = {"preset": "300m-6", "d_model": 64, "n_heads": 2, "layers": "standard"}
    model = TrainConfig.from_dict(table).model
    expected = ModelConfig.preset("300m-6", d_model=64, n_heads=2, layers="standard", vocab_size=256)
    assert dataclasses.replace(model, vocab_size=256) == expected
    from recurformer.data import TokenDataset

    assert model.vocab_size == TokenDataset(table["data"]["train"]).vocab_size


def test_init_from_gives_the_shape(tmp_path, values):
    shape = ModelConfig(vocab_size=300, d_model=24, n_heads=3, n_layers=1)
    recurformer.save(LanguageModel(shape), tmp_path / "start")
    table = values(init_from=str(tmp_path / "start"))
    table["model"] = {"layers": "standard"}
    assert TrainConfig.from_dict(table).model == dataclasses.replace(shape, layers="standard")
    with pytest.raises(ValueError, match="drop one of them"):
        TrainConfig.from_dict({**table, "model": {"preset": "nano"}})


def test_a_run_that_began_from_a_folder_needs_it_no_more(values):
    """Its configuration has the whole shape, but for settings that came later."""
    shape = ModelConfig(vocab_size=300, d_model=24, n_heads=3, n_layers=1)
    table = values(init_from="/nowhere")
    for missing in ((), ("embedding_std",)):
        table["model"] = {name: value for name, value in shape.to_dict().items() if name not in missing}
        assert TrainConfig.from_dict(table).model == shape
    del table["model"]["n_layers"]
    with pytest.raises(ValueError, match="nowhere"):
        TrainConfig.from_dict(table)


def test_dictionaries_round_trip(tiny):
    config = tiny(optimizer__grad_clip=None, log__loggers=("wandb",), micro_batch_size=2)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_docs_and_help_show_every_setting_and_default():
    assert (DOCS / "configuration.md").read_text() == markdown()
    result = CliRunner().invoke(cli, ["train", "--help"])
    assert result.exit_code == 0
    for name in names():
        assert re.search(rf"^\s+{re.escape(name)}\s", result.output, re.MULTILINE), name
    for name in ("--config", "--set", "--out", "--resume", "--allow-change", "--stop-at", "--quiet"):
        assert name in result.output
    assert "[default: 0.002]" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "text",
    [
        "a." * 30_000 + "a=1", "model.d_model=" + "9" * 50_000, "data.train={" + "a." * 30_000 + "a=1}",
        "model.layers=" + "x" * 50_000, "init_from=" + "x" * 5_000, "seed=" + "[" * 50_000,
    ],
    ids=lambda text: text[:15],
)  # fmt: skip
def test_long_and_deep_settings_cost_one_short_line(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--set", "model.vocab_size=256", "--set", text, "--out", str(tmp_path / "run"), "--quiet"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert len(error) < 1600
    assert not (tmp_path / "run").exists()


def test_a_llama_folder_as_a_start_prints_the_command(tmp_path, capsys):
    (tmp_path / "my llama").mkdir()
    (tmp_path / "my llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit) as stop:
        main(["train", "--init-from", str(tmp_path / "my llama"), "--out", str(tmp_path / "run"), "--quiet"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"convert the model first: recurformer convert '{tmp_path}/my llama' 'my llama-recurformer'" in error
