"""T5 and LDM's text encoder as transformers and diffusers have them, there and back."""

import jax
import numpy as np
import pytest

from ldm_jax import convert
from ldm_jax.config import UserError
from tests.nets import test_encoders as encoders

torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
transformers = pytest.importorskip("transformers")

ATOL = 5e-5


def _state(module):
    """Random weights of about the size of trained ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            scale = 0.3 if p.ndim < 2 else p.shape[-1] ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (p.ndim < 2))
    module.eval()
    return {k: v.numpy().copy() for k, v in module.state_dict().items()}


def _goes_back(net, variables, state, layout, spare=()):
    back = convert.export_network(net, variables, layout)
    assert back.keys() == state.keys() - set(spare)
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])


@pytest.mark.parametrize("gated", [True, False])
def test_t5(gated):
    reference = encoders.small_t5(gated)
    config = reference.config
    state = _state(reference)
    net, variables = convert.import_network(state, config.to_dict())
    assert (net.heads, net.dim_head, net.gated) == (4, 8, gated)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 30)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).last_hidden_state
    ours = jax.jit(net.apply)(variables, tokens)
    np.testing.assert_allclose(ours, expected.numpy(), atol=ATOL)
    _goes_back(net, variables, state, "huggingface")
    prefixed = {f"text_encoder.{key}": value for key, value in state.items()}
    assert convert.import_network(prefixed, config.to_dict())[0] == net
    with pytest.raises(UserError, match="feed_forward_proj: 'gelu' is not computed"):
        convert.import_network(state, dict(feed_forward_proj="gelu"))


def test_ldm_bert():
    pipeline = "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion"
    module = pytest.importorskip(pipeline)
    config = module.LDMBertConfig(
        vocab_size=50,
        max_position_embeddings=12,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=3,
        d_model=16,
        head_dim=8,
        dropout=0.0,
    )
    reference = module.LDMBertModel(config)
    state = _state(reference)
    net, variables = convert.import_network(state, config.to_dict())
    assert (net.heads, net.dim_head, net.dim, net.depth) == (3, 8, 16, 2)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)
    with torch.no_grad():
        expected = reference.model(torch.from_numpy(tokens).long()).last_hidden_state
    ours = jax.jit(net.apply)(variables, tokens)
    np.testing.assert_allclose(ours, expected.numpy(), atol=ATOL)
    spare = ("to_logits.weight", "to_logits.bias")
    _goes_back(net, variables, state, "diffusers", spare)
    # The same net in CompVis' layout, and back.
    compvis = convert.export_network(net, variables, "compvis")
    again, same = convert.import_network(compvis, dict(heads=3))
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    with pytest.raises(UserError, match="activation_function: 'relu' is not computed"):
        convert.import_network(state, dict(activation_function="relu"))
