"""The benchmark of released sizes on small nets: they agree, and it notices."""

import pytest

pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
pytest.importorskip("diffusers", reason="pip install -e '.[test,parity]'")

from benchmarks import released_sizes  # noqa: E402

_SMALL = {
    "vae": dict(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ),
    "text": dict(
        vocab_size=49408,
        eos_token_id=2,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
    ),
    "unet": dict(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
    ),
}


def _rows(parameterization):
    model = _SMALL | {"parameterization": parameterization}
    return released_sizes.measure(model, 8)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_small_nets_agree(parameterization):
    rows = _rows(parameterization)
    assert [row.parameters is None for row in rows] == [False, False, True, False, True]
    for row in rows:
        assert row.greatest < row.wanted, row
    for row in rows[:-1]:
        assert row.std == pytest.approx(1, abs=0.2), row


def test_another_prediction_is_noticed(monkeypatch):
    monkeypatch.setitem(released_sizes.PREDICTIONS, "v", "epsilon")
    *nets, trajectory = _rows("v")
    assert all(row.greatest < row.wanted for row in nets)
    assert trajectory.greatest > 100 * trajectory.wanted
