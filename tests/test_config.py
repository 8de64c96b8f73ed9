import shutil
from pathlib import Path

import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import BadInput, BadKeys, config, yamlfile
from kdcli.config import Ensemble, Experiment, Model, Omission
from kdcli.yamlfile import Loaded, Override, parse_set


def problems(tmp_path: Path, text: str, *sets: str) -> list[str]:
    """The lines that a broken experiment file or `--set` gives, the file's name shortened to `f`."""
    path = tmp_path / "f.yaml"
    path.write_text(text)
    (tmp_path / "own.py").touch()
    with pytest.raises(BadInput) as error:
        yamlfile.load(str(path), [parse_set(s) for s in sets])
    return [line.replace(str(path), "f") for line in error.value.lines]


def edited(old: str, new: str) -> str:
    assert TINY.count(old) >= 1, old
    return TINY.replace(old, new, 1)


MISTAKES = {
    "misspelled key": (edited("batch_size", "batch_sise"), "f:6: teacher.train.batch_sise: unknown key; did you mean batch_size?"),
    "misspelled section": (edited("ensemble:", "ensembel:"), "f:7: ensembel: unknown key; did you mean ensemble?"),
    "wrong type": (edited("epochs: 6", 'epochs: "6"'), "f:6: teacher.train.epochs: must be a valid integer, not '6'"),
    "a word is no bool": (edited("lr: 3e-3", "lr: 3e-3, flip: yes"), "f:6: teacher.train.flip: must be true or false, not 'yes'"),
    "a bool is no number": (edited("epochs: 6", "epochs: true"), "f:6: teacher.train.epochs: must be a valid integer, not True"),
    "not a section": (edited("data: {name: digits, heldout: 200}", "data: digits"), "f:3: data: must be a section of keys and values, not 'digits'"),
    "duplicate key": (edited("seed" if "seed" in TINY else "threads: 1", "threads: 1\nthreads: 2"), "f:3: threads: duplicate key, first given on line 2"),
    "negative T": (edited("T: 4", "T: -3"), "f:11: distill.T: must be greater than or equal to 0.001, not -3"),
    "infinite T": (edited("T: 4", "T: .inf"), "f:11: distill.T: must be a finite number, not inf"),
    "negative lambda1": (edited("lambda1: 0.9", "lambda1: -1"), "f:11: distill.lambda1: must be greater than or equal to 0, not -1"),
    "lambda1 above 1 alone": (edited("lambda1: 0.9", "lambda1: 2"), "f:11: distill.lambda1: is 2; above 1 it needs a lambda2 too (left out, that is 1 - lambda1)"),
    "nothing to learn": (edited("lambda1: 0.9", "lambda1: 0, lambda2: 0"), "f:11: distill.lambda1: and lambda2 are both 0: the student would learn nothing"),
    "unknown optimizer": (edited("optimizer: adam", "optimizer: adm"), "f:6: teacher.train.optimizer: must be 'sgd', 'adam' or 'adamw', not 'adm'"),
    "momentum of adam": (edited("lr: 3e-3", "lr: 3e-3, momentum: 0.5"), "f:6: teacher.train.momentum: belongs to sgd, not to adam: remove it"),
    "warm-up too long": (edited("lr: 3e-3", "lr: 3e-3, warmup: 6"), "f:6: teacher.train.warmup: is 6, and must be less than train.epochs, 6"),
    "both omit and keep": (edited("omit: [3]", "{omit: [3], keep: [7]}"), "f:13: omit_classes.0: needs either omit or keep, and only one of them"),
    "a class in two spellings": (edited("omit: [3]", 'omit: [3, "3"]'), "f:13: omit_classes.0.omit: names a class twice: ['3', '3']"),
    "a class that is no name": (edited("omit: [3]", "omit: [true]"), "f:13: omit_classes.0.omit.0: must be a valid string, not True"),
    "no class": (edited("omit: [3]", "omit: []"), "f:13: omit_classes.0.omit: must not be empty"),
    "a class twice": (edited("omit: [3]", "omit: [3, 3]"), "f:13: omit_classes.0.omit: names a class twice: ['3', '3']"),
    "dropout of 1": (edited("dropout: 0.5", "dropout: 1.0"), "f:5: teacher.model.dropout: is a probability of dropping, drawn in steps of 1/256: 0, or 1/256 to 255/256, not 1.0"),
    "missing key": (edited("lr: 3e-3, ", ""), "f:6: teacher.train.lr: is missing"),
    "escaping name": (edited("name: tiny", "name: ../tiny"), "f:1: name: must begin with a letter or digit and hold only letters, digits, '.', '_' and '-', not '../tiny'"),
    "ensemble without members": (edited("ensemble: {members: 2}\n", "").replace("{T: 4", "{teacher: ensemble, T: 4"), "f:10: distill.teacher: is ensemble, but there is no ensemble section: add `ensemble: {members: 5}`"),
    "unknown row": (TINY + "expect: {studnt: 5}\n", "f:14: expect.studnt: is not a row of this experiment; did you mean student?"),
    "octal": (edited("epochs: 6", "epochs: 010"), "f:6: teacher.train.epochs: must be a valid integer, not '010'"),
    "too hot": (edited("T: 4", "T: 1e300"), "f:11: distill.T: must be less than or equal to 10000, not 1e+300"),
    "dropout that is no number": (edited("dropout: 0.5", "dropout: .nan"), "f:5: teacher.model.dropout: must be a finite number, not nan"),
    "lambda1 that is no number": (edited("lambda1: 0.9", "lambda1: .nan"), "f:11: distill.lambda1: must be a finite number, not nan"),
    "more models than members": (edited("members: 2", "members: 2, models: [{hidden: [1]}, {hidden: [2]}, {hidden: [3]}]"), "f:7: ensemble.models: has 3 entries for only 2 members"),
    "no models": (edited("members: 2", "members: 2, models: []"), "f:7: ensemble.models: must not be empty"),
    "no name": (edited("name: tiny", "name:"), "f:1: name: must be a valid string, not nothing"),
    "a number for a key": (TINY + "3: 4\n", "f:14: 3: Keys should be strings, not 3"),
    "a missing section": (edited("distill: {T: 4, lambda1: 0.9}\n", ""), "f:1: distill: is missing"),
    "broken YAML": (edited("{name: digits", "{name: [digits"), "f:3: not valid YAML: expected ',' or ']', but got '}'"),
    "not a mapping": ("- 1\n", "f:1: an experiment file is a mapping (name: …, data: …, teacher: …)"),
    "empty": ("", "f: is empty: `kd init FOLDER` writes an experiment file"),
    "no images": (edited("name: digits, ", ""), "f:3: data: needs either name or folder or arrays or function, and only one of them"),
    "two sources of images": (edited("name: digits", "name: digits, function: own.py:load"), "f:3: data: needs either name or folder or arrays or function, and only one of them"),
    "a file that is not there": (edited("name: digits", "function: absent.py:load"), "f:3: data.function: there is no file "),
    "a file without a function": (edited("name: digits", "function: own.py"), "f:3: data.function: must be FILE.py:FUNCTION, not 'own.py'"),
    "a file of another kind": (edited("name: digits", "function: own.yaml:load"), "f:3: data.function: must be FILE.py:FUNCTION, not 'own.yaml:load'"),
    "no net": (edited("hidden: [16]", ""), "f:9: student.model: needs either hidden or name, and only one of them"),
    "two nets": (edited("hidden: [16]", "hidden: [16], name: own.py:make"), "f:9: student.model: needs either hidden or name, and only one of them"),
    "arguments of a perceptron": (edited("hidden: [16]", "hidden: [16], args: {width: 3}"), "f:9: student.model.args: belongs to name: remove it"),
    "dropout of somebody's net": (edited("hidden: [16]", "name: own.py:make, dropout: 0.5"), "f:9: student.model.dropout: belongs to hidden: remove it"),
    "T is missing": (edited("T: 4, ", ""), "f:11: distill.T: is missing: kd has a temperature"),
    "unknown loss": (edited("T: 4", "loss: dkt, T: 4"), "f:11: distill.loss: must be kd, mse, dkd, dist, ttm, wttm, nkd or FILE.py:FUNCTION, not 'dkt'; did you mean dkd?"),
    "a loss that is no name": (edited("T: 4", "loss: [kd], T: 4"), "f:11: distill.loss: must be a valid string, not ['kd']"),
    "a loss of a file that is not there": (edited("T: 4", "loss: absent.py:mine, T: 4"), "f:11: distill.loss: there is no file "),
    **{f"T of {loss}": (edited("T: 4", f"loss: {loss}, T: 4"), f"f:11: distill.T: has no role in {loss}: remove it") for loss in ("mse", "ttm", "wttm")},
    **{f"no T of {loss}": (edited("T: 4", f"loss: {loss}"), f"f:11: distill.T: is missing: {loss} has a temperature") for loss in ("dkd", "dist", "nkd")},
    **{f"{key} of {loss}": (edited("T: 4", f"loss: {loss}, {key}: 1{T}"), f"f:11: distill.{key}: is not a parameter of {loss}: remove it")
       for loss, key, T in (("kd", "alpha", ", T: 4"), ("mse", "gamma", ""), ("dkd", "gamma", ", T: 4"), ("dist", "alpha", ", T: 4"), ("ttm", "beta", ""), ("wttm", "alpha", ""), ("nkd", "beta", ", T: 4"))},
    **{f"standardised {loss}": (edited("T: 4", f"loss: {loss}, standardize: true{T}"), f"f:11: distill.standardize: belongs to kd and dkd, not to {loss}: remove it")
       for loss, T in (("mse", ""), ("dist", ", T: 4"), ("ttm", ""), ("wttm", ""), ("nkd", ", T: 4"))},
    "dkd without T^2": (edited("T: 4", "loss: dkd, T: 4, t_squared: false"), "f:11: distill.t_squared: belongs to kd, not to dkd: remove it"),
    "negative beta": (edited("T: 4", "loss: dkd, T: 4, beta: -1"), "f:11: distill.beta: must be greater than or equal to 0, not -1"),
    "a soft term that never warms up": (edited("T: 4", "warmup: 6, T: 4"), "f:11: distill.warmup: must be less than student.train.epochs, 6"),
    **{f"{loss} without labels": (edited("T: 4", f"loss: {loss}, T: 4").replace("heldout: 200", "heldout: 200, unlabelled: more"), f"f:11: distill.loss: {loss} needs the label of every image, and data.unlabelled has none: use another") for loss in ("dkd", "nkd")},
    **{f"{loss} of blended images": (edited("T: 4", f"loss: {loss}, T: 4").replace("lr: 1e-2", "lr: 1e-2, mixup: 0.2"), f"f:11: distill.loss: {loss} needs one label per image, and student.train.mixup blends two: use another") for loss in ("dkd", "nkd")},
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
        parse_set(text)


def tiny(tmp_path: Path, *sets: str, text: str = TINY) -> Experiment:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return yamlfile.load(str(path), [parse_set(s) for s in sets]).experiment


def test_the_parameters_of_a_loss_are_its_authors_unless_given(tmp_path: Path) -> None:
    """Those of design.md's table; and given as they would be left out they are the same loss, so the same run."""
    assert tiny(tmp_path).distill.parameters == {"T": 4}
    for loss, wanted in {
        "{loss: dkd, T: 4, lambda1: 1}": {"T": 4, "alpha": 1, "beta": 8},
        "{loss: dist, T: 4, lambda1: 1}": {"T": 4, "beta": 1, "gamma": 1},
        "{loss: nkd, T: 1, lambda1: 1, gamma:}": {"T": 1, "gamma": 1.5},
        "{loss: ttm, lambda1: 45, lambda2: 1}": {"gamma": 0.1},
        "{loss: mse, T:, lambda1: 1}": {},
        "{loss: dkd, T: 4, beta: 2, lambda1: 1}": {"T": 4, "alpha": 1, "beta": 2},
    }.items():
        assert tiny(tmp_path, f"distill={loss}").distill.parameters == wanted
    left_out, given = (tiny(tmp_path, "distill.loss=dkd", *more).distill for more in ((), ("distill.beta=8",)))
    assert left_out.model_dump(exclude_defaults=True) == given.model_dump(exclude_defaults=True)
    assert tiny(tmp_path, "distill.standardize=true", "distill.lambda1=9", "distill.lambda2=0.1").distill.standardize


def test_values_and_defaults(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    assert experiment.teacher.train
    assert experiment.teacher.train.lr == 0.003  # 3e-3 is a string to plain YAML 1.1
    assert experiment.seed == [0]
    assert experiment.distill.lambda2 == 0.1
    assert experiment.teacher.train.momentum is None
    assert tiny(tmp_path, "student.train={epochs: 1, lr: 1e-1}").student.train.momentum == 0.9
    assert tiny(tmp_path, "omit_classes=[{omit: [no, on]}]").omit_classes[0].named == ["no", "on"]  # as in YAML 1.2
    assert tiny(tmp_path, "student.train.flip=True").student.train.flip is True


def test_a_flag_beats_set_which_beats_the_file(tmp_path: Path) -> None:
    assert tiny(tmp_path, "distill.T=5").distill.T == 5
    assert tiny(tmp_path, "distill.T=5", "distill.T=6").distill.T == 6
    flags = [parse_set("distill.T=5"), Override("distill.T", 7.0, "--T 7")]
    assert yamlfile.load(str(tmp_path / "tiny.yaml"), flags).experiment.distill.T == 7
    models = tiny(tmp_path, "ensemble.models=[{hidden: [5]}]").ensemble
    assert models == Ensemble(members=2, models=[Model(hidden=[5])])


def test_a_set_changes_no_section_that_shares_an_anchor(tmp_path: Path) -> None:
    shared = edited("train: {epochs: 6, batch_size: 50, optimizer: adam, lr: 3e-3", "train: &same {epochs: 6, lr: 3e-3")
    shared = shared.replace("train: {epochs: 6, batch_size: 50, optimizer: adam, lr: 1e-2}", "train: *same")
    experiment = tiny(tmp_path, "teacher.train.epochs=5", text=shared)
    assert experiment.teacher.train
    assert (experiment.teacher.train.epochs, experiment.student.train.epochs) == (5, 6)


def test_a_load_leaves_its_overrides_as_they_are(tmp_path: Path) -> None:
    assert tiny(tmp_path).student.train.lr == 0.01
    whole, key = parse_set("student.train={epochs: 1, lr: 0.1}"), parse_set("student.train.lr=0.5")
    assert yamlfile.load(str(tmp_path / "tiny.yaml"), [whole, key]).experiment.student.train.lr == 0.5
    assert yamlfile.load(str(tmp_path / "tiny.yaml"), [whole]).experiment.student.train.lr == 0.1


def test_a_stated_lambda2_never_moves(tmp_path: Path) -> None:
    assert tiny(tmp_path, "distill.lambda1=0.4").distill.lambda2 == 0.6
    stated = TINY.replace("lambda1: 0.9", "lambda1: 0.9, lambda2: 0.3")
    assert tiny(tmp_path, "distill.lambda1=0.4", text=stated).distill.lambda2 == 0.3
    assert tiny(tmp_path, "distill.lambda1=7", text=stated).distill.lambda1 == 7


@given(st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_left_out_lambda2_is_the_rest(lambda1: float) -> None:
    left_out = config.Distill.model_validate({"T": 1.0, "lambda1": lambda1})
    assert left_out.lambda2 == pytest.approx(1 - lambda1, abs=1e-11)


def test_code_lies_beside_the_experiment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "f.yaml").write_text(TINY)
    sets = [parse_set("data={function: own.py:load}"), parse_set("student.model={name: own.py:make, args: {width: 3}}")]
    experiment = yamlfile.load("../f.yaml", sets).experiment
    assert experiment.student.model.name
    made = Path(experiment.student.model.name.rpartition(":")[0])
    assert made.is_absolute()
    assert made.samefile(tmp_path / "own.py")
    assert experiment.data.function == str(made) + ":load"
    assert experiment.student.model.args == {"width": 3}


@pytest.mark.parametrize(
    ("entry", "label", "omitted"),
    [
        ({"omit": [3]}, "omit 3", ["3"]),
        ({"omit": ["cat", 10, 9]}, "omit 9,10,cat", ["9", "10", "cat"]),
        ({"keep": ["dog", "cat"]}, "keep cat,dog", ["3", "9", "10"]),
    ],
)
def test_an_omission_is_called_by_its_classes_in_their_order(
    entry: dict[str, list[str]], label: str, omitted: list[str]
) -> None:
    found = Omission.model_validate(entry)
    assert found.label == label
    assert found.omitted(["3", "9", "10", "cat", "dog"]) == omitted


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0,2,5", [0, 2, 5]), ("7-8,1", [7, 8, 1])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert yamlfile.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "x", "-3", "4-0", "0-4-5", "1,", "0-99999999999", "1_0", "0-9999999999999999999999"]
)
def test_malformed_seeds_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--seeds"):
        yamlfile.parse_seeds(text)


# Problems found later.


def test_a_problem_found_later_is_told_with_the_line_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(TINY)
    loaded = yamlfile.load(str(tmp_path / "f.yaml"), [parse_set("student.model.hidden=[3]")])
    problems = [("teacher.train.jitter", "is too far"), ("omit_classes.0.omit", "no such class")]
    problems += [("student.model.hidden", "is small"), ("baseline.train.jitter", "is absent"), ("x.y", "is nowhere")]
    with pytest.raises(BadInput) as error, loaded.located():
        raise BadKeys(*problems, problems[0])
    assert [line.replace(str(tmp_path / "f.yaml"), "f") for line in error.value.lines] == [
        "f:6: teacher.train.jitter: is too far",
        "f:13: omit_classes.0.omit: no such class",
        "--set student.model.hidden=[3]: student.model.hidden: is small",
        "f:1: baseline.train.jitter: is absent",
        "f:1: x.y: is nowhere",
    ]
    with pytest.raises(BadInput, match=r"^as it is$"), loaded.located():
        raise BadInput("as it is")


# Grids.

WITHOUT = TINY.replace("omit_classes:\n  - omit: [3]\n", "# none\n# at all\n")


def grid(folder: Path, text: str, *sets: str) -> list[Loaded]:
    path = folder / "f.yaml"
    path.write_text(f"{WITHOUT}{text}\n")
    return yamlfile.points(str(path), [parse_set(s) for s in sets])


def test_a_grid_has_a_point_for_each_combination(tmp_path: Path) -> None:
    points = grid(tmp_path, "grid: {distill.T: [1, 2.5], student.model.hidden: [[8], [24, 8]]}")
    assert [point.at for point in points] == [
        {"distill.T": "1", "student.model.hidden": "[8]"},
        {"distill.T": "1", "student.model.hidden": "[24, 8]"},
        {"distill.T": "2.5", "student.model.hidden": "[8]"},
        {"distill.T": "2.5", "student.model.hidden": "[24, 8]"},
    ]
    found = [(point.experiment.distill.T, point.experiment.student.model.hidden) for point in points]
    assert found == [(1, [8]), (1, [24, 8]), (2.5, [8]), (2.5, [24, 8])]


def test_an_experiment_without_a_grid_is_one_point(tmp_path: Path) -> None:
    (point,) = grid(tmp_path, "")
    assert point.at == {}
    assert point.experiment == yamlfile.load(str(tmp_path / "f.yaml")).experiment


def test_a_key_set_by_hand_does_not_vary(tmp_path: Path) -> None:
    text = "grid: {distill.T: [1, 8], student.model.hidden: [[8], [24]]}"
    points = grid(tmp_path, text, "distill.T=3")
    assert [point.at for point in points] == [{"student.model.hidden": "[8]"}, {"student.model.hidden": "[24]"}]
    assert {point.experiment.distill.T for point in points} == {3}
    assert [point.at for point in grid(tmp_path, text, "distill={T: 3, lambda1: 0.5}")] == [p.at for p in points]
    (point,) = grid(tmp_path, text, "distill.T=3", "student.model={hidden: [5]}")
    assert (point.at, point.experiment.student.model.hidden) == ({}, [5])


def test_sections_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    losses = "{T: 4, lambda1: 0.9, views: 8}, {loss: mse, lambda1: 2e1, lambda2: 1, views: 8}"
    points = grid(tmp_path, f"grid: {{distill: [{losses}]}}", "student.train={epochs: 2, lr: 0.1, flip: true}")
    assert [p.at for p in points] == [{"distill": "T=4 lambda1=0.9"}, {"distill": "loss=mse lambda1=20 lambda2=1"}]


def test_a_set_inside_a_section_that_varies_beats_the_grid(tmp_path: Path) -> None:
    text = "grid: {student.train: [{epochs: 3, lr: 0.1}, {epochs: 4, lr: 0.2}], distill.T: [1, 8]}"
    points = grid(tmp_path, text, "student.train.epochs=9")
    found = [(p.experiment.student.train.epochs, p.experiment.student.train.lr, p.experiment.distill.T) for p in points]
    assert found == [(9, 0.1, 1), (9, 0.1, 8), (9, 0.2, 1), (9, 0.2, 8)]
    only_epochs = text.replace("0.2", "0.1")
    assert len(grid(tmp_path, only_epochs)) == 4
    with pytest.raises(BadInput) as error:
        grid(tmp_path, only_epochs, "student.train.epochs=9")
    assert "is given twice" in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("grid: {distill.Temp: [3]}", "distill.Temp: unknown key"),
        ("grid: {distill.T: [3, -1]}", "f:14: grid: distill.T=-1: distill.T: must be greater than or equal to 0.001"),
        ("grid: {distill.T: [1, 1.0]}", "f:14: grid: distill.T=1.0: is given twice"),
        ("grid: {distill.T: []}", "f:14: grid.distill.T: must not be empty"),
        ("grid: {data.heldout: [30]}", "f:14: grid.data.heldout: cannot vary within one experiment"),
        ("grid: {data.function: [a.py:load]}", "f:14: grid.data.function: cannot vary within one experiment"),
        ("grid: {seed: [3]}", "f:14: grid.seed: cannot vary within one experiment"),
        ("grid: {data: [{name: digits}]}", "f:14: grid.data: cannot vary within one experiment"),
        ("paper: {studnt: 3}", "f:14: paper.studnt: is not a row of this experiment; did you mean student?"),
        ("paper: {student: -3}", "f:14: paper.student.0: must be greater than or equal to 0, not -3"),
        ("paper: {student: [1, 2, 3]}", "f:14: paper.student: must have at most 2 entries, not 3"),
        ("grid: {distill: [{T: 1}], distill.T: [3]}", "f:14: grid.distill.T: lies within distill, which varies too"),
        ("grid: {distill.T: [3]}\nomit_classes: [{omit: [3]}]", "omit_classes: has no place in the table of a grid"),
    ],
)
def test_a_wrong_grid_is_told(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        grid(tmp_path, text)
    assert line in str(error.value).replace(str(tmp_path / "f.yaml"), "f")


# Experiments that ship with kd, and what is none.


def test_shipped_experiments_are_valid_short_and_say_what_to_expect(tmp_path: Path) -> None:
    assert set(yamlfile.experiments()) >= {"mnist", "mnist-quick", "digits", "search"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "resnet56.th").touch()  # which losses.yaml names and nobody ships
    (tmp_path / "experiments").mkdir()
    shutil.copy(yamlfile.experiments()["mnist-cnn"].with_name("cnn.py"), tmp_path / "experiments")
    for name, path in yamlfile.experiments().items():
        lines = path.read_text().splitlines()
        assert yamlfile.points(str(shutil.copy(path, tmp_path / "experiments")))
        assert sum(not line.startswith("    - {") for line in lines) <= 42  # but for the points of a grid
        header = " ".join(line for line in lines if line.startswith("#"))
        assert f"kd run {name}" in header
        assert "Time:" in header
        assert "Result:" in header


def test_an_unknown_experiment_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"mnst: neither an experiment's name nor a .yaml file; did you mean mnist\?"):
        yamlfile.load("mnst")
    with pytest.raises(
        BadInput, match=r"quux: .* \(known: digits, function-matching, losses, mnist-cnn, mnist-quick, mnist, "
    ):
        yamlfile.load("quux")
    with pytest.raises(BadInput, match="there is no such experiment file"):
        yamlfile.load(str(tmp_path / "absent.yaml"))
    with pytest.raises(BadInput, match=r"^/proc/self/mem: cannot be read: Input/output error$"):
        yamlfile.load("/proc/self/mem")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = (
    "name seed threads data data.function teacher.train student.model student.model.hidden student.model.args distill"
)
KEYS += " distill.T distill.loss distill.beta distill.warmup omit_classes omit_classes.0 omit_classes.0.omit expect paper grid ensemble.models baseline"


@given(VALUES, st.sampled_from(KEYS.split()))
@settings(max_examples=200, deadline=None)
def test_any_value_anywhere_is_valid_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, value: object, key: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(TINY)
    lines: tuple[str, ...] = ()
    try:
        yamlfile.points(str(path), [Override(key, value, "--set x")])
    except BadInput as error:
        lines = error.lines
    within = ("data.function", "student.model.hidden", "omit_classes.0.omit")  # a key beside it may be the wrong one
    start = ("--set x: ", f"{path}:") if key in within or key == "grid" else "--set x: "
    assert all(line.startswith(start) for line in lines)


def test_a_section_of_a_grid_that_has_nothing_of_its_own_is_told_apart_by_all_that_it_has() -> None:
    plain, more = {"T": 4, "lambda1": 0.9}, {"T": 4, "lambda1": 0.9, "standardize": True}
    assert yamlfile._labels([plain, more]) == ["T=4 lambda1=0.9", "T=4 lambda1=0.9 standardize=True"]
    assert yamlfile._labels([plain, {**more, "T": 8}]) == ["T=4", "T=8 standardize=True"]
