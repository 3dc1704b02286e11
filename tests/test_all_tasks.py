"""The benchmark of all tasks: which of them share a first stage, what its rows say."""

from benchmarks import all_tasks
from ldm_jax import config as config_lib
from tests import runs


def _shared(task):
    return all_tasks.first_stage_of(config_lib.load(all_tasks.spec(task)))


def test_tasks_on_the_same_pictures_share_their_first_stage():
    assert _shared("superres") == _shared("inpainting") == _shared("txt2img") != ""
    assert _shared("semantic") == _shared("depth2img") != _shared("superres")
    assert _shared("layout2img") != _shared("semantic")  # fewer things in a scene
    assert _shared("pixel") == ""


def test_every_config_of_a_task_is_among_them():
    others = {"autoencoder", "f_sweep"}
    found = {path.stem for path in runs.CONFIGS.glob("*.py")} - others
    assert found == set(all_tasks.TASKS)


def test_a_row_says_what_was_reached():
    report = {
        "reconstruction, held out": {"psnr": 20.0},
        "samples, held-out": {"top1": 0.5, "top5": 0.75, "psnr": 13.7},
    }
    row = all_tasks.row("superres", 7.25, "txt2img", report)
    assert row == "| superres | 7.2 | txt2img | 50.0% | 75.0% | 13.70 |"
    report = {"retrieval, held-out captions": {"top1": 0.5, "top5": 1.0}}
    row = all_tasks.row("txt2img", 28.0, "own", report)
    assert row == "| txt2img | 28.0 | own | 50.0% | 100.0% |  |"
