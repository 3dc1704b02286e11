"""The prior's keys in diffusers' layout."""

from ldm_jax.convert import plans
from ldm_jax.nets import prior

_NAMES = {
    "positions_embed": "positional_embedding",
    "query": "prd_embedding",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_1": "time_embedding.linear_2",
    "text_tokens": "encoder_hidden_states_proj",
    "text_vector": "embedding_proj",
    "conv_out": "proj_to_clip_embeddings",
    "attn": "attn1",
    "to_out": "to_out.0",
    "norm2": "norm3",
    "ff_in": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}


def prior_plan(net: prior.PriorTransformer) -> plans.Plan:
    """The plan of a prior; the embeddings' mean and std belong to the first stage."""
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    blocks = {f"block_{i}": f"transformer_blocks.{i}" for i in range(net.depth)}
    rules = list(plans.plain_rules(shapes, _NAMES | blocks))
    return plans.Plan(rules, shapes, beside="clip_mean|clip_std")
