"""The f sweep: equal compute, rows that are kept, what it says of mistakes."""

import csv
import json

import pytest
from PIL import Image

from benchmarks import experiment, f_sweep
from ldm_jax import config as config_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError


def _row(f, **columns):
    row = dict.fromkeys(f_sweep.COLUMNS, 1.5) | {"f": f, "attribution": "by someone"}
    return row | columns


def test_the_steps_of_all_factors_cost_the_same():
    size = f_sweep.SIZES["small"]
    plans = f_sweep.make_plans((1, 4, 32), size, ())
    assert [plan.f for plan in plans] == [1, 4, 32]
    assert set(plans[0].steps) == {"diffusion"}  # pixels have no first stage
    for plan in plans:
        for stage, steps in plan.steps.items():
            assert steps * plan.flops[stage] == pytest.approx(size.flops, rel=0.02)
            config = config_lib.load(plan.spec, plan.overrides)
            assert config[f"{stage}_stage"].steps == steps
    per_image = [plan.flops["diffusion"] for plan in plans]
    assert per_image[0] > per_image[1] > per_image[2]


@pytest.mark.parametrize("size", ["medium", "large"])
def test_larger_sweeps_can_be_planned(size):
    size = f_sweep.SIZES[size]
    small, large = (
        f_sweep.make_plans((8,), s, ())[0] for s in (f_sweep.SIZES["small"], size)
    )
    for stage, steps in large.steps.items():
        assert steps * large.flops[stage] == pytest.approx(size.flops, rel=0.02)
        more = size.batch * size.width  # at least: the square of the width, mostly
        assert large.flops[stage] > more * small.flops[stage]


def test_a_budget_below_one_step_is_an_error():
    assert experiment.affordable_steps(10.0, {"diffusion": 3.0}) == {"diffusion": 3}
    with pytest.raises(UserError, match=r"diffusion_stage\.batch_size: one step"):
        experiment.affordable_steps(1.0, {"diffusion": 3.0})


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--factors=4,3"], "--factors: no '3'; choose from 1,2,4,8,16,32"),
        (["--factors=,"], "--factors: none given"),
        (["--size=smal"], "--size: 'smal'"),
        (["--sizes=small"], "--sizes=small: no such flag"),
        (["--config.diffusion_stage.steps=3"], "steps follow from equal compute"),
    ],
)
def test_mistakes_take_one_line_and_write_nothing(tmp_path, capsys, flags, error):
    with pytest.raises(SystemExit) as stopped:
        f_sweep.main([f"--out={tmp_path / 'out'}", *flags])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_finished_factor_is_kept_unless_its_run_was_another(tmp_path):
    size = f_sweep.SIZES["debug"]
    plan = f_sweep.Plan(4, ("diffusion_stage.steps=7",), {}, {})
    path = tmp_path / f_sweep.F_SWEEP.row_file

    def kept(plan, size):
        return experiment.kept_row(path, f_sweep.run_of(plan).config, size.samples)

    assert kept(plan, size) is None
    config = config_lib.load(plan.spec, plan.overrides)
    workdir_lib.write_text(
        workdir_lib.config_path(tmp_path), config_lib.to_json(config)
    )
    row = _row(4, samples=size.samples)
    workdir_lib.write_text(path, json.dumps(row))
    assert kept(plan, size) == row
    longer = plan._replace(overrides=("diffusion_stage.steps=8",))
    assert kept(longer, size) is None
    assert kept(plan, size._replace(samples=99)) is None


def test_table_and_plot_of_rows_with_gaps(tmp_path):
    nothing = dict.fromkeys(("psnr", "reconstruction_random_net_distance"))
    rows = [_row(1, **nothing), _row(4, psnr=30.25), _row(8, psnr=26.0)]
    experiment.write_csv(rows, f_sweep.COLUMNS, tmp_path / "f_sweep.csv")
    with (tmp_path / "f_sweep.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [line["f"] for line in read] == ["1", "4", "8"]
    assert [line["psnr"] for line in read] == ["", "30.25", "26"]
    assert [path.name for path in tmp_path.iterdir()] == ["f_sweep.csv"]

    lines = experiment.table(rows, f_sweep.COLUMNS).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1

    f_sweep.draw(rows, "a title", tmp_path / "f_sweep.png")
    with Image.open(tmp_path / "f_sweep.png") as image:
        assert min(image.size) > 500


@pytest.mark.slow
def test_a_sweep_runs_and_goes_on(tmp_path, capfd):
    flags = [f"--out={tmp_path}", "--size=debug", "--factors=16"]
    small = [
        "--config.data.source=synthetic",
        "--config.report.eval_images=8",
        "--config.report.retrieval_captions=4",
    ]
    f_sweep.main(flags + small)
    assert "Samples/s" in capfd.readouterr().out
    with (tmp_path / "f_sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["latent"] == "4x4x32" and float(row["psnr"]) > 3
    assert float(row["samples_per_second"]) > 0
    assert float(row["sample_random_net_distance"]) > 0
    f_sweep.main(flags + small)
    assert "f16: finished, kept as it is" in capfd.readouterr().out
