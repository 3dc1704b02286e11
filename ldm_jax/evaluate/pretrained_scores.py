"""Which scores a machine can make: LPIPS and FID need weights that others published."""

from typing import Any

from ldm_jax.convert import inception, pretrained, torch_archive


def load(
    vgg: str | None = None,
    lpips_heads: str | None = None,
    inception_path: str | None = None,
    *,
    download: bool = False,
) -> dict[str, Any]:
    """Params of `lpips` and `inception`, each where its files are given or cached.

    With `download` what is missing is fetched. Says in a line what will not be scored.
    """
    given = {"vgg16": vgg, "lpips_heads": lpips_heads, "inception": inception_path}
    options = {
        "vgg16": "--vgg",
        "lpips_heads": "--lpips_heads",
        "inception": "--inception",
    }

    def path(name):
        return pretrained.fetch(name, given[name], options[name])

    def ready(name):
        return download or given[name] is not None or pretrained.is_cached(name)

    weights = {}
    if ready("vgg16") and ready("lpips_heads"):
        weights["lpips"] = pretrained.lpips_params(path("vgg16"), path("lpips_heads"))
    if ready("inception"):
        state_dict = torch_archive.load(path("inception"))
        weights["inception"] = inception.params(state_dict)
    missing = [
        f"{score} ({' and '.join(flags)})"
        for net, score, flags in (
            ("lpips", "LPIPS", ("--vgg", "--lpips_heads")),
            ("inception", "FID", ("--inception",)),
        )
        if net not in weights
    ]
    if missing:
        print(
            f"not scored for want of weights: {', '.join(missing)}; --download"
            " fetches them once, python -m ldm_jax.evaluate --help says more"
        )
    return weights
