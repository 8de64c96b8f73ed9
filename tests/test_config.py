from pathlib import Path

import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import BadInput, config


def problems(tmp_path: Path, text: str, *sets: str) -> list[str]:
    """The lines that a broken experiment file or `--set` gives, the file's name shortened to `f`."""
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        config.load(str(path), [config.parse_set(s) for s in sets])
    return [line.replace(str(path), "f") for line in error.value.lines]


def edited(old: str, new: str) -> str:
    assert TINY.count(old) >= 1, old
    return TINY.replace(old, new, 1)


MISTAKES = {
    "misspelled key": (edited("  train: {epochs: 6", "  train: {epoch: 6"), "f:6: teacher.train.epoch: unknown key; did you mean epochs?"),
    "misspelled section": (edited("distill:", "destill:"), "f:11: destill: unknown key; did you mean distill?"),
    "wrong type": (edited("epochs: 6", 'epochs: "6"'), "f:6: teacher.train.epochs: must be a whole number, not '6'"),
    "a bool is no number": (edited("epochs: 6", "epochs: true"), "f:6: teacher.train.epochs: must be a whole number, not True"),
    "not a section": (edited("data: {name: digits, heldout: 200}", "data: digits"), "f:3: data: must be a section of keys and values, not 'digits'"),
    "duplicate key": (edited("seed" if "seed" in TINY else "threads: 1", "threads: 1\nthreads: 2"), "f:3: threads: duplicate key, first given on line 2"),
    "negative T": (edited("T: 4", "T: -3"), "f:11: distill.T: must be greater than or equal to 0.001, not -3"),
    "infinite T": (edited("T: 4", "T: .inf"), "f:11: distill.T: must be a finite number, not inf"),
    "negative lambda1": (edited("lambda1: 0.9", "lambda1: -1"), "f:11: distill.lambda1: must be greater than or equal to 0, not -1"),
    "lambda1 above 1 alone": (edited("lambda1: 0.9", "lambda1: 2"), "f:11: distill.lambda1: is 2; above 1 it needs a lambda2 too (left out, that is 1 - lambda1)"),
    "nothing to learn": (edited("lambda1: 0.9", "lambda1: 0, lambda2: 0"), "f:11: distill.lambda1: and lambda2 are both 0: the student would learn nothing"),
    "unknown optimizer": (edited("optimizer: adam", "optimizer: adm"), "f:6: teacher.train.optimizer: must be one of sgd, adam, adamw, not 'adm'; did you mean adam?"),
    "momentum of adam": (edited("lr: 3e-3", "lr: 3e-3, momentum: 0.5"), "f:6: teacher.train.momentum: belongs to sgd, not to adam: remove it"),
    "warm-up too long": (edited("lr: 3e-3", "lr: 3e-3, warmup: 6"), "f:6: teacher.train.warmup: must be shorter than the 6 epochs, not 6"),
    "unknown class": (edited("omit: [3]", "omit: [11]"), "f:13: omit_classes.0.omit: there is no class 11: the classes are 0 to 9"),
    "all classes": (edited("omit: [3]", "omit: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"), "f:13: omit_classes.0.omit: must name at least one class and leave one out, not [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"),
    "both omit and keep": (edited("omit: [3]", "{omit: [3], keep: [7]}"), "f:13: omit_classes.0: needs either omit or keep, and only one of them"),
    "a class twice": (edited("omit: [3]", "omit: [3, 3]"), "f:13: omit_classes.0.omit: names a class twice: [3, 3]"),
    "an entry twice": (edited("- omit: [3]", "- omit: [3]\n  - omit: [3]"), "f:12: omit_classes: names the same classes twice"),
    "dropout of 1": (edited("dropout: 0.5", "dropout: 1.0"), "f:5: teacher.model.dropout: is a probability of dropping, drawn in steps of 1/256: 0, or 1/256 to 255/256, not 1.0"),
    "missing key": (edited("lr: 3e-3, ", ""), "f:6: teacher.train.lr: is missing"),
    "escaping name": (edited("name: tiny", "name: ../tiny"), "f:1: name: must begin with a letter or digit and hold only letters, digits, '.', '_' and '-', not '../tiny'"),
    "ensemble without members": (edited("ensemble: {members: 2}\n", "").replace("{T: 4", "{teacher: ensemble, T: 4"), "f:10: distill.teacher: is ensemble, but there is no ensemble section: add `ensemble: {members: 5}`"),
    "unknown row": (TINY + "expect: {studnt: 5}\n", "f:14: expect.studnt: is not a row of this experiment; did you mean student?"),
    "too many held out": (edited("heldout: 200", "heldout: 1297"), "f:3: data.heldout: must be at most 432, a third of the training images, not 1297"),
    "octal": (edited("epochs: 6", "epochs: 010"), "f:6: teacher.train.epochs: must be a whole number, not '010'"),
    "too hot": (edited("T: 4", "T: 1e300"), "f:11: distill.T: must be less than or equal to 10000, not 1e+300"),
    "dropout that is no number": (edited("dropout: 0.5", "dropout: .nan"), "f:5: teacher.model.dropout: must be a finite number, not nan"),
    "lambda1 that is no number": (edited("lambda1: 0.9", "lambda1: .nan"), "f:11: distill.lambda1: must be a finite number, not nan"),
    "more models than members": (edited("members: 2", "members: 2, models: [{hidden: [1]}, {hidden: [2]}, {hidden: [3]}]"), "f:7: ensemble.models: has 3 entries for only 2 members"),
    "no models": (edited("members: 2", "members: 2, models: []"), "f:7: ensemble.models: must not be empty"),
    "the same classes in two ways": (edited("- omit: [3]", "- omit: [3]\n  - keep: [0, 1, 2, 4, 5, 6, 7, 8, 9]"), "f:12: omit_classes: names the same classes twice"),
    "jitter over the edge": (edited("jitter: 1", "jitter: 4"), "f:6: teacher.train.jitter: is too far for images of 8 x 8 pixels"),
    "no name": (edited("name: tiny", "name:"), "f:1: name: must be a word, not nothing"),
    "a number for a key": (TINY + "3: 4\n", "f:1: 3: is not a word: keys are words"),
    "a missing section": (edited("distill: {T: 4, lambda1: 0.9}\n", ""), "f:1: distill: is missing"),
    "broken YAML": (edited("{name: digits", "{name: [digits"), "f:3: not valid YAML: expected ',' or ']', but got '}'"),
    "not a mapping": ("- 1\n", "f:1: an experiment file is a mapping (name: …, data: …, teacher: …)"),
    "empty": ("", "f:1: an experiment file is a mapping (name: …, data: …, teacher: …)"),
    "code": ("!!python/object/apply:os.system [echo]\n", "f:1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    "a list that holds itself": ("a: &a [*a]\n", "f: too large or too deep for an experiment file"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_gives_one_line(mistake: str, tmp_path: Path) -> None:
    text, line = MISTAKES[mistake]
    (found,) = problems(tmp_path, text)
    assert line in found


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = edited("epochs: 6", "epochs: 0").replace("T: 4", "T: 0").replace("members: 2", "members: 1")
    assert len(problems(tmp_path, text)) == 3


def test_billion_laughs_are_refused(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    assert problems(tmp_path, text) == ["f: too large or too deep for an experiment file"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "teacher.train.epoch=5",
            "--set teacher.train.epoch=5: teacher.train.epoch: unknown key; did you mean epochs?",
        ),
        ("distill.T=-3", "--set distill.T=-3: distill.T: must be greater than or equal to 0.001, not -3"),
        ("omit_classes.7.omit=[1]", "--set omit_classes.7.omit=[1]: omit_classes.7.omit: there is no such key to set"),
        ("studnt.x=3", "--set studnt.x=3: studnt: unknown key; did you mean student?"),
        ("name.x=3", "--set name.x=3: name.x: there is no such key to set"),
    ],
)
def test_a_wrong_set_names_itself(text: str, line: str, tmp_path: Path) -> None:
    assert problems(tmp_path, TINY, text) == [line]


@pytest.mark.parametrize("text", ["", "=3", "a..b=3", "teacher", "seed=[1", "seed=2026-99-99"])
def test_a_malformed_set_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--set"):
        config.parse_set(text)


def tiny(tmp_path: Path, *sets: str, text: str = TINY) -> config.Experiment:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return config.load(str(path), [config.parse_set(s) for s in sets])


def test_values_and_defaults(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    assert experiment.teacher.train.lr == 0.003  # 3e-3 is a string to plain YAML 1.1
    assert experiment.seed == [0]
    assert experiment.distill.lambda2 == 0.1
    assert experiment.teacher.train.momentum is None
    assert tiny(tmp_path, "student.train={epochs: 1, lr: 1e-1}").student.train.momentum == 0.9


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path: Path) -> None:
    assert tiny(tmp_path, "distill.T=5").distill.T == 5
    assert tiny(tmp_path, "distill.T=5", "distill.T=6").distill.T == 6
    assert tiny(tmp_path, "ensemble.models=[{hidden: [5]}]").ensemble == config.Ensemble(
        members=2, models=[config.Model(hidden=[5])]
    )


def test_a_stated_lambda2_never_moves(tmp_path: Path) -> None:
    assert tiny(tmp_path, "distill.lambda1=0.4").distill.lambda2 == 0.6
    stated = TINY.replace("lambda1: 0.9", "lambda1: 0.9, lambda2: 0.3")
    assert tiny(tmp_path, "distill.lambda1=0.4", text=stated).distill.lambda2 == 0.3
    assert tiny(tmp_path, "distill.lambda1=7", text=stated).distill.lambda1 == 7


@given(st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_left_out_lambda2_is_the_rest(lambda1: float) -> None:
    assert config.Distill.model_validate({"T": 1.0, "lambda1": lambda1}).lambda2 == pytest.approx(
        1 - lambda1, abs=1e-11
    )


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0,2,5", [0, 2, 5]), ("7-8,1", [7, 8, 1])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert config.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "x", "-3", "4-0", "0-4-5", "1,", "0-99999999999", "1_0", "0-9999999999999999999999"]
)
def test_malformed_seeds_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--seeds"):
        config.parse_seeds(text)


def test_shipped_experiments_are_valid_short_and_say_what_to_expect() -> None:
    assert set(config.experiments()) >= {"mnist", "mnist-quick", "digits", "search"}
    for name, path in config.experiments().items():
        lines = path.read_text().splitlines()
        experiment = config.load(name)
        assert config.points(name, [], experiment.grid)
        assert len(lines) <= 42
        header = " ".join(line for line in lines if line.startswith("#"))
        assert f"kd run {name}" in header
        assert "Time:" in header
        assert "Result:" in header


def test_an_unknown_experiment_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"mnst: neither an experiment's name nor a .yaml file; did you mean mnist\?"):
        config.load("mnst")
    with pytest.raises(BadInput, match=r"quux: .* \(known: digits, mnist-quick, mnist, "):
        config.load("quux")
    with pytest.raises(BadInput, match="there is no such experiment file"):
        config.load(str(tmp_path / "absent.yaml"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(
        [
            "name",
            "seed",
            "data",
            "teacher.train",
            "student.model.hidden",
            "distill",
            "omit_classes",
            "omit_classes.0",
            "expect",
            "ensemble.models",
            "threads",
            "distill.T",
            "baseline",
        ]
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_valid_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, value: object, key: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(TINY)
    lines: tuple[str, ...] = ()
    try:
        config.load(str(path), [config.Override(key, value, "--set x")])
    except BadInput as error:
        lines = error.lines
    assert all(line.startswith("--set x: ") for line in lines)
