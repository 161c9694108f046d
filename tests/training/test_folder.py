from pathlib import Path

import pytest
from tiny_trials import tiny_config

from dtr_ray.config import TrialConfig
from dtr_ray.training.folder import check_folder, claim_folder


def test_a_folder_is_claimed_once_and_resumed_as_it_was(tmp_path: Path):
    folder, config = tmp_path / "deep" / "run", tiny_config()
    with pytest.raises(ValueError, match="no run to resume"):
        claim_folder(folder, config, resume=True)
    assert not folder.exists()
    claim_folder(folder, config, resume=False)
    assert TrialConfig.load(folder / "trial.json") == config
    with pytest.raises(ValueError, match="holds a run already: --resume goes on"):
        claim_folder(folder, config, resume=False)
    claim_folder(folder, config, resume=True)


def test_a_resumed_run_may_change_its_length_and_nothing_that_training_depends_on(tmp_path: Path):
    claim_folder(tmp_path, tiny_config(), resume=False)
    longer = tiny_config(training__num_steps=9, evaluation__every_steps=3, training__log_every_steps=1)
    claim_folder(tmp_path, longer, resume=True)
    assert TrialConfig.load(tmp_path / "trial.json") == longer
    with pytest.raises(ValueError, match=r"training.lr is 0.1, but 0.003 in the run in"):
        check_folder(tmp_path, tiny_config(training__lr=0.1), resume=True)
    with pytest.raises(ValueError, match=r"routing.alpha is None, but 4.0"):
        check_folder(tmp_path, tiny_config(routing__name="none"), resume=True)
