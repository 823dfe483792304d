"""A config is read, overridden and written without surprises; what is wrong is named."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from llmzoo_jax import cli, config
from llmzoo_jax.config import Config, ConfigError, DataConfig, ModelConfig, Source

MINIMAL = """
from llmzoo_jax.config import Config, DataConfig, Source

def get_config(arg=""):
    return Config(run_dir="runs/" + arg, tokenizer="t", data=DataConfig(train=(Source(path="a"),)))
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.py"
    path.write_text(MINIMAL)
    return str(path)


# --- overriding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("run_dir=runs/a=b", "runs/a=b"),
        ("seed=7", 7),
        ("optim.learning_rate=1e-5", 1e-5),
        ("optim.epochs=2", 2.0),
        ("optim.schedule=linear", "linear"),
        ("compute.loss_chunk=0", 0),
        ("data.languages=en,fr,pt-BR", ("en", "fr", "pt-BR")),
        ("data.languages=", ()),
        ("mesh.fsdp=-1", -1),
    ],
)
def test_an_override_has_the_type_of_its_field(text, want, minimal):
    value = config.load(minimal, [text])
    for name in text.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == want
    assert type(value) is type(want)


def test_a_key_of_lora_makes_a_lora_run_and_none_unmakes_it(minimal):
    assert config.load(minimal).lora is None
    some = config.load(minimal, ["lora.rank=8", "lora.targets=q_proj,v_proj"])
    assert some.lora == config.LoraConfig(rank=8, targets=("q_proj", "v_proj"))
    assert config.load(minimal, ["lora.rank=8", "lora=none"]).lora is None
    with pytest.raises(ConfigError, match=r"unknown key 'rnk'; did you mean 'lora\.rank'"):
        config.load(minimal, ["lora.rnk=8"])
    with pytest.raises(ConfigError, match=r"config\.model is not set in the config file"):
        config.load(minimal, ["model.vocab_size=8"])  # of which family?
    saved = config.to_dict(some)["lora"]
    assert config.lora_from_dict(saved) == some.lora
    assert config.lora_from_dict(None) is None


def test_an_override_leaves_the_rest_and_the_last_one_wins(minimal):
    plain = config.load(minimal)
    changed = config.load(minimal, ["optim.b2=0.9", "seed=1", "optim.b2=0.95"])
    assert changed == dataclasses.replace(
        plain, seed=1, optim=dataclasses.replace(plain.optim, b2=0.95)
    )


def test_keys_of_the_model_can_be_set(repository, monkeypatch):
    monkeypatch.chdir(repository)
    changed = config.load(
        "configs/quickstart.py:chimera",
        ["model.num_layers=1", "model.rope.factor=none", "model.rope.theta=5e5",
         "model.tie_embeddings=false", "model.rope.original_max_positions=64"],
    )  # fmt: skip
    assert changed.model.num_layers == 1
    assert changed.model.rope.factor is None
    assert changed.model.rope.theta == 5e5
    assert changed.model.rope.original_max_positions == 64
    assert changed.model.tie_embeddings is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.learning_rte=1", r"optim\.learning_rte: unknown key 'learning_rte'; "
         r"did you mean 'optim\.learning_rate'\? \(optim has optimizer, state_dtype, "),
        ("sede=1", r"--config\.sede: unknown key 'sede'; did you mean 'seed'\? \(the config has "),
        ("optim.zzzzzz=1", r"unknown key 'zzzzzz' \(optim has "),
        ("seed.a=1", r"--config\.seed is a value and has no key 'a'"),
        ("optim=1", r"--config\.optim can't be set on the command line"),
        ("data.train=a", r"--config\.data\.train can't be set on the command line"),
        ("seed", r"write --config\.seed=VALUE"),
        ("seed=many", r"--config\.seed=many: expected int"),
        ("seed=1.5", r"--config\.seed=1\.5: expected int"),
        ("seed=none", r"--config\.seed=none: expected int"),
        ("optim.learning_rate=fast", r"--config\.optim\.learning_rate=fast: expected float"),
        ("optim.schedule=cosin", r"optim\.schedule=cosin: expected one of cosine, linear, const"),
        ("data.overlong=SPLIT", r"data\.overlong=SPLIT: expected one of split, truncate, error"),
    ],
)  # fmt: skip
def test_a_wrong_override_names_its_key_and_what_was_expected(text, message, minimal):
    with pytest.raises(ConfigError, match=message):
        config.load(minimal, [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.tie_embeddings=yes", r"model\.tie_embeddings=yes: expected true or false"),
        ("model.rope.factor=much", r"model\.rope\.factor=much: expected float"),
        ("model.family=bloom", r"model\.family=bloom: expected one of llama"),
        ("model.rope.scaling=yarn", r"scaling=yarn: expected one of default, linear, llama3"),
        ("model.layer_norm_eps=1", r"unknown key 'layer_norm_eps'; did you mean"),
    ],
)
def test_a_wrong_override_of_the_model_is_named(text, message, repository):
    with pytest.raises(ConfigError, match=message):
        config.load(f"{repository}/configs/quickstart.py:chimera", [text])


