from __future__ import annotations

from pathlib import Path

import pytest

from modelpool.cli.models_file import read_dump, read_models
from modelpool.messages.models import ModelSpec
from modelpool.yaml_file import BadFile, text_of

GOOD = """\
models:
  - alias: a
    fake: true
  - &common
    alias: org/b
    model_name: org/model
    engine_args: {dtype: bfloat16}
  - <<: *common
    alias: c
"""


def test_a_file_of_models_is_read() -> None:
    models = read_models(GOOD, "m.yaml")
    assert models["a"] == ModelSpec(alias="a", fake=True)
    args = {"dtype": "bfloat16"}
    assert models["org/b"] == ModelSpec(alias="org/b", model_name="org/model", engine_args=args)
    assert models["c"] == ModelSpec(alias="c", model_name="org/model", engine_args=args)
    assert read_models("models: []", "m.yaml") == {}


def test_the_example_is_good() -> None:
    example = Path(__file__).parents[2] / "config" / "models.yaml"
    assert set(read_models(example.read_text(), "models.yaml")) == {"qwen", "embedder", "parrot"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "m.yaml:1: must be `models:` and a list below it"),
        ("- alias: a\n", "m.yaml:1: must be `models:`"),
        ("models: 3\n", "m.yaml:1: must be `models:`"),
        ("models: []\nkeys: []\n", "m.yaml:2: `keys`: only `models` may stand here"),
        ("models:\n  - alias: [\n", "m.yaml:3: is no YAML: "),
        ("models:\n  - alias: a\n    fake: true\n    fake: false\n", "m.yaml:4: `fake` is there twice"),
        ("models:\n  - 7\n", "m.yaml:2: in `models[0]`: Expected `object`, got `int`"),
        ("models:\n  - fake: true\n", "m.yaml:2: in `models[0].alias`: Object missing required field `alias`"),
        (
            "models:\n  - alias: a\n    fake: true\n\n  - alias: b\n    # none\n    fake: true\n    max_replicas: 0\n",
            "m.yaml:8: in `models[1].max_replicas`: `max_replicas`: Expected `int` >= 1, got 0",
        ),
        (
            "models:\n  - fake: true\n    alias: a\n    max_replica: 2\n",
            "m.yaml:4: in `models[0].max_replica`: Unknown field `max_replica`. Did you mean `max_replicas`?",
        ),
        ("models:\n  - fake: true\n    alias: a b\n", "m.yaml:3: in `models[0].alias`: `alias`: 'a b' must be"),
        (
            "models:\n  - alias: a\n    model_name: m\n    engine_args:\n      dtype: half\n      port: 3\n",
            "m.yaml:6: in `models[0].engine_args.port`: ",
        ),
        (
            "models:\n  - alias: a\n    fake: true\n  - alias: a\n    fake: true\n",
            "m.yaml:4: `models[1].alias`: 'a' is there twice",
        ),
        ("models:\n  - alias: a\n    engine_args: !!binary x\n", "m.yaml:"),
        ("models:\n  - alias: a\n    engine_args: !!python/object:os.system {}\n", "m.yaml:3: could not determine"),
        ("models:\n  - alias: a\n    fake: \0\n", "m.yaml:3: is no YAML: the character #x00 may not stand here"),
        ("models:\n  - alias: a\n    max_replicas: !!int x\n", "m.yaml:3: invalid literal for int()"),
        ("models:\n  - alias: a\n    max_replicas: 2024-13-01\n", "m.yaml:3: month must be in 1..12"),
        ("models:\n  - alias: a\n    idle_unload_s: .nan\n", "m.yaml:3: nan is no number that could be meant"),
        ("models:\n  - alias: a\n    gpu_memory_gb: .inf\n", "m.yaml:3: inf is no number that could be meant"),
        (
            "models:\n  - alias: a\n    engine_args: &x {x: *x}\n",
            "m.yaml:2: in `models[0]`: is nested too deep, or in itself",
        ),
        ("models: " + "[" * 5000 + "]" * 5000, "m.yaml: is nested too deep"),
        (
            "models:\n- &a0 [x]\n" + "".join(f"- &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60)),
            "m.yaml:1: its aliases stand for more than 1,000,000 values",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_field(text: str, says: str) -> None:
    with pytest.raises(BadFile) as bad:
        read_models(text, "m.yaml")
    assert str(bad.value).startswith(says)


def test_a_dump_that_was_changed_by_hand_is_checked_too() -> None:
    text = "cluster: c\nmodels:\n- spec:\n    alias: a\n    fake: true\n  created: soon\n"
    with pytest.raises(BadFile, match=r"^d\.yaml:6: in `models\[0\]\.created`: "):
        read_dump(text, "d.yaml")


def test_what_is_no_dump_is_said_to_be_none() -> None:
    for text in ("", "[]", GOOD):
        with pytest.raises(BadFile, match=r"^d\.yaml:1: is no dump, which begins with `cluster:`; a file of models is"):
            read_dump(text, "d.yaml")


def test_the_line_of_what_is_no_text_is_said() -> None:
    assert text_of("models: [ä]".encode(), "m.yaml") == "models: [ä]"
    with pytest.raises(BadFile, match=r"^m\.yaml:2: is no text: invalid start byte of UTF-8, 0xff"):
        text_of(b"models:\n- \xff\n", "m.yaml")
