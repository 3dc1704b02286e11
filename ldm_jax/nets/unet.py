"""The denoising UNet of LDM, Stable Diffusion 1 and 2, and SDXL.

Attention is placed by down-sampling factor: `attention_resolutions=(4, 2, 1)` puts it
at the levels whose features are 4, 2 and 1 times smaller than the latent.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, clip_projections, layers
from ldm_jax.nets.res_block import ResBlock

LABELS = ("continuous", "sequential", "timestep", "added", "clip")


class UNet(nn.Module):
    """Predicts the noise, x0 or v of z_t; options are those of the torch original.

    Ints in `num_res_blocks` and `transformer_depth` hold for every level. Heads come
    from `num_head_channels` where given, else from `num_heads`. `num_classes` says what
    `y` is: a class id (int), a scalar [b, 1] ("continuous"), a vector [b,
    adm_in_channels] ("sequential"), a scalar [b] for a sinusoid ("timestep"), a vector
    [b, 4·model_channels] that joins the timestep's as it is ("added"), or CLIP's
    vectors of picture and text [b, adm_in_channels] ("clip": see clip_projections.py).
    With `added_kv` attention has no transformer around it, and the context joins its
    keys and values, as in GLIDE; where a token of it is zeros there is none.
    `n_embed` makes it predict logits of codebook ids. `use_linear_in_transformer` and
    `legacy` name the layout of checkpoints; both change nothing for usual widths.
    """

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int | Sequence[int]
    attention_resolutions: Sequence[int]
    dropout: float = 0.0
    channel_mult: Sequence[int] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | str | None = None  # or one of LABELS
    adm_in_channels: int | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    added_kv: bool = False
    transformer_depth: int | Sequence[int] = 1
    transformer_depth_middle: int | None = None  # None: the last level's
    context_dim: int | Sequence[int] | None = None
    sequential_crossattn: bool = False  # context is a list, one array a block
    n_embed: int | None = None
    legacy: bool = True
    disable_self_attentions: Sequence[bool] | None = None
    num_attention_blocks: Sequence[int] | None = None
    disable_middle_self_attn: bool = False
    disable_middle_transformer: bool = False
    use_linear_in_transformer: bool = False
    remat: bool = False  # recompute blocks in the backward pass, to save memory
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array | Sequence[jax.Array] | None = None,
        y: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """z_t [b, h, w, in_channels], t [b] -> [b, h, w, out_channels] in `dtype`.

        `context` [b, s, context_dim] must be given iff `use_spatial_transformer` or
        `added_kv`, `y` iff `num_classes`; ValueError otherwise. t may be fractional.
        """
        self._check(x, context, y)
        emb = self._embed(t, y)
        mask = None
        if self.added_kv:
            mask = jnp.any(context != 0, axis=-1)
        if self.num_classes == "clip":
            clip = clip_projections.ClipProjections(
                self.context_dim, emb.shape[-1], dtype=self.dtype, name="clip"
            )
            context, vector = clip(context, y)
            mask = jnp.pad(mask, ((0, 0), (clip.tokens, 0)), constant_values=True)
            emb += vector
        context = context if mask is None else (context, mask)
        depths = self.res_blocks_of_levels()
        last = len(self.channel_mult) - 1

        def res(h, level, name, resample=None):
            return self._res(h, emb, level, name, deterministic, resample)

        h = self._conv(self.model_channels, "conv_in")(x)
        skips = [h]
        for level, depth in enumerate(depths):
            for i in range(depth):
                h = res(h, level, f"down_{level}_res_{i}")
                h = self._attn(h, context, level, f"down_{level}_attn_{i}", i)
                skips.append(h)
            if level < last:
                name = f"down_{level}_downsample"
                if self.resblock_updown:
                    h = res(h, level, name, "down")
                elif self.conv_resample:
                    h = self._conv(h.shape[-1], name, strides=self._strides())(h)
                else:
                    h = layers.avg_pool(h, self.dims)
                skips.append(h)

        h = res(h, last, "mid_res_0")
        h = self._attn(h, context, last, "mid_attn")
        h = res(h, last, "mid_res_1")

        for level in range(last, -1, -1):
            for i in range(depths[level] + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = res(h, level, f"up_{level}_res_{i}")
                h = self._attn(h, context, level, f"up_{level}_attn_{i}", i)
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resblock_updown:
                    h = res(h, level, name, "up")
                else:
                    h = layers.upsample_nearest(h, self.dims)
                    if self.conv_resample:
                        h = self._conv(h.shape[-1], name)(h)
        if self.n_embed is not None:
            h = layers.GroupNorm(dtype=self.dtype, name="id_norm")(h)
            return self._conv(self.n_embed, "id_out", kernel_size=1)(h)
        h = nn.silu(layers.GroupNorm(dtype=self.dtype, name="norm_out")(h))
        return self._conv(self.out_channels, "conv_out", zero_init=True)(h)

    def res_blocks_of_levels(self) -> tuple[int, ...]:
        """Res blocks of each level on the way down; there is one more on the way up."""
        return self._of_levels("num_res_blocks")

    def abstract_inputs(self, size: int | None = None) -> dict:
        """The smallest legal arguments of `__call__`, as shapes, for `eval_shape`."""

        def floats(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        size = size or 2 ** (len(self.channel_mult) - 1)
        inputs = {
            "x": floats(1, *(size,) * self.dims, self.in_channels),
            "t": floats(1),
        }
        if self.sequential_crossattn:
            inputs["context"] = [floats(1, 1, dim) for dim in self._context_dims()]
        elif self.use_spatial_transformer or self.added_kv:
            inputs["context"] = floats(1, 1, self._width_of_context())
        if isinstance(self.num_classes, int):
            inputs["y"] = jax.ShapeDtypeStruct((1,), jnp.int32)
        elif self.num_classes is not None:
            width = {
                "continuous": (1,),
                "sequential": (self.adm_in_channels,),
                "clip": (self.adm_in_channels,),
                "added": (4 * self.model_channels,),
            }
            inputs["y"] = floats(1, *width.get(self.num_classes, ()))
        return inputs

    def _width_of_context(self) -> int:
        """What is given; with "clip" that is projected to `context_dim`."""
        if self.num_classes == "clip":
            return self.adm_in_channels // 2
        return self.context_dim

    def _of_levels(self, field: str) -> tuple[int, ...]:
        value, levels = getattr(self, field), len(self.channel_mult)
        values = (value,) * levels if isinstance(value, int) else tuple(value)
        if len(values) != levels:
            raise ValueError(
                f"{field}: {len(values)} entries for {levels} levels of channel_mult"
            )
        return values

    def _transformer_depths(self) -> tuple[int, ...]:
        """Of each level, and of the middle."""
        depths = self._of_levels("transformer_depth")
        middle = self.transformer_depth_middle
        return *depths, depths[-1] if middle is None else middle

    def _context_dims(self) -> tuple[int, ...]:
        blocks = max(self._transformer_depths())
        dims = self.context_dim
        return (dims,) * blocks if isinstance(dims, int) else tuple(dims)

    def _check(self, x, context, y) -> None:
        *space, channels = x.shape[1:]
        if channels != self.in_channels:
            raise ValueError(
                f"x has {channels} channels, but in_channels is {self.in_channels}"
                " (the latent's and those of the concat condition together)"
            )
        factor = 2 ** (len(self.channel_mult) - 1)
        if any(size % factor for size in space[self.dims == 3 :]):
            raise ValueError(
                f"x has size {tuple(space)}; each side must be divisible by {factor}"
                f" for {len(self.channel_mult)} levels of channel_mult"
            )
        if (y is None) != (self.num_classes is None):
            has, needs = ("no y", "needs one") if y is None else ("y", "takes none")
            raise ValueError(
                f"{has} was given, but num_classes={self.num_classes!r} {needs}"
            )
        width = self.abstract_inputs().get("y")
        known = isinstance(self.num_classes, int) or self.num_classes in LABELS
        if y is not None and known and y.shape[1:] != width.shape[1:]:
            raise ValueError(
                f"y is {list(y.shape[1:])} a row, but num_classes={self.num_classes!r}"
                f" takes {list(width.shape[1:])}; see adm_in_channels"
            )
        if self.num_classes == "clip" and not self.added_kv:
            raise ValueError("num_classes 'clip' makes tokens, so it needs added_kv")
        if (context is None) == (self.use_spatial_transformer or self.added_kv):
            has, needs = ("no context", "needs one")
            if context is not None:
                has, needs = ("context", "takes none")
            raise ValueError(
                f"{has} was given, but use_spatial_transformer="
                f"{self.use_spatial_transformer}, added_kv={self.added_kv} {needs}"
            )
        if context is not None:
            self._check_context(context)

    def _check_context(self, context) -> None:
        many = isinstance(context, list | tuple)  # as the original always takes it
        if self.sequential_crossattn and not many:
            raise ValueError("context is one array, but sequential_crossattn=True")
        if many and self.added_kv:
            raise ValueError("context is a list, but added_kv takes one array")
        widths = tuple(c.shape[-1] for c in context) if many else context.shape[-1]
        wanted = self._context_dims() if many else self._width_of_context()
        if widths != wanted:
            name = "context_dim"
            if self.num_classes == "clip":
                name = "half of adm_in_channels"
            raise ValueError(f"context has width {widths}, but {name} is {wanted}")

    def _embed(self, t: jax.Array, y: jax.Array | None) -> jax.Array:
        """Embeds timestep and y, in float32: small, and every block depends on it."""
        width = 4 * self.model_channels

        def mlp(x, name):
            h = nn.silu(layers.Dense(width, name=f"{name}_0")(x.astype(jnp.float32)))
            return layers.Dense(width, name=f"{name}_1")(h)

        emb = mlp(layers.timestep_embedding(t, self.model_channels), "time_embed")
        if self.num_classes in (None, "clip"):
            return emb
        if self.num_classes == "added":
            return emb + y.astype(jnp.float32)
        if isinstance(self.num_classes, int):
            shape = (self.num_classes, width)
            table = self.param("label_embed", nn.initializers.normal(1.0), shape)
            return emb + jnp.take(table, y, axis=0)
        if self.num_classes == "continuous":
            return emb + layers.Dense(width, name="label_embed")(y.astype(jnp.float32))
        if self.num_classes == "timestep":
            y = layers.timestep_embedding(y, self.model_channels)
        elif self.num_classes != "sequential":
            raise ValueError(
                f"num_classes {self.num_classes!r}; choose an int, or one of"
                f" {', '.join(LABELS)}"
            )
        return emb + mlp(y, "label_embed")

    def _conv(self, features: int, name: str, **kwargs) -> layers.Conv:
        return layers.Conv(
            features, dims=self.dims, dtype=self.dtype, name=name, **kwargs
        )

    def _strides(self) -> tuple[int, ...]:
        axes = layers.resampled_axes(self.dims)
        return tuple(2 if a in axes else 1 for a in range(1, self.dims + 1))

    def _res(self, h, emb, level, name, deterministic, resample) -> jax.Array:
        block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
        return block(
            self.channel_mult[level] * self.model_channels,
            self.dropout,
            self.use_scale_shift_norm,
            resample,
            self.dims,
            self.dtype,
            name=name,
        )(h, emb, deterministic)

    def _attn(self, h, context, level, name, index=None) -> jax.Array:
        """Attention after res block `index` of a level, or in the middle (None)."""
        middle = index is None
        if middle and self.disable_middle_transformer:
            return h
        if not middle:
            blocks = self.num_attention_blocks
            if 2**level not in self.attention_resolutions:
                return h
            if blocks is not None and index >= blocks[level]:
                return h
        heads, dim_head = self.heads_of(h.shape[-1], upward=name.startswith("up"))
        if not self.use_spatial_transformer:
            block = attention.AttentionBlock
            if self.remat:
                block = nn.remat(block)
            order = self.use_new_attention_order
            given = context if self.added_kv else ()
            return block(heads, order, self.dtype, name=name)(h, *given)
        if middle:
            disabled = self.disable_middle_self_attn
        else:
            disabled = bool(self.disable_self_attentions)
            disabled = disabled and self.disable_self_attentions[level]
        depth = self._transformer_depths()[-1 if middle else level]
        block = attention.SpatialTransformer(
            heads, dim_head, depth, disabled, self.remat, self.dtype, name=name
        )
        return block(h, context)

    def heads_of(self, channels: int, upward: bool) -> tuple[int, int]:
        """Number and width of the heads, in the original's (legacy's) arithmetic."""
        if self.num_heads is None and self.num_head_channels is None:
            raise ValueError("num_heads, num_head_channels: give one of them")
        heads = self.num_heads
        if self.num_head_channels is not None:
            heads = channels // self.num_head_channels
        elif upward and self.legacy and not self.use_spatial_transformer:
            heads = self.num_heads_upsample or heads
        if heads < 1 or (channels % heads and not self.use_spatial_transformer):
            raise ValueError(f"{channels} channels can't be split into {heads} heads")
        if self.num_head_channels is not None and not self.legacy:
            return heads, self.num_head_channels
        return heads, channels // heads