def test_a_key_of_a_model_that_is_read_from_a_folder_says_so(minimal):
    assert config.load(minimal).model is None
    with pytest.raises(ConfigError, match=r"--config\.model"):
        config.load(minimal, ["model.num_layers=3"])


@pytest.mark.parametrize(
    ("argv", "rest", "overrides"),
    [
        (["train", "--config=c.py"], ["train", "--config=c.py"], []),
        (
            ["train", "--config", "c", "--config.seed=1", "--v=2", "--config.data.languages=a,b"],
            ["train", "--config", "c", "--v=2"],
            ["seed=1", "data.languages=a,b"],
        ),
        (["train", "--config.seed", "1", "x"], ["train", "x"], ["seed=1"]),
        (["train", "--config.run_dir=a=b"], ["train"], ["run_dir=a=b"]),
        (["train", "--configure=1"], ["train", "--configure=1"], []),
    ],
)  # fmt: skip
def test_split_overrides(argv, rest, overrides):
    assert cli.split_overrides(argv) == (rest, overrides)


# --- files --------------------------------------------------------------------------------------


def test_the_argument_of_a_file_reaches_get_config(minimal):
    assert config.load(minimal).run_dir == "runs/"
    assert config.load(f"{minimal}:big").run_dir == "runs/big"


def test_a_missing_file_suggests_the_nearest(repository, monkeypatch):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError, match=r"no file 'configs/quikstart\.py'; did you mean "
                       r"'configs/quickstart\.py'\?"):  # fmt: skip
        config.load("configs/quikstart.py:phoenix")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", r"bad\.py has no function get_config\(\)"),
        ("def get_config():\n    return {}", r"get_config\(\) must return a Config, not dict"),
        ("def get_config(family):\n    return {}", r"--config=.*bad\.py: .*family"),
        (
            MINIMAL.replace("tokenizer=", "tokeniser="),
            r"bad\.py: .*unexpected keyword argument 'tokeniser'",
        ),
    ],
)
def test_a_broken_file_is_named(source, message, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=message):
        config.load(str(path))


def test_an_unknown_argument_of_a_file_is_named(repository):
    with pytest.raises(ConfigError, match=r"configs/quickstart\.py knows no 'phoenics'"):
        config.load(f"{repository}/configs/quickstart.py:phoenics")


def config_commands(repository):
    """(file, argument) of every ``--config=FILE[:arg]`` in the docstring of every config file."""
    found = {}
    for path in sorted((repository / "configs").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "def get_config(" not in text:
            continue
        name = path.relative_to(repository).as_posix()
        docstring = text.split('"""')[1]
        found[name] = re.findall(
            rf"python -m llmzoo_jax\.train --config={re.escape(name)}(:\w+)?", docstring
        )
    return found


def test_every_config_file_loads_as_its_docstring_says(repository, monkeypatch):
    monkeypatch.chdir(repository)
    commands = config_commands(repository)
    assert "configs/quickstart.py" in commands
    runs = {}
    for name, arguments in commands.items():
        assert arguments, f"{name}: the docstring has no command that runs it"
        for argument in arguments:
            loaded = config.load(name + argument)
            assert loaded.data.train, name
            assert loaded.model is not None or loaded.init_from, name
            json.dumps(config.to_dict(loaded))
            run = runs.setdefault(loaded.run_dir, name + argument)
            assert run == name + argument, f"{run} and {name + argument} share a run folder"


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["phoenix", "chimera"])
def test_a_model_config_survives_json(argument, repository):
    model: ModelConfig = config.load(f"{repository}/configs/quickstart.py:{argument}").model
    tree = json.loads(json.dumps(config.to_dict(model)))
    assert config.model_from_dict(tree) == model


def test_to_dict_is_plain_json(minimal):
    loaded = config.load(minimal, ["data.languages=en,fr"])
    tree = config.to_dict(loaded)
    assert tree == json.loads(json.dumps(tree))
    assert tree["data"]["languages"] == ["en", "fr"]
    assert tree["data"]["train"] == [{"path": "a", "weight": 1.0}]
    assert tree["model"] is None


def test_differences_names_every_key_that_differs(minimal):
    a = config.to_dict(config.load(minimal))
    b = config.to_dict(config.load(minimal, ["seed=3", "optim.b1=0.5", "data.languages=en"]))
    assert config.differences(a, a) == {}
    assert config.differences(b, a) == {
        "seed": (3, 0), "optim.b1": (0.5, 0.9), "data.languages": (["en"], []),
    }  # fmt: skip


def test_a_config_is_frozen_and_has_a_few_dozen_keys_at_most():
    plain = Config(run_dir="r", tokenizer="t", data=DataConfig(train=(Source(path="a"),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.optim.b1 = 0.5
    assert len(config.flatten(config.to_dict(plain))) <= 60


def test_reading_a_config_imports_no_jax(repository):
    code = (
        "import sys; from llmzoo_jax import config; "
        "config.load('configs/quickstart.py:phoenix', ['seed=1']); "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers'}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
