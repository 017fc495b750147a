"""What normalizer-free means: an example does not know its batch. Measured, and what the zoo says of itself."""

import json
import pathlib

import pandas as pd
import pytest

import nfzoo
from nfzoo import certify

RESULTS = pathlib.Path(__file__).parents[1] / "training" / "results" / "certify.csv"
TINY = [name for name in nfzoo.list_models(tests=True) if "_test_" in name]


@pytest.mark.parametrize("name", ["nf_test_efficientnet", "gn_test_resnet"])
def test_an_example_of_its_own(name):
    found = certify.certify(name, replicas=False)
    assert found.independent and max(found.differences.values()) < 1e-5


def test_batch_normalization_ties_examples_together_in_training_alone():
    differences = certify.certify("bn_test_resnet", replicas=False).differences
    assert differences.pop("inference") < 1e-5
    assert min(differences.values()) > 0.05


@pytest.mark.slow
def test_the_readings_of_eun():
    assert certify.certify("eun_test_resnet", replicas=False, statistics="channel_l2").independent
    for statistics in ("whole_tensor", "per_channel_batch"):  # in inference too
        differences = certify.certify("eun_test_resnet", replicas=False, statistics=statistics).differences
        assert min(differences.values()) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_what_the_zoo_says_of_itself_is_measured(name):
    found = certify.certify(name, replicas="efficientnet" in name)  # a process more: one of each variant
    assert ("replicas" in found.differences) == ("efficientnet" in name)
    assert found.independent == nfzoo.model_info(name).batch_independent


def test_the_committed_table_is_of_every_network_and_agrees_with_what_they_say():
    results = pd.read_csv(RESULTS)
    assert set(TINY) <= set(results.model)
    for row in results.itertuples():
        assert nfzoo.model_info(row.model, **json.loads(row.build)).batch_independent == row.independent


@pytest.mark.slow
def test_the_command(capsys):
    from nfzoo.cli import app

    with pytest.raises(SystemExit) as end:
        app(["certify", "bn_test_ffnn", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 3 and not told["independent"] and told["differences"]["replicas"] > 0.05


def test_a_registered_network_is_judged_without_its_dropout():
    @nfzoo.register_model(name="mine_certified", override=True)
    def mine(**options):
        return nfzoo.build("sn_test_efficientnet", dropout_rate=0.5, drop_path_rate=0.5, **options)

    found = certify.certify("mine_certified")
    assert found.independent and "replicas" not in found.differences
