import pytest

from nfzoo import recipes


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


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"optimiser.learning_rate": 1}, "Did you mean 'optimizer'"),
        ({"optimizer.lerning_rate": 1}, "Did you mean 'learning_rate'"),
        ({"epochs": "many"}, "epochs.*'many'"),
        ({"batch_size": 0}, "batch_size.*greater than 0"),
        ({"optimizer.name": "adagrad"}, "adam.*adagrad"),
        ({"agc.clip": 1}, "agc.clip"),
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
    with pytest.raises(ValueError, match="demo.*'nfnet'"):
        recipes.get("nfnet")


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
    assert recipes.fingerprint(recipes.override(three, {"agc": 0.01})) == "3912b3419ea7"
