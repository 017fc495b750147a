import contextlib
import json
import pathlib
import re
import shlex
import sys

import pytest

from nfzoo import cli, recipes


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_json_round_trip_is_the_identity(name):
    recipe = recipes.get(name)
    assert recipes.Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_poster_is_the_posters():
    """Facts of its Table 1: Adam with eps 1e-8, batch 512, 20 epochs, 40k/10k, crop and flip on validation too."""
    poster = recipes.get("poster")
    assert (poster.optimizer.name, poster.optimizer.learning_rate, poster.optimizer.epsilon) == ("adam", 1e-3, 1e-8)
    assert (poster.batch_size, poster.epochs, poster.data.validation_fraction) == (512, 20, 0.2)
    assert poster.augment == recipes.Augment(crop_padding=4, flip=True, on_validation=True)
    assert poster.seeds == (868, 67, 472, 362, 970) and poster.agc is None
    assert poster.build["bn_*"] == {"epsilon": 1e-5, "momentum": 0.9, "init": "poster"}


def test_overrides_are_typed():
    recipe = recipes.override(
        recipes.get("demo"), {"optimizer.learning_rate": "3e-4", "agc": "none", "augment.flip": "true", "epochs": 2}
    )
    assert (recipe.optimizer.learning_rate, recipe.agc, recipe.augment.flip, recipe.epochs) == (3e-4, None, True, 2)
    assert recipes.override(recipe, {"agc": "0.02"}).agc == recipes.Clip(clip_factor=0.02)
    assert recipes.override(recipe, {"agc.clip_factor": 0.3}).agc == recipes.Clip(clip_factor=0.3)
    both = {"agc.eps": 0.01, "agc": "suggest", "ema": ".99", "ema.warmup": "false", "batch_size": 128}
    assert recipes.override(recipe, both).agc == recipes.Clip(clip_factor=0.08, eps=0.01)  # in whatever order
    assert recipes.override(recipe, both).ema == recipes.Ema(momentum=0.99, warmup=False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimiser.learning_rate": 1}, "Did you mean 'optimizer'"),
        ({"optimizer.lerning_rate": 1}, "Did you mean 'learning_rate'"),
        ({"epochs": "many"}, "epochs.*'many'"),
        ({"batch_size": 0}, "batch_size.*greater than 0"),
        ({"optimizer.name": "adagrad"}, "adam.*adagrad"),
        ({"agc.clip": 1}, "agc.clip"),
        ({"agc": "sugest"}, "agc.*'sugest'"),
        ({"agc": True}, "agc.*True"),
        ({"ema.momentun": 0.9}, "ema.momentun"),
        ({"ema": 1}, "ema.momentum.*less than 1"),
        ({"augment.rand_augment.layer": 2}, "rand_augment.layer"),
        ({"augment.random_erasing": 1.5}, "augment.random_erasing.*less than or equal to 1"),
        ({"schedule.name": "cosin"}, "schedule.name.*cosine.*'cosin'"),
        ({"schedule.warmup_epochs": 8}, "warmup_epochs below the 8 epochs"),
        ({"schedule.warmup_epochs": 6, "frozen_epochs": 2}, "warmup_epochs below the 6 epochs"),
        ({"schedule.milestones": [3, 2]}, "milestones.*ascending"),
        ({"schedule.milestones": [0, 2]}, "milestones.*above 0"),
        ({"optimizer.groups": [{"pattern": "("}]}, "groups.0.pattern.*regular expression"),
        ({"optimizer.name": "sgd", "optimizer.weight_decay": 0.1}, "weight_decay.*momentum_sgd has it"),
        ({"optimizer.name": "sgd", "optimizer.groups": [{"pattern": "bias"}]}, "groups.*momentum_sgd has it"),
        ({"optimizer.learning_rate": "nan"}, "learning_rate"),
        ({"optimizer.learning_rate": "Infinity"}, "learning_rate.*finite"),
        ({"frozen_epochs": 9}, "frozen_epochs.*at most epochs=8.*Received: 9"),
        ({"epochs": 2, "frozen_epochs": 3}, "frozen_epochs.*at most epochs=2"),
        ({"frozen_epochs": -1}, "frozen_epochs.*greater"),
        ({"frozen_learning_rate": 0}, "frozen_learning_rate.*greater"),
    ],
)
def test_bad_overrides(changes, match):
    with pytest.raises(ValueError, match=match):
        recipes.override(recipes.get("demo"), changes)


def test_unknown_recipe():
    with pytest.raises(ValueError, match="demo.*'nfnett'"):
        recipes.get("nfnett")


def test_fingerprint_names_what_matters():
    demo = recipes.get("demo")
    name = recipes.fingerprint(demo)
    for same in ({"seed": 5}, {"seeds": [1, 2]}, {"data.data_dir": "/somewhere"}):
        assert recipes.fingerprint(recipes.override(demo, same)) == name
    for other in (
        {"epochs": 7}, {"optimizer.learning_rate": 0.01}, {"agc": None}, {"data.name": "fake"}, {"frozen_epochs": 8},
    ):  # fmt: skip
        assert recipes.fingerprint(recipes.override(demo, other)) != name


def test_fingerprints_of_published_results_stay():
    """training/results refers to recipes by these; a change of a default must not rename them silently."""
    three = recipes.override(recipes.get("poster"), {"epochs": 3})
    assert recipes.fingerprint(three) == "60c19c84eb7a"
    assert [recipes.fingerprint(recipes.get(n)) for n in ("poster", "demo")] == ["3a02d790a7d4", "0a0a24466407"]
    assert recipes.fingerprint(recipes.override(three, {"agc": 0.01})) == "3912b3419ea7"


def test_a_recipe_of_before_a_setting_existed_has_its_default():
    """options.json of an old run, read today, is the recipe it was."""
    poster = recipes.get("poster")
    old = poster.model_dump(mode="json")
    for gone in ("schedule", "ema", "label_smoothing", "deterministic"):
        del old[gone]
    old["augment"] = {key: old["augment"][key] for key in ("crop_padding", "flip", "on_validation")}
    for gone in ("per_256", "rho", "weight_decay", "groups", "accumulate"):
        del old["optimizer"][gone]
    assert recipes.Recipe.model_validate_json(json.dumps(old)) == poster


def test_agc_by_batch_size():
    """The paper's grid: smaller batches never get smaller factors, and its recommendation holds where it was made."""
    factors = [recipes.suggest(2**n) for n in range(13)]
    assert factors == sorted(factors, reverse=True) and set(factors) == {0.01, 0.02, 0.04, 0.08, 0.16}
    assert {recipes.suggest(n) for n in (1024, 2048, 4096)} == {0.01}
    with pytest.raises(ValueError, match="above 0.*0"):
        recipes.suggest(0)
    demo = recipes.get("demo")
    changed = recipes.override(demo, {"agc": "suggest", "batch_size": 256, "optimizer.accumulate": 2})
    assert changed.agc == recipes.Clip(
        clip_factor=0.02
    )  # of 512 examples per update, whatever the order of the changes
    assert recipes.get("small_batch").agc.clip_factor == recipes.suggest(recipes.get("small_batch").batch_size)


def test_learning_rate_per_256_examples():
    nfnet = recipes.get("nfnet")
    assert nfnet.peak_learning_rate == pytest.approx(1.6)
    smaller = recipes.override(nfnet, {"batch_size": 64, "optimizer.accumulate": 2})
    assert smaller.peak_learning_rate == pytest.approx(0.05)
    assert recipes.override(smaller, {"optimizer.per_256": False}).peak_learning_rate == 0.1


def test_what_makes_labels_one_hot():
    demo = recipes.get("demo")
    assert not demo.one_hot
    for path in ("augment.mixup", "augment.cutmix", "label_smoothing"):
        assert recipes.override(demo, {path: 0.1}).one_hot


def test_optional_parts_are_made_by_their_paths():
    demo = recipes.override(recipes.get("demo"), {"augment.rand_augment.magnitude": 5, "ema": 0.99})
    assert demo.augment.rand_augment == recipes.RandAugment(magnitude=5)
    assert demo.ema == recipes.Ema(momentum=0.99)
    assert recipes.override(demo, {"ema.warmup": False}).ema == recipes.Ema(momentum=0.99, warmup=False)


def test_no_decay_spares_vectors_and_scalars_and_nothing_else():
    import nfzoo
    from nfzoo.agc import unit_axes

    for name in ("fixup_test_resnet", "rescale_test_resnet", "nf_test_nfnet", "bn_test_efficientnet", "gn_test_resnet"):
        model = nfzoo.build(name)
        spared = {v.path for v in model.trainable_variables if len(v.shape) <= 1}
        matched = unit_axes(model, (recipes.NO_DECAY.pattern,))
        assert {path for path, axes in matched.items() if axes is None} == spared


def test_rows_are_those_of_their_papers():
    nfnet, regnet, eunnet = (recipes.get(name) for name in ("nfnet", "nf_regnet", "eunnet_cifar"))
    assert (nfnet.batch_size, nfnet.epochs, nfnet.optimizer.weight_decay, nfnet.agc.clip_factor) == (
        4096,
        360,
        2e-5,
        0.01,
    )
    assert (nfnet.augment.mixup, nfnet.augment.cutmix, nfnet.label_smoothing) == (0.2, 1.0, 0.1)
    assert (regnet.optimizer.learning_rate, regnet.schedule.final, regnet.agc) == (0.4, 1e-3, None)
    assert (eunnet.epochs, eunnet.schedule.milestones, eunnet.optimizer.groups) == (200, (100, 150), ())
    same = recipes.get("fixup_cifar").optimizer.model_copy(update={"groups": ()})
    assert same == eunnet.optimizer == recipes.get("rescale").optimizer.model_copy(update={"groups": ()})
    assert recipes.get("skipinit").model_copy(update={"schedule": eunnet.schedule}) == eunnet


DOCUMENT = (pathlib.Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def test_the_table_of_the_documentation_is_that_of_the_rows():
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in DOCUMENT.splitlines() if "|" in line]
    heads, _, *rows = lines[: len(recipes.RECIPES) + 2]
    assert heads == ["recipe", "source", *recipes.describe(recipes.get("demo")), "what differs"]
    for (name, recipe), cells in zip(recipes.RECIPES.items(), rows, strict=True):
        assert cells[0] == f"`{name}`" and cells[2:-1] == list(recipes.describe(recipe).values())
        assert cells[1] and cells[-1]
    bounds, factors = lines[-3][1:], lines[-1][1:]
    for bound, factor, smaller in zip(bounds, factors, factors[1:], strict=False):
        assert (recipes.suggest(int(bound)), recipes.suggest(int(bound) + 1)) == (float(factor), float(smaller))


@pytest.mark.parametrize("command", re.findall("^nfzoo .*", DOCUMENT, re.M))
def test_commands_of_the_documentation_run(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with contextlib.suppress(SystemExit):
        cli.main()
    shown = capsys.readouterr()
    assert recipes.Recipe.model_validate_json(shown.out) != recipes.get(command.split()[2]), shown.err


def test_a_description_says_what_matters():
    said = recipes.describe(recipes.get("nfnet"))
    assert said["optimizer"] == "momentum_sgd 0.1 per 256, decay 2e-05, decay ×0 for gain/bias/gamma/beta"
    assert said["augmentation"] == "crop 24, flip, mixup 0.2, cutmix 1, RandAugment 4 of 5, smoothing 0.1"
    assert (said["schedule"], said["AGC"], said["average"]) == ("cosine to 0, warm-up 5", "0.01", "0.99999")


def test_the_command_lists_all_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nfzoo", "recipes"])
    monkeypatch.setattr(cli.console, "_width", 200)
    with contextlib.suppress(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipes.RECIPES)
    monkeypatch.setattr(sys, "argv", ["nfzoo", "recipes", "--set", "epochs=3"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Expected the name of the recipe" in capsys.readouterr().err


def test_a_name_may_look_like_a_number():
    changed = recipes.override(recipes.get("demo"), {"data.name": "2024", "data.data_dir": "1e3"}).data
    assert (changed.name, changed.data_dir) == ("2024", "1e3")
    assert recipes.override(recipes.get("demo"), {"data.data_dir": "none"}).data.data_dir is None


def test_the_classifier_alone_keeps_the_groups_that_it_is_in():
    from nfzoo.engine import learning

    alone = learning._of_the_head(recipes.override(recipes.get("finetune"), {"optimizer.groups": [
        {"pattern": "gain|bias", "weight_decay": 0.0}, {"pattern": "stem.*", "learning_rate": 0.1}
    ]}))  # fmt: skip
    assert [group.pattern for group in alone.optimizer.groups] == ["gain|bias"]
